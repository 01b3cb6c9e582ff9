"""Ends of a tool's own that a policy has tried again: statuses, signals, and output over its limit."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest
from daemons import RUN_IN_SANDBOX, until
from retried import EATER, NETWORK, began, cause, policy, written
from sessioned import layers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

AGAIN = """
limits: {{memory: 64MiB, workspace: {{size: 16MiB}}, tmp: {{size: 16MiB}}}}
mounts: [{{source: {lent}, target: /lent}}]
artifacts: [{{path: "out/*"}}]
commit: {commit}
retry: {{backoff: {backoff}, exited: {{times: {times}, codes: [75, 69]}}, signalled: {{signals: [SIGUSR1]}}}}
"""
# what an attempt before it left would be seen
TRIES = (
    "[ -e seen ] && echo dirty; touch seen; mkdir -p out; cp in out/; cat in; [ -e /lent/ready ] || exit 75"
)


@pytest.fixture
def lent(tmp_path: Path) -> Path:
    """A directory of the host that policies lend; what is put there is seen by the next attempt."""
    made = tmp_path / "lent"
    made.mkdir()
    return made


def again(
    daemon: Daemon, lent: Path, *, times: int = 100, backoff: str = "50ms..50ms", commit: str = "exited"
) -> str:
    return policy(daemon, "again", AGAIN.format(lent=lent, times=times, backoff=backoff, commit=commit))


@pytest.mark.parametrize("commit", ["exited", "always"])
def test_a_status_that_is_named_is_tried_again_until_it_is_another(
    daemon_factory: Callable[..., Daemon], lent: Path, commit: str
) -> None:
    daemon = daemon_factory()
    name, client = again(daemon, lent, commit=commit), daemon.client()
    session = client.create_session()
    client.run(["sh", "-c", "echo in > in"], session=session.id)
    before = client.session(session.id)
    call = client.start(["sh", "-c", TRIES], policy=name, session=session.id)
    until(lambda: len(client.get(call.id).retried) >= 2, "it was tried again")
    (lent / "ready").touch()
    found = client.wait(call.id, timeout=20)
    assert (cause(found), found.outcome and found.outcome.exit_code) == ("exited", 0)
    assert found.attempts == len(found.retried) + 1 >= 3
    assert {(each.cause, each.exit_code, each.signal, each.error) for each in found.retried} == {
        ("exited", 75, None, None)
    }
    assert found.stdout is not None
    assert found.stdout.text == "in\n" * found.attempts
    assert [each.path for each in found.artifacts] == ["out/in"]
    assert found.checkpoint_before == before.head.digest
    # one checkpoint came of it, and nothing of the attempts before is held against the caller's room
    made = client.checkpoints(session.id).checkpoints
    assert len(made) == 3
    assert [each.call for each in made[:1]] == [call.id]
    with sqlite3.connect(f"file:{daemon.state}/journal.sqlite3?mode=ro", uri=True) as connection:
        [[header]] = connection.execute("SELECT header FROM records WHERE id = ?", (found.id,)).fetchall()
    connection.close()
    assert {each["exit_code"] for each in json.loads(header)["retried"]} == {75}
    client.delete_session(session.id)
    until(lambda: not layers(daemon), "no attempt left a layer")


def test_what_attempts_before_the_last_changed_takes_no_room(
    daemon_factory: Callable[..., Daemon], lent: Path
) -> None:
    daemon = daemon_factory(
        config="callers: [{match: {uid: 0}, role: operator, policies: ['*'], sessions: {size: 8MiB}}]\n"
    )
    name, client = again(daemon, lent, times=5), daemon.client()
    session = client.create_session()
    script = "head -c 3M /dev/urandom > big; exit 69"
    found = client.run(["sh", "-c", script], policy=name, session=session.id)
    assert (cause(found), found.attempts) == ("exited", 6)
    assert found.outcome is not None
    assert found.outcome.exit_code == 69  # and not denied for want of room: 3 MiB are held, not 18
    assert found.checkpoint_after != found.checkpoint_before
    assert len(layers(daemon)) == 1
    client.delete_session(session.id)


@pytest.mark.parametrize(
    ("script", "attempts"),
    [
        ("exit 75", 3),
        ("exit 69", 3),
        ("exit 1", 1),
        ("exit 0", 1),
        ("kill -USR1 $$; sleep 9", 2),
        ("kill -USR2 $$; sleep 9", 1),
        ("no-such-program", 1),  # 127, which the shell says
        ("kill -KILL $$", 1),
        (EATER, 1),
    ],
)
def test_only_what_is_named_is_tried_again(daemon: Daemon, script: str, attempts: int) -> None:
    name = policy(
        daemon,
        "named",
        "limits: {memory: 64MiB, workspace: {size: 16MiB}, tmp: {size: 16MiB}}\n"
        "retry: {backoff: 5ms..5ms, exited: {times: 2, codes: [75, 69]}, signalled: {signals: [SIGUSR1]}}\n",
    )
    found = daemon.run("sh", "-c", script, policy=name)
    assert found.attempts == attempts
    assert {each.signal_name for each in found.retried} <= {None, "SIGUSR1"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_times_of_a_cause_are_counted_over_daemons(
    daemon_factory: Callable[..., Daemon], lent: Path, number: int
) -> None:
    """It ends while the next attempt is waited for: what was tried is not tried once more, and no outcome."""
    first = daemon_factory()
    name, client = again(first, lent, times=2, backoff="4s..4s"), first.client()
    session = client.create_session()
    call = client.start(["sh", "-c", TRIES], policy=name, inputs={"in": "in\n"}, session=session.id)
    until(lambda: client.get(call.id).retried, "it waits for another attempt")
    first.stop(number)
    second = daemon_factory(state=first.state, name="second", config=f"policies: [{first.policies}]\n")
    client = second.client()
    found = client.wait(call.id, timeout=30)
    assert (cause(found), found.attempts) == ("exited", 3), found
    assert found.outcome is not None
    assert found.outcome.exit_code == 75
    assert [(each.number, each.exit_code) for each in found.retried] == [(1, 75), (2, 75)]
    assert found.stdout is not None
    assert found.stdout.text == "in\n" * 3
    assert [each.path for each in found.artifacts] == ["out/in"]
    assert {each.path for each in client.session_files(session.id).files} == {"in", "out", "seen"}
    with client.events(call.id) as events:
        types = [event.type for event in events]
    assert (types.count("retry"), types.count("ended")) == (2, 1)


def test_an_attempt_that_ends_while_the_daemon_drains_is_followed_by_one_of_the_next(
    daemon_factory: Callable[..., Daemon], lent: Path
) -> None:
    """Of a call that nobody waits for; one whose caller does has its outcome from the daemon that ran it."""
    first = daemon_factory()
    name, client = again(first, lent, times=1, backoff="10ms..10ms"), first.client()
    argv = ["sh", "-c", "cat in; until [ -e /lent/drains ]; do sleep 0.05; done; exit 75"]
    call = client.start(argv, policy=name, inputs={"in": "in\n"})
    began(client, call.id)
    waiting = subprocess.Popen(
        [RUN_IN_SANDBOX, "--socket", first.socket, "--policy", name, "--json", "--", *argv],
        stdout=subprocess.PIPE,
    )
    until(lambda: len([one for one in client.list().invocations if one.state == "running"]) == 2, "both run")
    first.process.send_signal(signal.SIGTERM)
    until(lambda: client.health().status == "draining", "it drains")
    (lent / "drains").touch()
    stdout, _ = waiting.communicate(timeout=30)
    told = json.loads(stdout)
    assert (waiting.returncode, told["attempts"], told.get("retried", [])) == (75, 1, [])
    assert first.process.wait(timeout=30) == 0
    second = daemon_factory(state=first.state, name="second", config=f"policies: [{first.policies}]\n")
    found = second.client().wait(call.id, timeout=30)
    assert (cause(found), found.attempts) == ("exited", 2)
    assert [each.exit_code for each in found.retried] == [75]
    assert found.stdout is not None
    assert found.stdout.text == "in\n" * 2
    assert second.client().get(told["id"]).attempts == 1


def test_what_the_caller_brought_about_is_not_tried_again(
    daemon_factory: Callable[..., Daemon], lent: Path
) -> None:
    daemon = daemon_factory()
    name, client = again(daemon, lent), daemon.client()
    script = "trap 'exit 75' INT; echo up; while :; do sleep 0.05; done"
    for sent, wanted in ((signal.SIGINT, "exited"), (signal.SIGUSR1, "signalled"), (None, "cancelled")):
        call = client.start(["sh", "-c", script], policy=name)
        until(partial(written, client, call.id, 3), "it is up")
        client.cancel(call.id) if sent is None else client.signal(call.id, sent)
        found = client.wait(call.id, timeout=20)
        assert (cause(found), found.attempts) == (wanted, 1)
    # a signal to one attempt says nothing of the next
    call = client.start(
        [
            "sh",
            "-c",
            "trap : INT; echo up; until [ -e /lent/ready ]; do sleep 0.05; done; kill -USR1 $$; sleep 9",
        ],
        policy=name,
    )
    until(partial(written, client, call.id, 3), "it is up")
    (lent / "ready").touch()
    found = client.wait(call.id, timeout=20)
    assert (cause(found), found.attempts) == ("signalled", 2)


def test_output_over_its_limit_has_more_room_where_the_policy_raises_it(daemon: Daemon) -> None:
    text = (
        "limits: {stdout: {size: 8KiB, on_limit: kill}, stderr: 8KiB}\n"
        "retry: {backoff: 10ms..10ms, output: {times: 2, raise: {stdout: 32KiB}}}\n"
    )
    name = policy(daemon, "talks", text)
    client = daemon.client()
    found = client.run(["sh", "-c", "head -c 20000 /dev/zero | tr '\\0' x; sleep 1"], policy=name)
    assert (cause(found), found.attempts) == ("exited", 2)
    [failed] = found.retried
    assert (failed.cause, failed.stdout, failed.raised) == ("output", 8192, {"stdout": 32768})
    assert [(each.limit, each.value, each.ended) for each in failed.limits_reached] == [
        ("stdout", 8192, True)
    ]
    with client.stdout(found.id) as stream:
        assert b"".join(stream) == b"x" * (8192 + 20000)
    # what was not raised is tried again as it is; nor does it go on for ever
    found = client.run(["sh", "-c", "head -c 20000 /dev/zero >&2; sleep 60"], policy=name)
    assert (cause(found), found.attempts) == ("output", 3)
    assert [each.stderr for each in found.retried] == [8192, 16384]
    lowered = client.run(
        ["sh", "-c", "head -c 20000 /dev/zero; sleep 60"], policy=name, limits={"stdout": "4KiB"}
    )
    assert (cause(lowered), lowered.attempts) == ("output", 1)


@pytest.mark.parametrize("safe", [True, False])
def test_a_status_is_tried_again_with_a_network_only_where_that_is_safe(
    daemon_factory: Callable[..., Daemon], *, safe: bool
) -> None:
    daemon = daemon_factory()
    text = f"{NETWORK}retry: {{backoff: 10ms..10ms, safe: {str(safe).lower()}, exited: {{codes: [75]}}}}\n"
    if safe:
        name = policy(daemon, "asks", text)
        assert daemon.run("sh", "-c", "exit 75", policy=name).attempts == 2
        return
    problems = daemon.client().check_policy(f"version: 1\nname: asks\nextends: default\n{text}", "asks")
    [problem] = problems
    assert (problem.code, problem.line) == ("impossible", 5)
    assert "safe: true" in problem.message
