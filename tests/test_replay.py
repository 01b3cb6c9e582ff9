"""Recorded calls run again, on a real daemon: what is the same, what differs, and under which policy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import until
from journals import call as invocation

from sandboxd import errors, models
from sandboxd.replay import prepared
from sandboxd.sessionreplay import KEPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

SANDBOXD = Path(sys.executable).with_name("sandboxd")
POLICY = "version: 1\nname: mine\nextends: files\nlimits: {wall: 20s}\n"


def differing(replay: models.Replay) -> set[str]:
    return {one.what for one in replay.differs}


def test_the_same_call_gives_the_same(daemon: Daemon) -> None:
    client = daemon.client()
    call = client.run(
        ["sh", "-c", 'cat > copy; cat in >> copy; echo "$WORD"; echo err >&2; exit 3'],
        policy="files", stdin=b"\x00typed", inputs={"in": b"input" * 100_000}, env={"WORD": "said"},
        key="replayed",
    )  # fmt: skip
    assert call.outcome is not None
    assert call.outcome.exit_code == 3
    replay = client.replay(call.id)
    assert replay.differs == []
    assert {"stdout", "stderr", "exit_code", "plan", "image", "policy", "artifact copy"} <= set(replay.same)
    assert replay.recorded == call.id
    assert replay.replayed.id != call.id
    assert replay.replayed.labels == {"replay-of": call.id}
    assert replay.replayed.key is None
    assert any(text.startswith("time:") for text in replay.not_captured)
    assert not any(text.startswith("network:") for text in replay.not_captured)
    assert client.replay(replay.replayed.id).differs == []  # a replay is a call like any other


def test_what_differs_is_told(daemon: Daemon) -> None:
    client = daemon.client()
    call = client.run(
        ["sh", "-c", "head -c 16 /dev/urandom; date +%N > t; : > steady; exec sleep 0"], policy="files"
    )
    replay = client.replay(call.id)
    assert differing(replay) == {"stdout", "artifact t"}
    assert "artifact steady" in replay.same
    (stream,) = [one for one in replay.differs if one.what == "stdout"]
    assert call.stdout is not None
    assert stream.recorded == {"digest": call.stdout.digest, "size": 16}
    done = subprocess.run(
        [SANDBOXD, "replay", call.id, "--socket", daemon.socket], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "differs: stdout" in done.stdout
    assert "not captured: randomness" in done.stdout
    steady = client.run(["true"])
    done = subprocess.run(
        [SANDBOXD, "replay", steady.id, "--json", "--socket", daemon.socket],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, json.loads(done.stdout)["differs"]) == (0, [])


def test_under_another_policy(daemon: Daemon) -> None:
    client = daemon.client()
    call = client.run(
        ["sh", "-c", "echo out > a; head -c 30000000 /dev/zero | tail -c 1 | od -c"], policy="files"
    )
    replay = client.replay(call.id, policy="tiny")
    assert {"policy", "plan", "artifact a"} <= differing(replay)
    assert "stdout" in replay.same
    assert replay.replayed.policy.name == "tiny"
    with pytest.raises(errors.NotFound):
        client.replay(call.id, policy="nope")


def test_a_policy_that_has_changed_is_run_as_it_was(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    file = daemon.policies / "mine.yaml"
    file.write_text(POLICY)
    until(lambda: "mine" in {one.name for one in client.policies()}, "the policy is in force")
    time.sleep(1)  # it is kept
    call = client.run(["sh", "-c", "ulimit -n; echo x > f"], policy="mine")
    file.write_text(POLICY + "artifacts: []\n" + "process: {umask: '0077'}\n")
    until(lambda: client.policy("mine").digest != call.policy.digest, "the edit is in force")
    replay = client.replay(call.id)
    assert replay.differs == []
    assert replay.replayed.policy == call.policy
    assert {"policy", "plan"} <= differing(client.replay(call.id, policy="mine"))
    file.unlink()
    until(lambda: "mine" not in {one.name for one in client.policies()}, "the policy is gone")
    assert client.replay(call.id).differs == []
    (daemon.policies / "floor.yaml").write_text("version: 1\nlimits: {wall: 10s}\n")
    until(lambda: bool(client.health().problems), "the floor is in force")
    with pytest.raises(errors.PolicyInvalid, match="cannot be in force any more"):
        client.replay(call.id)
    (daemon.policies / "floor.yaml").unlink()
    daemon.stop()
    again = daemon_factory(state=daemon.state, name="again")  # and what was kept outlives the daemon
    assert again.client().replay(call.id).differs == []


def test_what_cannot_be_run_again_says_why(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    running = client.start(["sleep", "1000"])
    with pytest.raises(errors.StateConflict, match="not ended"):
        client.replay(running.id)
    client.cancel(running.id)
    with pytest.raises(errors.NotFound):
        client.replay("01a22157-4d8f-7226-82a0-911dfccbd5cc")
    streamed = client.start(["cat"], stdin="stream")
    client.write_stdin(streamed.id, b"typed", eof=True)
    client.wait(streamed.id)
    replay = client.replay(streamed.id)
    assert differing(replay) >= {"stdout"}
    assert any(text.startswith("standard input:") for text in replay.not_captured)
    call = daemon.run("true")
    client.prune(age=0)
    with pytest.raises(errors.Pruned):
        client.replay(call.id)


def test_nobody_is_told_of_a_replay() -> None:
    request = models.Request(argv=["true"], key="once", callback=models.Callback(unix="/run/told"))
    recorded = invocation(state=models.State.ENDED)
    assert prepared(request, recorded, "default").callback is None


def test_the_session_of_a_replay_does_not_outlive_a_kill_for_ever(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    call = client.run(["sleep", "2"], session=session.id)
    with ThreadPoolExecutor(1) as pool:
        replay = pool.submit(daemon.client().replay, call.id)
        until(lambda: len(client.sessions().sessions) == 2, "the replay has its session")
        (fork,) = [one for one in client.sessions().sessions if one.id != session.id]
        assert fork.ttl == KEPT
        assert replay.result().differs == []
    client.delete_session(session.id)


def test_a_call_of_a_session_runs_where_it_stood(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    client.run(["sh", "-c", "echo one > f"], session=session.id)
    call = client.run(["sh", "-c", "cat f; echo two >> f"], session=session.id)
    client.run(["sh", "-c", "rm f"], session=session.id)
    before = len(client.sessions().sessions)
    replay = client.replay(call.id)
    assert {"stdout", "exit_code"} <= set(replay.same), replay
    assert len(client.sessions().sessions) == before
    assert any(text.startswith("the session:") for text in replay.not_captured)
    gone = client.run(["cat", "f"], session=session.id)
    assert gone.outcome is not None
    assert gone.outcome.exit_code == 1  # the session itself has moved on, and stays so
    client.delete_session(session.id)
    with pytest.raises(errors.NotFound):
        client.replay(call.id)
