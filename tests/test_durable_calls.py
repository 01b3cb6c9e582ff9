"""Calls that outlive their daemon: queued ones run under the next, and none runs twice."""

from __future__ import annotations

import signal
import sqlite3
import stat
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import until
from journals import behind

from sandboxd import AsyncClient, Client, errors
from sandboxd.journal import Journal
from sandboxd.journal.requests import OPEN_CALLS, UNKNOWN_CALLS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import Invocation, Request

ONE = "budget: {slots: 1}\n"


def cause(found: Invocation) -> str:
    assert found.outcome is not None
    return found.outcome.cause


def text(found: Invocation) -> str | None:
    assert found.stdout is not None
    return found.stdout.text


def running(client: Client, *argv: str, **fields: object) -> Invocation:
    found = client.start(list(argv), **fields)  # type: ignore[arg-type]
    until(lambda: client.get(found.id).state == "running", "the command runs")
    return found


def request_of(state: Path, id_: str) -> Request:
    async def read() -> Request:
        async with Journal.open(state) as journal:
            return await journal.request(id_)

    return anyio.run(read)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_queued_calls_run_after_a_restart_in_their_order(
    daemon_factory: Callable[..., Daemon], number: int
) -> None:
    first = daemon_factory(config=ONE)
    client = first.client()
    blocker = running(client, "sleep", "1000")
    large = b"0123456789abcdef" * 40_000  # more than a row holds
    queued = [
        client.start(["sh", "-c", "cat a; cat"], inputs={"a": f"{n} "}, stdin=b"in", key=f"k{n}").id
        for n in range(3)
    ]
    queued.append(client.start(["sha256sum"], stdin=large).id)
    urgent = client.start(["echo", "first"], priority=5, env={"A": "1"}).id
    assert [client.get(id_).state for id_ in queued] == ["queued"] * 4
    first.process.send_signal(number)
    if number == signal.SIGTERM:
        until(lambda: client.health().status == "draining", "it drains")
        first.process.send_signal(signal.SIGTERM)
    first.process.wait(30)
    second = daemon_factory(config=ONE, state=first.state, name="second")
    client = second.client()
    ended = {id_: client.wait(id_, timeout=30) for id_ in [urgent, *queued]}
    assert {cause(found) for found in ended.values()} == {"exited"}
    assert [text(ended[id_]) for id_ in queued[:3]] == ["0 in", "1 in", "2 in"]
    assert "  -" in (text(ended[queued[3]]) or "")
    started = [ended[id_].times.started or 0 for id_ in [urgent, *queued]]
    assert started == sorted(started)
    assert cause(client.get(blocker.id)) == ("failed" if number == signal.SIGKILL else "cancelled")
    types = [event.type for event in client.events(queued[0])]
    assert list(dict.fromkeys(types)) == ["accepted", "started", "output", "ended"]
    again = client.run(["sh", "-c", "cat a; cat"], inputs={"a": "1 "}, stdin=b"in", key="k1")
    assert again.id == queued[1]
    assert again.attempts == 1
    second.stop()
    kept = request_of(first.state, queued[3])
    assert kept.stdin.decode() == large  # type: ignore[union-attr]
    kept = request_of(first.state, queued[1])
    assert (kept.key, kept.inputs[0].content.decode()) == ("k1", b"1 ")
    assert kept.argv == ["sh", "-c", "cat a; cat"]


def test_a_deadline_counts_from_acceptance_across_a_restart(daemon_factory: Callable[..., Daemon]) -> None:
    first = daemon_factory(config=ONE)
    client = first.client()
    running(client, "sleep", "1000")
    soon = client.start(["true"], deadline="1s").id
    later = client.start(["echo", "ran"], deadline="60s").id
    first.stop(signal.SIGKILL)
    time.sleep(1.0)
    client = daemon_factory(config=ONE, state=first.state, name="second").client()
    late = client.wait(soon, timeout=20)
    assert cause(late) == "wall_time"
    assert (late.times.started, late.attempts) == (None, 0)
    assert text(client.wait(later, timeout=20)) == "ran\n"


def test_a_key_stands_for_a_call_in_the_session_that_had_the_name(daemon: Daemon) -> None:
    client = daemon.client()
    session = client.create_session("named").id
    first = client.run(["true"], session="named", key="of-the-session", priority=0)
    assert client.run(["true"], session="named", key="of-the-session").id == first.id
    assert [one.id for one in client.list(key="of-the-session").invocations] == [first.id]
    assert client.list(key="of-no-session").invocations == []
    client.delete_session(session)
    assert client.run(["true"], session="named", key="of-the-session").id == first.id
    other = client.create_session("named").id
    with pytest.raises(errors.KeyConflict, match="another session, which had the name 'named'") as caught:
        client.run(["true"], session="named", key="of-the-session")
    assert caught.value.details["differs"] == [{"field": "session", "before": session, "now": other}]
    client.delete_session(other)


def test_a_call_that_was_tied_to_a_dead_daemons_connection_is_cancelled(
    daemon_factory: Callable[..., Daemon],
) -> None:
    first = daemon_factory(config=ONE)
    client = first.client()
    running(client, "sleep", "1000")
    with client.stream(["true"]) as events:
        tied = next(events).id
        assert tied is not None
        first.stop(signal.SIGKILL)
    client = daemon_factory(config=ONE, state=first.state, name="second").client()
    assert cause(client.get(tied)) == "cancelled"


def test_dormant_calls_are_listed_cancelled_and_others_see_nothing_of_them(
    daemon_factory: Callable[..., Daemon],
) -> None:
    first = daemon_factory(config=ONE)
    client = first.client()
    blocker = client.start(["sleep", "1000"], priority=10)
    ids = [client.start(["sleep", "1000"], labels={"n": str(n)}).id for n in range(3)]
    first.stop(signal.SIGKILL)
    client = daemon_factory(config=ONE, state=first.state, name="second").client()
    until(lambda: client.get(ids[0]).state == "running", "the first of them runs")
    assert cause(client.get(blocker.id)) == "failed"
    assert [found.id for found in client.list(state="queued").invocations] == [ids[2], ids[1]]
    assert [found.id for found in client.list(state="queued", label="n=1").invocations] == [ids[1]]
    states = {found.id: found.state for found in client.list().invocations}
    assert states[ids[2]] == "queued"
    assert cause(client.cancel(ids[1])) == "cancelled"
    with client.events(ids[2]) as events:
        assert next(events).type == "accepted"
        assert cause(client.cancel(ids[0])) == "cancelled"
        assert next(events).type == "started"
    assert cause(client.cancel(ids[2])) == "cancelled"


def test_what_is_not_allowed_any_more_is_denied(daemon_factory: Callable[..., Daemon]) -> None:
    first = daemon_factory(config=ONE)
    client = first.client()
    running(client, "sleep", "1000")
    file = first.policies / "gone.yaml"
    file.write_text("version: 1\nname: gone\nextends: default\n")
    until(lambda: "gone" in [policy.name for policy in client.policies()], "the policy is loaded")
    id_ = client.start(["true"], policy="gone").id
    file.unlink()
    first.stop(signal.SIGKILL)
    client = daemon_factory(config=ONE, state=first.state, name="second").client()
    found = client.wait(id_, timeout=20)
    assert cause(found) == "denied"
    assert found.outcome is not None
    assert found.outcome.error is not None
    assert found.outcome.error.code == "not_found"


def test_a_conflict_says_what_differs_and_never_a_secret(daemon: Daemon) -> None:
    client = daemon.client()
    asked = {"env": {"TOKEN": "hush-1", "SAME": "x"}, "inputs": {"a": "one"}, "stdin": b"hush-2"}
    first = client.run(["true"], key="differs", limits={"pids": 7}, **asked)  # type: ignore[arg-type]
    with pytest.raises(errors.KeyConflict) as caught:
        client.run(
            ["echo", "x"],
            key="differs",
            env={"TOKEN": "hush-3", "SAME": "x"},
            inputs={"a": "two"},
            stdin=b"hush-4",
            limits={"pids": 8},
        )
    differs = {each["field"]: each for each in caught.value.details["differs"]}
    assert set(differs) == {"argv", "env.TOKEN", "inputs.a", "limits.pids", "stdin"}
    assert (differs["argv"]["before"], differs["argv"]["now"]) == (["true"], ["echo", "x"])
    assert (differs["limits.pids"]["before"], differs["limits.pids"]["now"]) == (7, 8)
    assert "hush" not in str(caught.value.details)
    assert "argv" in str(caught.value)
    assert caught.value.details["id"] == first.id


def test_a_conflict_says_both_values_on_the_command_line(daemon: Daemon) -> None:
    def run(*options: str, stdin: bytes = b"") -> tuple[int, list[str]]:
        done = daemon.cli("--key", "said at a terminal", *options, stdin=stdin)
        return done.returncode, done.stderr.decode().splitlines()

    first = ["--env", "TOKEN=hush-1", "--timeout", "5s", "--", "echo", "one"]
    assert run(*first) == run(*first) == (0, [])
    status, lines = run(
        "--env", "TOKEN=hush-2", "-i", "--priority", "2", "--", "echo", "\x1b]0;x\x07", stdin=b"hush"
    )
    assert status == 125
    assert lines == [
        (
            "run-in-sandbox: this key was used before with another request: they differ in "
            "argv, env.TOKEN, limits.wall, priority, stdin"
        ),
        r'run-in-sandbox: argv was ["echo", "one"], and is ["echo", "\u001b]0;x\u0007"]',
        "run-in-sandbox: limits.wall was 5s, and is not given",
        "run-in-sandbox: priority was not given, and is 2",
    ]


def test_the_journal_is_for_the_daemon_alone(daemon: Daemon) -> None:
    daemon.run("true", env={"TOKEN": "hush"})
    for file in daemon.state.glob("journal.sqlite3*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_key_attaches_to_the_running_call_and_its_events(daemon: Daemon) -> None:
    client = daemon.client()
    argv = ["sh", "-c", "echo one; read line; echo $line"]
    first = running(client, *argv, stdin="stream", key="attach")
    with client.stream(argv, stdin="stream", key="attach") as events:
        seen = [next(events)]
        assert seen[0].id == first.id
        client.write_stdin(first.id, b"two\n")
        seen += list(events)
    assert [event.type for event in seen][-1] == "ended"
    assert "".join(event.data.text or "" for event in seen if event.data) == "one\ntwo\n"
    done = daemon.cli("--key", "attach", "-i", "--", *argv)
    assert done.stdout == b"one\ntwo\n"

    async def attach() -> list[str]:
        async with await AsyncClient(daemon.socket).stream(argv, stdin="stream", key="attach") as stream:
            return [event.type async for event in stream]

    assert anyio.run(attach) == [event.type for event in seen]


def test_a_queue_is_read_without_what_it_does_not_need(tmp_path: Path) -> None:
    """Neither what has ended, nor what a call that waits brings: neither grows the time to the first call."""

    async def make() -> None:
        async with Journal.open(tmp_path):
            pass

    anyio.run(make)
    with sqlite3.connect(tmp_path / "journal.sqlite3") as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {OPEN_CALLS}").fetchall()
        unknown = connection.execute(f"EXPLAIN QUERY PLAN {UNKNOWN_CALLS}").fetchall()
    connection.close()
    assert [row[3] for row in plan] == ["SCAN queue"]  # in its order, and no other table
    assert "invocations_open" in str(unknown[0])


def test_a_row_that_cannot_be_read_keeps_nobody_else_from_being_served(
    daemon_factory: Callable[..., Daemon],
) -> None:
    first = daemon_factory(config=ONE)
    client = first.client()
    bad = running(client, "sleep", "1000").id
    worse = client.start(["true"]).id
    good = client.start(["echo", "good"]).id
    first.stop(signal.SIGKILL)
    with sqlite3.connect(first.state / "journal.sqlite3") as connection:
        connection.execute("UPDATE invocations SET doc = X'00' WHERE id = ?", (bad,))
        connection.execute("UPDATE requests SET doc = X'7B7D' WHERE id = ?", (worse,))
    connection.close()
    second = daemon_factory(config=ONE, state=first.state, name="second")
    client = second.client()
    assert text(client.wait(good, timeout=30)) == "good\n"
    found = client.wait(worse, timeout=20)
    assert found.outcome is not None
    assert found.outcome.error is not None
    assert (found.outcome.cause, found.outcome.error.code) == ("failed", "journal_corrupt")
    assert bad in second.log.read_text()


def test_under_pressure_one_call_runs_and_the_others_wait(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="pressure: {available: 100%}\n")
    client = daemon.client()
    first = running(client, "sleep", "1000")
    second = client.start(["sleep", "1000"])
    time.sleep(1.5)  # it looks again, several times
    assert client.get(second.id).state == "queued"
    client.cancel(first.id)
    until(lambda: client.get(second.id).state == "running", "one may always run")
    client.cancel(second.id)


def test_a_caller_may_have_as_many_wait_as_its_rule_says(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=ONE + "callers: [{match: {uid: 0}, role: operator, queued: 2}]\n")
    client = daemon.client()
    held = running(client, "sleep", "1000")
    for _ in range(2):
        client.start(["sleep", "1000"])
    with pytest.raises(errors.QueueFull) as caught:
        client.start(["sleep", "1000"])
    client.cancel(held.id)  # or the daemon waits for it before it stops
    told = {name: caught.value.details[name] for name in ("queued", "yours", "running", "limit")}
    assert told == {"queued": 2, "yours": 2, "running": 1, "limit": 2}
    assert caught.value.details["which"] == "caller"
    assert "`queued` of your entry in `callers`" in str(caught.value)


def test_what_was_changed_of_a_request_is_not_run(daemon_factory: Callable[..., Daemon]) -> None:
    """A call that waits over a restart, one that is replayed, and a key that is used again."""
    first = daemon_factory(config=ONE)
    client = first.client()
    done = client.run(["echo", "done"], key="done")
    running(client, "sleep", "1000")
    queued = {
        client.start(["echo", "asked"]).id: "what was asked was changed",
        client.start(["cat"], stdin=b"asked").id: "what its request named as sha256:",
    }
    other = client.start(["echo", "other"]).id
    first.stop(signal.SIGKILL)
    behind(
        first.state,
        "UPDATE requests SET doc = CAST(replace(CAST(doc AS TEXT), 'echo', 'evil') AS BLOB)"
        f" WHERE id != '{other}'",
        "UPDATE requests SET contents = CAST(replace(CAST(contents AS TEXT), 'asked', 'other') AS BLOB)"
        f" WHERE id = '{list(queued)[1]}'",
    )
    second = daemon_factory(config=ONE, state=first.state, name="second")
    client = second.client()
    assert text(client.wait(other, timeout=30)) == "other\n"
    for id_, why in queued.items():
        failed = client.wait(id_, timeout=30)
        assert failed.outcome is not None
        assert failed.outcome.error is not None
        assert (failed.outcome.cause, failed.outcome.error.code) == ("failed", "journal_corrupt")
        assert f"call {id_}: {why}" in failed.outcome.error.message
        assert failed.times.started is None
    with pytest.raises(errors.JournalCorrupt, match=f"call {done.id}: what was asked was changed"):
        client.replay(done.id)
    assert client.run(["echo", "done"], key="done").id == done.id
    with pytest.raises(errors.KeyConflict) as conflict:
        client.run(["echo", "else"], key="done")
    assert conflict.value.details["differs"] == []  # what the first one asked for is not known
