"""All calls of a session run again, on a real daemon: what differs, where the line goes, and what is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import until
from sessioned import ask, by, said, sh

from sandboxd import errors

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd.models import Invocation, Replay, ReplayedCall, SessionInfo, SessionReplay

SANDBOXD = Path(sys.executable).with_name("sandboxd")


def again(
    daemon: Daemon, session: SessionInfo, policy: str | None = None, *, keep: bool = False
) -> tuple[list[ReplayedCall], SessionReplay]:
    with daemon.client().replay_session(session.id, policy=policy, keep=keep) as events:
        *calls, last = events
    assert last.ended is not None
    assert last.ended.recorded == session.id
    return [event.call for event in calls if event.call is not None], last.ended


def replay_of(call: ReplayedCall) -> Replay:
    assert call.replay is not None, call
    return call.replay


def differing(call: ReplayedCall) -> set[str]:
    return {one.what for one in replay_of(call).differs}


def counts(ended: SessionReplay) -> tuple[int, int, int, int]:
    return ended.same, ended.differing, ended.skipped, ended.failed


def test_calls_run_in_their_order_on_what_those_before_left(daemon: Daemon, session: SessionInfo) -> None:
    before = daemon.client().sessions().sessions
    ran: list[Invocation] = [
        sh(daemon, session, "echo one >f; mkdir -p d; ln -s ../f d/link"),
        sh(daemon, session, "cat f; head -c 8 /dev/urandom >random; exit 3"),
        sh(daemon, session, "cat random; rm f"),
        sh(daemon, session, "ls"),
    ]
    head = daemon.client().session(session.id).head
    calls, ended = again(daemon, session)
    assert [one.recorded for one in calls] == [one.id for one in ran]
    assert [differing(one) for one in calls] == [set(), {"file random"}, {"stdout"}, set()]
    assert {"file f", "file d", "file d/link", "exit_code", "stdout"} <= set(replay_of(calls[0]).same)
    assert {"stdout", "exit_code"} <= set(replay_of(calls[1]).same)
    assert "file f" in replay_of(calls[2]).same  # it is removed in both
    assert counts(ended) == (2, 2, 0, 0)
    assert ended.kept == []
    assert any(text.startswith("randomness:") for text in ended.not_captured)
    assert daemon.client().session(session.id).head == head
    assert [one.id for one in daemon.client().sessions().sessions] == [one.id for one in before]


def test_it_goes_where_the_session_went(daemon: Daemon, session: SessionInfo) -> None:
    """Back with a rollback, and on from the recorded files where they came from outside."""
    client = daemon.client()
    sh(daemon, session, "echo one >f")
    first = client.session(session.id).head
    sh(daemon, session, "echo two >f; date +%N >time")
    client.rollback_session(session.id, first.id)
    sh(daemon, session, "cat f; ls; sleep 3", policy="always")  # over its time, and kept
    client.write_file(session.id, "given", b"from outside")
    sh(daemon, session, "cat given f")
    waiting = client.start(["sleep", "5"], policy="kept", session=session.id)
    until(lambda: client.get(waiting.id).state == "running", "it has its turn")
    never = client.start(["true"], policy="kept", session=session.id)
    client.cancel(never.id)
    client.cancel(waiting.id)
    calls, ended = again(daemon, session, keep=True)
    try:
        found = [differing(one) for one in calls if one.replay is not None]
        assert found[:4] == [set(), {"file time"}, set(), set()]
        listed = replay_of(calls[2]).replayed.stdout
        assert listed is not None
        assert listed.text == "one\nf\n"
        outside = [text for text in replay_of(calls[3]).not_captured if text.startswith("the files before")]
        assert len(outside) == 1
        assert {one.recorded: one.skipped for one in calls if one.skipped} == {
            never.id: "it had no turn in the session"
        }
        assert len(ended.kept) == 2
        assert said(sh(daemon, ended.kept[1], "cat given f")) == "from outsideone\n"
        assert client.session(ended.kept[1]).expires is None
    finally:
        for one in ended.kept:
            client.delete_session(one)


def test_under_another_policy(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session(policy="kept")
    try:
        sh(daemon, session, "echo one >f")
        sh(daemon, session, "cat f")
        calls, ended = again(daemon, session, "never")
        assert counts(ended) == (0, 2, 0, 0)
        assert "file f" in differing(calls[0])
        assert {"stdout", "exit_code"} <= differing(calls[1])  # nothing is kept, so it is not there
        with pytest.raises(errors.NotFound, match="nope"):
            again(daemon, session, "nope")
        # And one call alone, in a session that has a policy of its own.
        (call, *_) = client.list(policy="kept", limit=50).invocations
        assert client.replay(call.id, policy="success").replayed.policy.name == "success"
    finally:
        client.delete_session(session.id)


def test_what_cannot_be_run_is_told(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    with pytest.raises(errors.StateConflict, match="nothing to run again"):
        again(daemon, session)
    with pytest.raises(errors.NotFound):
        client.replay_session("nobody")
    with by(4242, daemon), pytest.raises(errors.NotFound):
        daemon.client().replay_session(session.id)
    sh(daemon, session, "echo one >f")
    first = client.session(session.id).head
    sh(daemon, session, "echo two >f")
    third = sh(daemon, session, "cat f")
    for body, status in ((b'{"keep": 7}', 400), (b'{"more": 1}', 400), (b"[]", 400), (b"{", 400)):
        headers = {"content-type": "application/json"}
        assert ask(daemon, "POST", f"{session.id}/replay", body, headers).status == status
    client.prune(age=0)
    until(lambda: client.get(third.id).pruned is not None, "it is pruned")
    with pytest.raises(errors.Pruned, match="nothing to begin with"):
        again(daemon, session)
    later = sh(daemon, session, "echo three >>f; cat f")
    calls, ended = again(daemon, session)
    assert [one.skipped for one in calls[:3]] == ["what was asked was removed by retention"] * 3
    assert (calls[3].recorded, differing(calls[3])) == (later.id, set())
    assert counts(ended) == (1, 0, 3, 0)
    (daemon.policies / "floor.yaml").write_text("version: 1\nlimits: {wall: 10s}\n")
    try:
        until(lambda: bool(client.health().problems), "the floor is in force")
        calls, ended = again(daemon, session)
        assert counts(ended) == (0, 0, 3, 1)
        assert calls[3].problem is not None
        assert calls[3].problem.code == "policy_invalid"
    finally:
        (daemon.policies / "floor.yaml").unlink()
        until(lambda: not client.health().problems, "it is gone")
    client.rollback_session(session.id, first.id)
    client.discard_session(session.id)
    with pytest.raises(errors.Pruned):
        again(daemon, session)


def test_a_session_on_a_directory(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine\n")
    client = daemon.client()
    session = client.create_session(directory=tmp_path, policy="kept")
    try:
        sh(daemon, session, "cat mine; echo changed >mine; echo new >new")
        sh(daemon, session, "cat mine new")
        calls, ended = again(daemon, session)
        assert [differing(one) for one in calls] == [set(), set()]
        assert {"file mine", "file new"} <= set(replay_of(calls[0]).same)
        (tmp_path / "mine").write_text("other\n")
        calls, ended = again(daemon, session)
        assert differing(calls[0]) == {"stdout"}
        assert counts(ended) == (1, 1, 0, 0)
    finally:
        client.delete_session(session.id)


def test_who_goes_away_leaves_nothing(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    sh(daemon, session, "true")
    sh(daemon, session, "sleep 4")
    sh(daemon, session, "echo never >never")
    before = {one.id for one in client.sessions().sessions}
    count = len(client.list(limit=500).invocations)
    events = client.replay_session(session.id)
    assert next(events).call is not None
    assert len(client.sessions().sessions) == len(before) + 1
    events.close()
    until(lambda: {one.id for one in client.sessions().sessions} == before, "its session is gone")
    assert len(client.list(limit=500).invocations) <= count + 2  # the third never began


def test_the_command(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session("replayed")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(SANDBOXD), "replay", *arguments, "--socket", str(daemon.socket)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)

    try:
        call = sh(daemon, session, "echo one >f; echo \"$(printf '\\033[31m')\" >\"$(printf '\\033[2Jx')\"")
        same = run("replayed")
        assert same.returncode == 0, same.stderr
        assert f"{call.id} ran again as " in same.stdout
        assert "\n1 the same, 0 differing\n" in same.stdout
        assert "\x1b" not in same.stdout
        assert "\\x1b[2Jx" in same.stdout
        sh(daemon, session, "date +%N >f; date +%N")
        differs = run(session.id, "--json", "--keep")
        assert differs.returncode == 1
        lines = [json.loads(line) for line in differs.stdout.splitlines()]
        assert [sorted(line) for line in lines] == [["call"], ["call"], ["ended"]]
        (kept,) = lines[2]["ended"]["kept"]
        client.delete_session(kept)
        assert run(call.id).returncode == 0
        failed = run(call.id, "--keep")
        assert (failed.returncode, "--keep is of a session" in failed.stderr) == (1, True)
        assert "kept: " in run("replayed", "--keep", "--policy", "success").stdout
    finally:
        for one in client.sessions().sessions:
            client.delete_session(one.id)
