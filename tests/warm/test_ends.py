"""How a call of a warm interpreter is ended by somebody else, and what every slot has of its own."""

from __future__ import annotations

import io
import signal
import zipfile
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, start_daemon, until

from sandboxd.models import Bytes, Cause, Input

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation, Outcome

POLICY = """\
version: 1
name: {name}
extends: python
limits: {{stdout: {cap}, stderr: {cap}}}
warm: {{command: python3, preload: [json, random, numpy.random]}}
"""
WAITED = "import sys; assert '_socket' in sys.modules\n"  # it is not in those of a fresh interpreter


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    directory = tmp_path_factory.mktemp("warm")
    (directory / "policies").mkdir()
    for name, cap in (("warm", "64KiB"), ("killing", "{size: 64KiB, on_limit: kill}")):
        (directory / "policies" / f"{name}.yaml").write_text(POLICY.format(name=name, cap=cap))
    (directory / "policies" / "cold.yaml").write_text(
        "version: 1\nname: cold\nextends: python\nwarm: !remove\n"
    )
    with start_daemon(directory) as running:
        yield running


def run(daemon: Daemon, code: str, *, policy: str = "warm", **options: object) -> tuple[Outcome, Invocation]:
    found = daemon.run("python3", "-c", WAITED + code, policy=policy, **options)
    assert found.outcome is not None
    return found.outcome, found


def said(found: Invocation) -> str:
    assert found.stdout is not None
    return found.stdout.text or ""


def started(daemon: Daemon, code: str) -> str:
    """The id of a call that has begun and says so."""
    client = daemon.client()
    id_ = client.start(["python3", "-c", WAITED + code], policy="warm").id
    until(lambda: b"begun" in b"".join(client.stdout(id_)), "the call to begin")
    return id_


def test_it_is_cancelled(daemon: Daemon) -> None:
    id_ = started(daemon, "import time; print('begun', flush=True); time.sleep(60)")
    daemon.client().cancel(id_)
    found = daemon.client().wait(id_)
    assert found.outcome is not None
    assert found.outcome.cause is Cause.CANCELLED


def test_a_signal_reaches_it(daemon: Daemon) -> None:
    code = (
        # not one long sleep: a signal that comes just before it is seen by Python only after it
        "import time\ntry:\n print('begun', flush=True)\n while True: time.sleep(0.05)\n"
        "except KeyboardInterrupt: sys.exit(9)"
    )
    id_ = started(daemon, code)
    daemon.client().signal(id_, signal.SIGINT)
    found = daemon.client().wait(id_)
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 9)


def test_a_deadline_ends_it(daemon: Daemon) -> None:
    outcome, _ = run(daemon, "import time; time.sleep(60)", deadline="2s")
    assert outcome.cause is Cause.WALL_TIME


def test_cpu_time_ends_it_and_counts_from_the_hand_over(daemon: Daemon) -> None:
    outcome, _ = run(daemon, "while True: pass", limits={"cpu_time": "300ms"})
    assert outcome.cause is Cause.CPU_TIME
    outcome, _ = run(daemon, "pass", limits={"cpu_time": "60ms"})  # the start alone takes more
    assert outcome.cause is Cause.EXITED


def test_output_is_cut(daemon: Daemon) -> None:
    outcome, found = run(daemon, "print('x' * (1 << 20)); print('done', file=sys.stderr)")
    assert outcome.cause is Cause.EXITED
    assert found.stdout is not None
    assert (found.stdout.size, found.stdout.dropped) == (65536, (1 << 20) + 1 - 65536)
    assert found.stderr is not None
    assert found.stderr.text == "done\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_ends_it(daemon: Daemon, stream: str) -> None:
    outcome, found = run(daemon, f"while True: print('x' * 4096, file=sys.{stream})", policy="killing")
    assert outcome.cause is Cause.OUTPUT
    assert found.outcome is outcome


def test_an_argument_that_is_no_text_is_the_same_to_a_fresh_one(daemon: Daemon) -> None:
    found = [
        daemon.client().run(
            [
                b"python3",
                b"-c",
                b"import sys, os; print(sys.argv[1:], os.fsencode(sys.argv[1]))",
                b"\xff\xe9",
            ],
            policy=policy,
        )
        for policy in ("warm", "cold")
    ]
    assert said(found[0]) == said(found[1]) == "['\\udcff\\udce9'] b'\\xff\\xe9'\n"


@pytest.mark.parametrize("name", ["app.pyz", "app.zip", "app"])
def test_an_archive_is_a_script(daemon: Daemon, name: str) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(
            "__main__.py", "import sys, part; print(sys.argv, sys.path[0], __file__, part.__file__)"
        )
        archive.writestr("part.py", "")
    data = b"#!/usr/bin/env python3\n" + packed.getvalue() if name == "app.pyz" else packed.getvalue()
    inputs = [Input(path=name, content=Bytes.of(data))]
    found = [daemon.run("python3", name, "a", policy=policy, inputs=inputs) for policy in ("warm", "cold")]
    assert said(found[0]) == said(found[1]) != ""


def test_nothing_random_is_the_same_in_two_slots(daemon: Daemon) -> None:
    code = "import random, numpy; print(hash('x'), random.random(), numpy.random.random(), id(sys) != 0)"
    words = [said(run(daemon, code)[1]).split() for _ in range(3)]
    for column in list(zip(*words, strict=True))[:3]:
        assert len(set(column)) == 3
