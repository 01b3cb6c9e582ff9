"""The interpreter battery: each call warm and cold, compared byte for byte."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, start_daemon
from programs_of_warm import CALLS, FILES, Call

from sandboxd.models import Bytes, Input

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation

WARM = "version: 1\nname: warm\nextends: python\nwarm: {command: python3, preload: [json]}\n"
COLD = "version: 1\nname: cold\nextends: python\nwarm: !remove\n"
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
    (directory / "policies" / "cold.yaml").write_text(COLD)
    with start_daemon(directory) as running:
        yield running


def run(daemon: Daemon, call: Call, policy: str) -> Invocation:
    stdin = "none" if call.stdin is None else Bytes.of(call.stdin)
    return daemon.run(*call.argv, policy=policy, stdin=stdin, env=call.env, cwd=call.cwd, inputs=INPUTS)


def seen(found: Invocation) -> dict[str, object]:
    assert found.outcome is not None
    assert found.stdout is not None
    assert found.stderr is not None
    return {
        "cause": found.outcome.cause,
        "exit code": found.outcome.exit_code,
        "signal": found.outcome.signal,
        "stdout": (found.stdout.text or "").split("\n"),
        "stderr": (found.stderr.text or "").split("\n"),
        "denials": found.denials,
    }


def difference(warm: object, cold: object) -> object:
    if not isinstance(warm, list) or not isinstance(cold, list):
        return warm, cold
    return [line for line in difflib.ndiff(warm, cold) if line[:1] in "+-?"]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{' '.join(call.argv)[:50]!r}")
def test_a_warm_interpreter_is_as_a_fresh_one(daemon: Daemon, call: Call) -> None:
    warm, cold = seen(run(daemon, call, "warm")), seen(run(daemon, call, "cold"))
    different = {name: difference(warm[name], value) for name, value in cold.items() if warm[name] != value}
    assert not different


def test_only_one_of_the_two_has_waited(daemon: Daemon) -> None:
    code = "import sys; print('_socket' in sys.modules)"
    words = [
        seen(run(daemon, Call(("python3", "-c", code)), policy))["stdout"] for policy in ("warm", "cold")
    ]
    assert words == [["True", ""], ["False", ""]]
