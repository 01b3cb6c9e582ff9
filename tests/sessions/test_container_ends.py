"""How the container that a session keeps ends, and what is told of it."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, slots_of, until
from living import first_process, kill_first, live, living
from sessioned import by, said, sh

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    with living(tmp_path_factory.mktemp("ends")) as one:
        yield one


def rows(state: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(f"file:{state}/journal.sqlite3?mode=ro", uri=True) as journal:
        return journal.execute("SELECT session, calls, lost IS NOT NULL FROM containers").fetchall()


def test_a_daemon_that_is_killed_takes_it_along_and_the_next_one_says_so(tmp_path: Path) -> None:
    needs_containers()
    with living(tmp_path) as daemon:
        client = daemon.client()
        session = client.create_session("s")
        first = live(daemon, session, "echo kept > kept; sleep 1000 &")
        made = client.checkpoint_session(session.id)
        live(daemon, session, "echo gone > gone; rm kept")
        daemon.stop(signal.SIGKILL)
        until(lambda: not slots_of(daemon) or _dead(daemon), "everything in it has ended")
    with living(tmp_path) as daemon:
        client = daemon.client()
        found = client.session(session.id)
        assert found.head.digest == made.digest
        assert found.container is not None
        assert (found.container.state, found.container.since, found.container.calls) == ("lost", first.id, 2)
        assert "lost" in daemon.sandboxd("session", "show", "s")
        call = live(daemon, session, "ls; cat kept")
        assert said(call) == "kept\nkept\n"
        assert call.container is not None
        assert call.container.number == 1
        assert call.container.lost is not None
        assert call.container.lost.since == first.id
        assert call.outcome is not None
        assert f"had lost the container of call {first.id}" in call.outcome.message
        after = live(daemon, session, "true")
        assert after.container is not None
        assert after.container.lost is None  # it was said once
        assert client.session(session.id).container.state == "live"  # type: ignore[union-attr]


def _dead(daemon: Daemon) -> bool:
    return not any(one.startswith("process") for one in slots_of(daemon))


def test_a_daemon_that_is_stopped_keeps_the_files(tmp_path: Path) -> None:
    needs_containers()
    with living(tmp_path) as daemon:
        session = daemon.client().create_session("s")
        live(daemon, session, "echo kept > kept; sleep 1000 &")
        assert rows(daemon.state) == [(session.id, 1, 0)]
    until(lambda: rows(daemon.state) == [], "nothing says that there is one")
    assert not slots_of(daemon)
    with living(tmp_path) as daemon:
        assert daemon.client().session("s").container is None
        assert said(sh(daemon, session, "cat kept", policy="plain")) == "kept\n"


def test_one_that_ends_between_two_calls_is_said_to_be_lost_and_its_files_are_kept(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    first = live(daemon, session, "echo kept > kept; sleep 1000 &")
    kill_first(daemon)
    until(lambda: (found := client.session(session.id).container) and found.state == "lost", "it is lost")
    assert rows(daemon.state) == [(session.id, 1, 1)]
    found = client.session(session.id)
    assert found.container is not None
    assert found.container.lost is not None
    assert found.container.lost.why == "it ended while no call was in it; its files were kept"
    assert (found.head.call, found.head.parent) == (first.id, session.head.id)
    assert b"".join(client.read_file(session.id, "kept")) == b"kept\n"
    until(lambda: not [one for one in client.slots() if one.policy == "live"], "it was cleared away")
    assert client.end_session(session.id).container is None  # acknowledged
    until(lambda: rows(daemon.state) == [], "nothing says that there is one")
    call = live(daemon, session, "ls; cat /proc/[0-9]*/comm | grep -c sleep")
    assert said(call) == "kept\n0\n"
    assert call.container is not None
    assert (call.container.since, call.container.lost) == (call.id, None)
    assert first.id != call.id
    client.delete_session(session.id)
    until(lambda: rows(daemon.state) == [], "nothing says that there is one")


def test_one_that_ends_by_itself_and_whose_files_are_too_large_is_lost_with_them(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session(size="1MiB")
    live(daemon, session, "echo kept > kept")
    made = client.checkpoint_session(session.id)
    live(daemon, session, "head -c 2M /dev/zero | tr '\\0' x > big")
    kill_first(daemon)
    until(lambda: (found := client.session(session.id).container) and found.state == "lost", "it is lost")
    call = live(daemon, session, "ls")
    assert said(call) == "kept\n"
    assert call.checkpoint_before == made.digest
    assert call.container is not None
    assert call.container.lost is not None
    assert "it ended while no call was in it, and its files could not be kept" in call.container.lost.why
    client.delete_session(session.id)


def test_files_of_a_policy_that_keeps_none_are_lost_with_it(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    live(daemon, session, "echo gone > gone", policy="nothing")
    kill_first(daemon)
    call = live(daemon, session, "ls", policy="nothing")
    assert said(call) == ""
    assert call.container is not None
    assert call.container.lost is not None
    assert call.container.lost.why == "it ended while no call was in it"
    assert call.checkpoint_before == session.head.digest
    client.delete_session(session.id)


@pytest.mark.parametrize("ends", [False, True])
def test_one_that_has_died_is_checkpointed_and_ended_as_ever(daemon: Daemon, *, ends: bool) -> None:
    """Whether that was found out before, or not."""
    client = daemon.client()
    session = client.create_session()
    live(daemon, session, "echo kept > kept")
    kill_first(daemon)
    with suppress(errors.StateConflict):  # it was taken away just before
        client.end_session(session.id) if ends else client.checkpoint_session(session.id)
    assert b"".join(client.read_file(session.id, "kept")) == b"kept\n"
    until(lambda: not [one for one in client.slots() if one.policy == "live"], "it was cleared away")
    client.delete_session(session.id)


def test_one_that_dies_before_a_call_has_begun_in_it_keeps_what_others_did(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    first = live(daemon, session, "echo kept > kept")
    pid = first_process(daemon)
    os.kill(pid, signal.SIGSTOP)  # it parks no process
    waiting = client.start(["sh", "-c", "echo gone > gone"], policy="live", session=session.id)
    until(lambda: client.get(waiting.id).state == "starting", "it asks for one")
    os.kill(pid, signal.SIGKILL)
    done = client.wait(waiting.id)
    assert done.outcome is not None
    assert done.outcome.cause == "failed"
    assert done.checkpoint_after == session.head.digest
    call = live(daemon, session, "ls")
    assert said(call) == "kept\n"
    assert call.container is not None
    assert call.container.lost is not None
    assert call.container.lost.since == first.id
    assert "its files were kept" in call.container.lost.why
    client.delete_session(session.id)


def test_a_call_that_finds_it_dead_runs_in_another_with_its_files(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    first = live(daemon, session, "echo on > file")
    kill_first(daemon)
    call = live(daemon, session, "cat file")
    assert said(call) == "on\n"
    assert call.checkpoint_before == client.session(session.id).head.digest != session.head.digest
    assert call.container is not None
    assert call.container.lost is not None
    assert call.container.lost.since == first.id
    client.delete_session(session.id)


def test_one_that_ends_in_a_call_fails_that(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    first = live(daemon, session, "echo gone > gone")
    running = client.start(["sleep", "30"], policy="live", session=session.id)
    until(lambda: client.get(running.id).state == "running", "it runs")
    kill_first(daemon)
    done = client.wait(running.id)
    assert done.outcome is not None
    assert done.outcome.cause == "failed"
    assert done.container is not None
    assert done.container.ended is not None
    assert f"kept since call {first.id} ended with it" in done.outcome.message
    assert "What its 2 calls had changed is gone but for what" in done.outcome.message
    assert "session checkpoint" in done.outcome.message
    assert done.checkpoint_before == done.checkpoint_after == session.head.digest
    found = client.session(session.id).container
    assert found is not None
    assert found.state == "lost"
    until(lambda: not [one for one in client.slots() if one.policy == "live"], "it was cleared away")
    following = live(daemon, session, "ls")
    assert said(following) == ""
    assert following.container is not None
    assert following.container.lost is not None
    assert following.container.lost.since == first.id
    client.delete_session(session.id)


def test_it_ends_when_it_is_not_used_and_its_files_are_kept(daemon: Daemon) -> None:
    with by(4242, daemon):
        client = daemon.client()
        session = client.create_session()
        live(daemon, session, "echo kept > kept; sleep 1000 &")
        until(lambda: client.session(session.id).container is None, "it has ended", seconds=30)
        assert said(sh(daemon, session, "cat kept", policy="plain")) == "kept\n"
        client.delete_session(session.id)


def test_idle_files_that_are_too_large_are_lost_and_said_so(daemon: Daemon) -> None:
    with by(4242, daemon):
        client = daemon.client()
        session = client.create_session()
        live(daemon, session, "head -c 6M /dev/zero | tr '\\0' x > big")
        until(lambda: client.session(session.id).container.state == "lost", "it is lost", seconds=30)  # type: ignore[union-attr]
        assert "could not be kept" in client.session(session.id).container.lost.why  # type: ignore[union-attr]
        client.delete_session(session.id)


def test_one_that_has_lived_for_so_long_ends_after_its_call_and_before_those_that_wait(
    daemon: Daemon,
) -> None:
    with by(4243, daemon):
        client = daemon.client()
        session = client.create_session()
        first = live(daemon, session, "sleep 1000 & echo x > /tmp/x; echo kept > kept")
        found = client.session(session.id).container
        assert found is not None
        assert found.started is not None
        assert found.expires == found.started + 3_000_000
        running = client.start(["sh", "-c", "sleep 4; echo more >> kept"], policy="live", session=session.id)
        code = "cat kept; ls /tmp; cat /proc/[0-9]*/comm | grep -c sleep"
        waiting = [client.start(["sh", "-c", code], policy="live", session=session.id) for _ in range(2)]
        uncut = client.wait(running.id)
        assert uncut.outcome is not None
        assert uncut.outcome.cause == "exited"
        assert uncut.container is not None
        assert (uncut.container.since, uncut.container.number) == (first.id, 2)
        fresh, after = (client.wait(one.id) for one in waiting)
        assert said(fresh) == "kept\nmore\n0\n", "its files, and no process of it nor /tmp"
        assert fresh.container is not None
        assert (fresh.container.since, fresh.container.number) == (fresh.id, 1)
        assert (fresh.container.lost, fresh.container.ended) == (None, None)
        assert fresh.checkpoint_before != uncut.checkpoint_before
        assert after.container is not None
        assert (after.container.since, after.container.number) == (fresh.id, 2)
        client.delete_session(session.id)


def test_calls_without_a_pause_do_not_prolong_its_life(daemon: Daemon) -> None:
    with by(4243, daemon):
        client = daemon.client()
        session = client.create_session()
        begun = [
            client.start(["sh", "-c", "echo x >> lines; sleep 0.4"], policy="live", session=session.id)
            for _ in range(12)
        ]
        done = [client.wait(one.id) for one in begun]
        used = [one.container for one in done if one.container is not None]
        assert len({one.since for one in used}) in {2, 3}
        assert [one.lost for one in used] == [None] * 12
        client.end_session(session.id)
        assert said(sh(daemon, session, "wc -l < lines", policy="plain")) == "12\n"
        client.delete_session(session.id)


def test_files_of_one_that_has_lived_too_long_are_lost_where_they_are_too_large(daemon: Daemon) -> None:
    with by(4243, daemon):
        client = daemon.client()
        session = client.create_session()
        first = live(daemon, session, "head -c 6M /dev/zero | tr '\\0' x > big")
        running = client.start(["sleep", "4"], policy="live", session=session.id)
        waiting = client.start(["ls"], policy="live", session=session.id)
        assert client.wait(running.id).container.since == first.id  # type: ignore[union-attr]
        told = client.wait(waiting.id)
        assert said(told) == ""
        assert told.container is not None
        assert told.container.lost is not None
        assert told.container.lost.since == first.id
        assert "lived for as long as it may, and its files could not be kept" in told.container.lost.why
        client.delete_session(session.id)


def test_one_that_has_lived_for_so_long_ends_without_a_call(daemon: Daemon) -> None:
    with by(4243, daemon):
        client = daemon.client()
        kept, never = client.create_session(), client.create_session()
        live(daemon, kept, "echo kept > kept; sleep 1000 &")
        live(daemon, never, "echo gone > gone; sleep 1000 &", policy="nothing")
        until(lambda: client.session(kept.id).container is None, "it has ended", seconds=20)
        assert said(sh(daemon, kept, "cat kept", policy="plain")) == "kept\n"
        until(lambda: client.session(never.id).container is None, "it has ended", seconds=20)
        assert said(sh(daemon, never, "ls", policy="plain")) == ""
        client.delete_session(kept.id)
        client.delete_session(never.id)


def test_files_that_are_too_large_leave_it_as_it_was(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session(size="1MiB")
    live(daemon, session, "head -c 2M /dev/zero | tr '\\0' x > big; sleep 1000 &")
    with pytest.raises(errors.QuotaExceeded):
        client.checkpoint_session(session.id)
    with pytest.raises(errors.QuotaExceeded):
        client.end_session(session.id)
    assert client.session(session.id).container.state == "live"  # type: ignore[union-attr]
    assert said(live(daemon, session, "wc -c < big")) == f"{2 << 20}\n"
    client.delete_session(session.id)


def test_it_is_not_ended_under_a_call(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    live(daemon, session, "true")
    running = client.start(["sleep", "2"], policy="live", session=session.id)
    with pytest.raises(errors.SessionBusy):
        client.end_session(session.id)
    with pytest.raises(errors.SessionBusy):
        client.delete_session(session.id)
    made = client.checkpoint_session(session.id)  # waits for its turn
    done = client.get(running.id)
    assert done.outcome is not None
    assert made.id == session.head.id
    client.delete_session(session.id)


def test_a_policy_that_changes_lets_it_be_until_its_end(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    file = daemon.policies / "other.yaml"
    before = file.read_text()
    live(daemon, session, "sleep 1000 & echo x > x", policy="other")
    digest = client.policy("other").digest
    file.write_text(before.replace("wall: 9s", "wall: 8s"))
    until(lambda: client.policy("other").digest != digest, "it is in force")
    with pytest.raises(errors.ContainerLive, match="has changed since"):
        live(daemon, session, "true", policy="other")
    assert client.session(session.id).container.state == "live"  # type: ignore[union-attr]
    client.end_session(session.id)
    assert said(live(daemon, session, "cat x", policy="other")) == "x\n"
    client.delete_session(session.id)
    file.write_text(before)
    until(lambda: client.policy("other").digest == digest, "it is as it was")


def test_a_floor_that_forbids_it_lets_no_call_in(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    live(daemon, session, "echo kept > kept; sleep 1000 &")
    floor = daemon.policies / "floor.yaml"
    floor.write_text("version: 1\nisolation: call\n")
    try:
        until(lambda: "live" not in {one.name for one in client.policies()}, "it is not in force")
        with pytest.raises(errors.PolicyInvalid, match="session is wider than the floor's call"):
            live(daemon, session, "true")
        with pytest.raises(errors.ContainerLive):
            sh(daemon, session, "true", policy="plain")
        assert client.session(session.id).container.state == "live"  # type: ignore[union-attr]
        assert client.end_session(session.id).container is None
        assert said(sh(daemon, session, "cat kept", policy="plain")) == "kept\n"
    finally:
        floor.unlink()
        until(lambda: "live" in {one.name for one in client.policies()}, "it is in force again")
    client.delete_session(session.id)


def test_a_caller_keeps_as_many_as_it_may(daemon: Daemon) -> None:
    with by(4242, daemon):
        client = daemon.client()
        one, two = client.create_session(), client.create_session()
        live(daemon, one, "true")
        refused = live(daemon, two, "true")
        assert refused.outcome is not None
        assert refused.outcome.error is not None
        assert (refused.outcome.cause, refused.outcome.error.code) == ("denied", "quota_exceeded")
        assert refused.outcome.error.details["quota"] == "sessions.containers"
        client.end_session(one.id)
        assert said(live(daemon, two, "echo on")) == "on\n"
        client.delete_session(one.id)
        client.delete_session(two.id)


def test_it_holds_its_part_of_the_budget(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session()
    live(daemon, session, "true")
    assert client.health().running == 1
    live(daemon, session, "true")
    assert client.health().running == 1
    assert [slot.state for slot in client.slots() if slot.policy == "live"] == ["running"]
    refused = live(daemon, client.create_session("second"), "true", policy="huge")
    assert refused.outcome is not None
    assert refused.outcome.error is not None
    assert refused.outcome.error.code == "quota_exceeded"
    assert refused.outcome.error.details["quota"] == "budget"
    client.end_session(session.id)
    until(lambda: client.health().running == 0, "it is given back")
    client.delete_session(session.id)
    client.delete_session("second")


def test_others_calls_run_beside_it(daemon: Daemon) -> None:
    client = daemon.client()
    sessions = [client.create_session() for _ in range(3)]
    for session in sessions:
        live(daemon, session, "sleep 1000 &")
    started = [client.start(["sleep", "0.3"], policy="plain") for _ in range(20)]
    assert {client.wait(one.id).outcome.cause for one in started} == {"exited"}  # type: ignore[union-attr]
    until(lambda: client.health().running == 3, "they alone hold something")
    for session in sessions:
        client.delete_session(session.id)
    until(lambda: client.health().running == 0, "all is given back")


def test_nothing_is_left_of_any(daemon: Daemon) -> None:
    until(lambda: not slots_of(daemon), "everything is cleared away")
    until(lambda: rows(daemon.state) == [], "nothing says that there is one")
    assert daemon.client().health().running == 0
