"""The interpreter battery: each call warm and cold, compared byte for byte."""

from __future__ import annotations

import difflib
import os
import re
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, start_daemon
from programs_of_warm import FILES, POLICIES, Call

from sandboxd.models import Bytes, Cause, Input

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation

WARM = "version: 1\nname: warm\nextends: python\nwarm: {command: python3, preload: [json]}\n"
if PYTHON := os.environ.get("SANDBOXD_TEST_PYTHON"):
    # another interpreter than the image's: an installation of this host, lent to the container
    WARM += (
        f"mounts: [{{source: {PYTHON}, target: /opt}}]\n"
        "process: {env: {PATH: /opt/bin:/usr/bin:/bin, LD_LIBRARY_PATH: /opt/lib}}\n"
    )
elif IMAGE := os.environ.get("SANDBOXD_TEST_IMAGE"):
    WARM += f"image: {IMAGE}\n"
PAIR = "version: 1\nname: {name}\nextends: {parent}\n{text}"
INPUTS = [
    Input(path=name, content=Bytes.of(text.encode("latin-1" if "latin" in name else "utf-8")))
    for name, text in FILES.items()
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    directory = tmp_path_factory.mktemp("warm")
    (directory / "policies").mkdir()
    (directory / "policies" / "warm.yaml").write_text(WARM)
    for title, (text, _) in POLICIES.items():
        warm, cold = names(title)
        for name, parent, lines in ((warm, "warm", text), (cold, warm, "warm: !remove\n")):
            (directory / "policies" / f"{name}.yaml").write_text(
                PAIR.format(name=name, parent=parent, text=lines)
            )
    with start_daemon(directory) as running:
        yield running


def names(title: str) -> tuple[str, str]:
    """Of the policy whose interpreter waits, and of the one that starts it for the call."""
    name = title.replace(" ", "-")
    return f"warm-{name}", f"cold-{name}"


def run(daemon: Daemon, call: Call, policy: str) -> Invocation:
    stdin = "none" if call.stdin is None else Bytes.of(call.stdin)
    return daemon.run(*call.argv, policy=policy, stdin=stdin, env=call.env, cwd=call.cwd, inputs=INPUTS)


def seen(found: Invocation) -> dict[str, object]:
    assert found.outcome is not None
    assert found.outcome.cause is not Cause.FAILED, found.outcome
    assert found.stdout is not None
    assert found.stderr is not None
    return {
        "cause": found.outcome.cause,
        "exit code": found.outcome.exit_code,
        "signal": found.outcome.signal,
        "stdout": (found.stdout.text or "").split("\n"),
        # of unittest, which says how long it took
        "stderr": [re.sub(r" in \d\.\d+s$", "", line) for line in (found.stderr.text or "").split("\n")],
        "denials": found.denials,
    }


def printed(daemon: Daemon, call: Call, policy: str) -> list[str]:
    found = run(daemon, call, policy)
    assert found.stdout is not None
    return (found.stdout.text or "").split()


def difference(warm: object, cold: object) -> object:
    if not isinstance(warm, list) or not isinstance(cold, list):
        return warm, cold
    return [line for line in difflib.ndiff(warm, cold) if line[:1] in "+-?"]


@pytest.mark.parametrize(
    ("title", "call"),
    [(title, call) for title, (_, calls) in POLICIES.items() for call in calls],
    ids=lambda each: repr(" ".join(each.argv)[:50]) if isinstance(each, Call) else each,
)
def test_a_warm_interpreter_is_as_a_fresh_one(daemon: Daemon, title: str, call: Call) -> None:
    warm, cold = (seen(run(daemon, call, policy)) for policy in names(title))
    different = {name: difference(warm[name], value) for name, value in cold.items() if warm[name] != value}
    assert not different


WAITED = "import sys; print('_socket' in sys.modules)"  # it is not in those of a fresh interpreter
COLD = {  # those whose interpreter cannot wait, or whose user has modules that came with the call
    "lang c warned",
    "ascii",
    "wrong warnings",
    "verbose",
    "home",
}


@pytest.mark.parametrize("title", POLICIES)
def test_one_of_the_two_has_waited_where_it_can(daemon: Daemon, title: str) -> None:
    words = [printed(daemon, Call(("python3", "-c", WAITED)), policy) for policy in names(title)]
    assert [each[-1] for each in words] == [str(title not in COLD), "False"]


@pytest.mark.parametrize(
    ("waited", "call"),
    [
        ("False", Call(("python3", "-c", WAITED), cwd="/workspace/shadow")),
        ("False", Call(("python3", "-c", WAITED), cwd="/workspace/package")),
        ("True", Call(("python3", "-c", WAITED), cwd="/workspace/deep")),
        ("True", Call(("python3", "-"), WAITED.encode(), cwd="/workspace/deep")),
        ("True", Call(("python3", "-c", WAITED + "; assert 1 in {9, 1}"))),
        ("True", Call(("python3", "-c", WAITED + "; {'a', 'b', 'c'}"))),
        ("False", Call(("python3", "-c", WAITED + "; {9, 1, 17}"))),
    ],
    ids=lambda each: repr(each.argv[1:]) + each.cwd if isinstance(each, Call) else each,
)
def test_only_what_could_differ_starts_another(daemon: Daemon, waited: str, call: Call) -> None:
    assert printed(daemon, call, names("preloaded")[0]) == [waited]
