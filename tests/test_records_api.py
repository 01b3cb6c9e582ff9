"""Search and pruning through a real daemon: who finds what, and what is left of a pruned call."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import until

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

SANDBOXD = Path(sys.executable).with_name("sandboxd")
AGENT = 54_321
CALLERS = (
    "callers:\n  - {match: {uid: 0}, role: operator}\n"
    f"  - {{match: {{uid: {AGENT}}}, role: agent, policies: [default]}}\n"
)


AS_AGENT = """
import os, sys
from pathlib import Path
from sandboxd import Client, errors
socket, uid, code = sys.argv[1:]
client = Client(Path(socket))
client.health()  # all that it imports is root's to read
os.setgroups([]); os.setgid(int(uid)); os.setuid(int(uid))
try:
    print(eval(code))
except errors.SandboxdError as error:
    print(error.code)
"""


def as_agent(daemon: Daemon, code: str) -> str:
    """What an expression on a client of the agent's gives, or the code of its error."""
    done = subprocess.run(
        [sys.executable, "-c", AS_AGENT, daemon.socket, str(AGENT), code],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def journal(daemon: Daemon, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SANDBOXD, "journal", *argv, "--socket", daemon.socket],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def found(daemon: Daemon, *argv: str) -> list[str]:
    done = journal(daemon, "search", *argv, "--json")
    assert done.returncode == 0, done.stderr
    return [hit["id"] for hit in json.loads(done.stdout)["hits"]]


def test_callers_find_their_own_calls_and_operators_all(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=CALLERS)
    daemon.admit_everybody()
    mine = daemon.run("sh", "-c", "echo needle of root")
    theirs = as_agent(daemon, "client.run(['echo', 'needle']).id")
    until(lambda: len(found(daemon, "needle")) == 2, "both calls are in the index")
    assert found(daemon, "needle") == [theirs, mine.id]
    assert found(daemon, "--uid", str(AGENT)) == [theirs]
    assert found(daemon, "--since", "1h", "--cause", "exited") == [theirs, mine.id]
    assert found(daemon, "--until", "1h") == found(daemon, "--cause", "memory") == []
    for words in ("'needle'", "''", "'root OR needle'", f"'', uid={AGENT}"):
        assert as_agent(daemon, f"[hit.id for hit in client.search({words}).hits]") == f"['{theirs}']"
    assert as_agent(daemon, "client.search('', uid=0)") == "not_permitted"
    assert as_agent(daemon, "client.search('needle) OR (root')") == "invalid_request"
    assert as_agent(daemon, "client.prune(age=1)") == "not_permitted"
    done = journal(daemon, "search", "a-b")
    assert (done.returncode, "double quotes" in done.stderr) == (1, True)
    shown = subprocess.run(
        [SANDBOXD, "journal", "show", mine.id, "--state", daemon.state, "--json"],
        capture_output=True,
        check=True,
    ).stdout
    assert json.loads(shown)["header"]["id"] == mine.id


def test_a_pruned_call_says_so(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    call = daemon.run("sh", "-c", "echo out > a.txt; echo shown", policy="files", key="k")
    assert [artifact.path for artifact in call.artifacts] == ["a.txt"]
    assert call.outcome is not None
    before = time.time_ns() // 1000
    assert journal(daemon, "prune", "--age", "0s").stdout.startswith("1 calls were pruned")
    kept = client.get(call.id)
    assert kept.pruned is not None
    assert kept.pruned >= before
    assert (kept.outcome, kept.artifacts, kept.argv) == (call.outcome, [], [])
    assert kept.stdout is not None
    assert call.stdout is not None
    assert (kept.stdout.digest, kept.stdout.text) == (call.stdout.digest, "")
    assert client.run(["sh", "-c", "echo out > a.txt; echo shown"], policy="files", key="k").id == call.id
    with pytest.raises(errors.KeyConflict):
        client.run(["true"], key="k")
    for ask in (
        lambda: list(client.events(call.id)),
        lambda: b"".join(client.stdout(call.id)),
        lambda: b"".join(client.artifact(call.id, "a.txt")),
    ):
        with pytest.raises(errors.Pruned) as caught:
            ask()
        assert caught.value.details["pruned"] == kept.pruned
    assert not (daemon.state / "calls" / call.id).exists()
    daemon.stop()
    done = subprocess.run(
        [SANDBOXD, "journal", "verify", "--deep", "--state", daemon.state], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
