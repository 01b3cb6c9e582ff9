"""Warm slots whose interpreter does not come up, or whose image is hostile; and what differs by slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, start_daemon

from sandboxd.models import Cause

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon

MODULES = {
    "fine": "",
    "children": "import os, time\nif os.fork() == 0:\n    time.sleep(60)\n",
    "ends": "import os; print('it said this'); os._exit(3)",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "raises": "raise RuntimeError('no')",
    "exits": "raise SystemExit(0)",
    "deaf": "import os\nfor fd in range(3): os.close(fd)\n",
    "handles": "import signal\nsignal.signal(signal.SIGINT, lambda *a: None)\n",
    "writes": "import os\nfor fd in range(64):\n    try: os.write(fd, b'x' * 4)\n    except OSError: pass\n",
    "closes": "import os\nos.closerange(3, 64)\n",
    "forks": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nelse: os._exit(0)\n",
    "masks": "import os; os.umask(0)",
    "denied": "import ctypes; ctypes.CDLL(None).unshare(0x10000000)",
    "threads": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n",
}

STARTS = {"greets.pth": "import sys; print('hello')\n", "usercustomize.py": "print('hello')\n"}
"""What the image has every interpreter do before its program."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    directory: Path = tmp_path_factory.mktemp("warm")
    (directory / "policies").mkdir()
    modules = directory / "modules"
    modules.mkdir(mode=0o755)
    for name, text in MODULES.items():
        (modules / f"own_{name}.py").write_text(text)
        (directory / "policies" / f"{name}.yaml").write_text(
            f"version: 1\nname: {name}\nextends: python\nlimits: {{wall: 5s}}\n"
            f"mounts: [{{source: {modules}, target: /usr/local/lib/python3.11/dist-packages}}]\n"
            f"warm: {{command: python3, preload: [own_{name}]}}\n"
        )
    for file, text in STARTS.items():
        name = file.partition(".")[0]
        (directory / name).mkdir(mode=0o755)
        (directory / name / file).write_text(text)
        (directory / "policies" / f"{name}.yaml").write_text(
            f"version: 1\nname: {name}\nextends: python\nprocess: {{env: {{PYTHONUNBUFFERED: !remove }}}}\n"
            f"mounts: [{{source: {directory / name}, target: /usr/local/lib/python3.11/dist-packages}}]\n"
        )
    (directory / "policies" / "nowhere.yaml").write_text(
        "version: 1\nname: nowhere\nextends: python\nwarm: {command: no-such-python, preload: [json]}\n"
    )
    (directory / "policies" / "missing.yaml").write_text(
        "version: 1\nname: missing\nextends: python\nwarm: {command: python3, preload: [no_such_module]}\n"
    )
    (directory / "policies" / "other.yaml").write_text(
        "version: 1\nname: other\nextends: python\nwarm: {command: sleep}\n"
    )
    with start_daemon(directory) as running:
        yield running


@pytest.mark.parametrize("policy", [*MODULES, "nowhere", "missing", "other"])
def test_a_call_is_served_whatever_the_modules_do(daemon: Daemon, policy: str) -> None:
    found = daemon.run("python3", "-c", "print(6 * 7)", policy=policy)
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 0), found.outcome
    assert found.stdout is not None
    assert found.stdout.text == "42\n"
    assert found.denials == []


UNKEPT = [
    "nowhere",
    "missing",
    "ends",
    "killed",
    "children",
    "forks",
    "raises",
    "other",
    "writes",
    "closes",
    "exits",
    "deaf",
]


@pytest.mark.parametrize("policy", UNKEPT)
def test_the_operator_is_told_why_none_waits(daemon: Daemon, policy: str) -> None:
    daemon.run("true", policy=policy)
    assert f"policy {policy}: no warm interpreter" in daemon.log.read_text()


@pytest.mark.parametrize("policy", sorted(MODULES.keys() - set(UNKEPT)))
def test_what_they_may_do_is_kept(daemon: Daemon, policy: str) -> None:
    code = f"import sys, os; print('own_{policy}' in sys.modules, oct(os.umask(0)))"
    found = daemon.run("python3", "-c", code, policy=policy)
    assert found.stdout is not None
    assert found.stdout.text == "True 0o22\n"
    assert f"policy {policy}: no warm interpreter" not in daemon.log.read_text()


@pytest.mark.parametrize("policy", [name.partition(".")[0] for name in STARTS])
def test_what_each_start_prints_is_printed_by_each_call(daemon: Daemon, policy: str) -> None:
    found = daemon.run("python3", "-c", "print(6 * 7)", policy=policy)
    assert found.stdout is not None
    assert found.stdout.text == "hello\n42\n"
    assert f"policy {policy}: no warm interpreter" in daemon.log.read_text()


def test_what_handles_an_interrupt_is_theirs(daemon: Daemon) -> None:
    code = "import signal; signal.raise_signal(signal.SIGINT); print('handled')"
    found = daemon.run("python3", "-c", code, policy="handles")
    assert found.stdout is not None
    assert found.stdout.text == "handled\n"


def test_it_is_the_interpreter_that_waited_that_runs_the_call(daemon: Daemon) -> None:
    code = "import sys; print('own_fine' in sys.modules, open('/proc/self/cmdline').read().split(chr(0))[1])"
    found = daemon.run("python3", "-c", code, policy="fine")
    assert found.stdout is not None
    assert found.stdout.text == "True /proc/self/fd/5\n"


def test_randomness_is_each_slots_own(daemon: Daemon) -> None:
    code = "import random, os; print(hash('x'), random.random(), os.urandom(4))"
    said = {str(daemon.run("python3", "-c", code, policy="fine").stdout) for _ in range(3)}
    assert len(said) == 3


def test_what_the_start_used_is_not_the_calls(daemon: Daemon) -> None:
    warm = daemon.run("python3", "-c", "pass", policy="fine").usage
    cold = daemon.run("python3", "-u", "-c", "pass", policy="fine").usage
    assert warm is not None
    assert cold is not None
    assert warm.cpu_user + warm.cpu_system < cold.cpu_user + cold.cpu_system


def test_limits_hold(daemon: Daemon) -> None:
    found = daemon.run("python3", "-c", "x = bytearray(3 << 30)", policy="fine")
    assert found.outcome is not None
    assert found.outcome.cause is Cause.MEMORY
    found = daemon.run("python3", "-c", "while True: pass", policy="fine", limits={"wall": "300ms"})
    assert found.outcome is not None
    assert found.outcome.cause is Cause.WALL_TIME
