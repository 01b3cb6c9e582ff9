"""Attempts that follow one another, by cause: each recorded, each from the same inputs."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import slots_of, until
from sessioned import layers

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd import Client
    from sandboxd.models import Invocation

PATIENT = "retry: {failed: 2, backoff: 100ms..200ms}\n"
MEMORY = (
    "limits: {memory: 64MiB, workspace: {size: 16MiB}, tmp: {size: 16MiB}}\n"
    "retry: {memory: {times: 1, raise: {memory: 256MiB}}, backoff: 50ms..50ms}\n"
)
NETWORK = "network: {allow: [{host: a.example, ports: [443]}]}\n"
EATER = "x=$(head -c 100M /dev/zero | tr '\\0' a); echo ${#x}"


def policy(daemon: Daemon, name: str, text: str) -> str:
    (daemon.policies / f"{name}.yaml").write_text(f"version: 1\nname: {name}\nextends: default\n{text}")
    until(lambda: name in [each.name for each in daemon.client().policies()], "the policy is loaded")
    return name


def cause(found: Invocation) -> str:
    assert found.outcome is not None
    return found.outcome.cause


def began(client: Client, id_: str, attempt: int = 1) -> None:
    until(lambda: (found := client.get(id_)).state == "running" and found.attempts == attempt, "it runs")


def written(client: Client, id_: str, size: int) -> bool:
    stdout = client.get(id_).stdout
    return stdout is not None and stdout.size == size


def kill_container(daemon: Daemon) -> None:
    """End PID 1 of the one container, as a host that is short of memory might."""
    found = set()
    for path in slots_of(daemon):
        if path.startswith("/"):
            found |= {int(pid) for pid in (Path(path) / "cgroup.procs").read_text().split()}
    first = min(found, key=lambda pid: psutil.Process(pid).create_time())
    os.kill(first, signal.SIGKILL)


def test_a_call_that_needed_more_memory_gets_what_the_policy_raises(daemon: Daemon) -> None:
    name = policy(daemon, "raising", MEMORY)
    client = daemon.client()
    found = client.run(["sh", "-c", f"cat in; {EATER}"], policy=name, inputs={"in": "in\n"})
    assert (cause(found), found.attempts) == ("exited", 2)
    assert found.stdout is not None
    assert found.stdout.text == "in\nin\n104857600\n"  # that of the first attempt stays
    [failed] = found.retried
    assert (failed.number, failed.cause, failed.stdout) == (1, "memory", 3)
    assert failed.raised == {"memory": 256 * 2**20}
    assert failed.plan != found.plan
    assert found.receipt is not None
    [memory] = [each for each in found.receipt.controls if each.name == "memory"]
    assert memory.in_force == str(256 * 2**20)
    with client.events(found.id) as events:
        types = [event.type for event in events]
    assert list(dict.fromkeys(types)) == ["accepted", "started", "output", "limit", "retry", "ended"]
    assert types.count("started") == 2
    with sqlite3.connect(f"file:{daemon.state}/journal.sqlite3?mode=ro", uri=True) as connection:
        [[header]] = connection.execute("SELECT header FROM records WHERE id = ?", (found.id,)).fetchall()
    connection.close()
    assert json.loads(header)["retried"][0]["cause"] == "memory"
    assert client.run(["true"], policy=name).attempts == 1


def test_what_the_request_lowered_is_not_raised(daemon: Daemon) -> None:
    name = policy(daemon, "raising2", MEMORY)
    found = daemon.run("sh", "-c", EATER, policy=name, limits={"memory": "48MiB"})
    assert (cause(found), found.attempts) == ("memory", 1)


def test_more_than_the_daemons_budget_is_refused_before_anything_runs(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory(config="budget: {memory: 128MiB, cpus: 1}\n")
    name = policy(daemon, "raising", MEMORY)
    with pytest.raises(errors.RequestTooWide) as caught:
        daemon.run("true", policy=name)
    assert caught.value.details["field"] == "retry.memory.raise.memory"
    assert cause(daemon.run("true", policy="tiny")) == "exited"
    name = policy(
        daemon, "busy", "limits: {memory: 64MiB, cpus: 2, workspace: {size: 8MiB}, tmp: {size: 8MiB}}\n"
    )
    with pytest.raises(errors.RequestTooWide) as caught:
        daemon.run("true", policy=name)
    assert caught.value.details["field"] == "limits.cpus"


def test_a_container_that_was_lost_is_tried_again_and_no_more_often_than_said(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    name = policy(daemon, "patient", PATIENT)
    call = client.start(["sh", "-c", "echo up; sleep 1000"], policy=name)
    for attempt in (1, 2, 3):
        began(client, call.id, attempt)
        kill_container(daemon)
    found = client.wait(call.id, timeout=20)
    assert (cause(found), found.attempts) == ("failed", 3)
    assert found.outcome is not None
    assert found.outcome.error is not None
    assert found.outcome.error.code == "engine"
    assert [each.error.code for each in found.retried if each.error] == ["engine", "engine"]
    assert [each.pause for each in found.retried] == [100_000, 200_000]
    until(lambda: not slots_of(daemon), "no container is left")


@pytest.mark.parametrize(
    ("text", "stdin", "attempts"),
    [
        (PATIENT + NETWORK, "none", 1),
        (PATIENT.replace("{", "{safe: true, ") + NETWORK, "none", 2),
        (PATIENT, "stream", 1),
        (PATIENT.replace("}", ", on: [host]}"), "none", 1),
    ],
    ids=["network", "network-safe", "streamed", "other-fault"],
)
def test_what_may_have_had_an_effect_is_not_tried_again(
    daemon_factory: Callable[..., Daemon], text: str, stdin: str, attempts: int
) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    name = policy(daemon, "reaching", text)
    call = client.start(["sh", "-c", "sleep 1000"], policy=name, stdin=stdin)  # type: ignore[arg-type]
    began(client, call.id)
    kill_container(daemon)
    if attempts == 2:
        began(client, call.id, 2)
        client.cancel(call.id)
    found = client.wait(call.id, timeout=20)
    assert found.attempts == attempts
    assert cause(found) == ("failed" if attempts == 1 else "cancelled")


def test_a_pause_holds_no_slot_and_a_deadline_bounds_it(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="budget: {slots: 1}\n")
    client = daemon.client()
    name = policy(daemon, "slow", PATIENT.replace("100ms..200ms", "30s..30s"))
    waiting = client.start(["sleep", "1000"], policy=name)
    began(client, waiting.id)
    kill_container(daemon)
    until(lambda: client.get(waiting.id).retried, "it waits for another attempt")
    assert cause(client.run(["true"])) == "exited"
    assert client.get(waiting.id).state == "queued"
    assert cause(client.cancel(waiting.id)) == "cancelled"
    bounded = client.start(["sleep", "1000"], policy=name, deadline="20s")
    began(client, bounded.id)
    kill_container(daemon)
    found = client.wait(bounded.id, timeout=10)
    assert (cause(found), found.attempts) == ("failed", 1)


@pytest.mark.parametrize("safe", [True, False])
def test_interrupted_calls_are_tried_again_by_the_next_daemon_if_their_policy_says_so(
    daemon_factory: Callable[..., Daemon], *, safe: bool
) -> None:
    first = daemon_factory()
    text = (PATIENT.replace("{", "{safe: true, ") if safe else PATIENT) + NETWORK
    policy(first, "patient", PATIENT)
    policy(first, "reaching", text)
    client = first.client()
    fields = {"inputs": {"in": "input\n"}}
    long = ["sh", "-c", "cat in; sleep 1000"]
    ids = [client.start(long, policy=name, key=name, **fields).id for name in ("patient", "reaching")]  # type: ignore[arg-type]
    plain = client.start(long, **fields).id  # type: ignore[arg-type]
    for id_ in [*ids, plain]:
        began(client, id_)
        until(partial(written, client, id_, 6), "it wrote")
    first.stop(signal.SIGKILL)
    second = daemon_factory(state=first.state, name="second", config=f"policies: [{first.policies}]\n")
    client = second.client()
    assert cause(client.get(plain)) == "failed"
    began(client, ids[0], 2)
    if safe:
        began(client, ids[1], 2)
    else:
        assert cause(client.get(ids[1])) == "failed"
    until(partial(written, client, ids[0], 12), "it wrote again")
    found = client.cancel(ids[0])
    assert found.stdout is not None
    assert found.stdout.text == "input\ninput\n"
    assert [each.error.code for each in found.retried if each.error] == ["interrupted"]
    with client.events(ids[0]) as events:
        types = [event.type for event in events]
    assert list(dict.fromkeys(types)) == ["accepted", "started", "output", "retry", "ended"]
    assert types.index("retry") > types.index("output")
    if safe:
        client.cancel(ids[1])
    assert client.start(long, policy="patient", key="patient", **fields).id == ids[0]  # type: ignore[arg-type]


EATS_AND_STAYS = f"cat in; {EATER}; sleep 1000"


def raising(daemon: Daemon, *, backoff: str = "50ms..50ms", most: str = "256MiB") -> str:
    text = MEMORY.replace("50ms..50ms", backoff).replace("256MiB", most)
    return policy(daemon, "raising", text.replace("retry: {", "retry: {failed: 2, "))


def limit_in_force(found: Invocation) -> int:
    assert found.receipt is not None
    [memory] = [each for each in found.receipt.controls if each.name == "memory"]
    return int(memory.in_force)


@pytest.mark.parametrize("when", ["running", "waiting"])
def test_what_was_raised_stays_raised_when_the_daemon_is_killed(
    daemon_factory: Callable[..., Daemon], when: str
) -> None:
    """While the attempt with more memory runs, and while it is waited for."""
    first = daemon_factory()
    name = raising(first, backoff="50ms..50ms" if when == "running" else "20s..20s")
    client = first.client()
    id_ = client.start(["sh", "-c", EATS_AND_STAYS], policy=name, inputs={"in": "in\n"}).id
    once = "in\n104857600\n"
    if when == "running":
        until(partial(written, client, id_, 3 + len(once)), "it has what it needs")
    else:
        until(lambda: client.get(id_).retried, "it waits for another attempt")
    first.stop(signal.SIGKILL)
    second = daemon_factory(state=first.state, name="second", config=f"policies: [{first.policies}]\n")
    client = second.client()
    attempts = 3 if when == "running" else 2
    began(client, id_, attempts)
    until(partial(written, client, id_, 3 + (attempts - 1) * len(once)), "it has what it needs again")
    found = client.cancel(id_)
    assert [each.cause for each in found.retried] == ["memory", "failed"][: attempts - 1]
    assert found.retried[0].raised == {"memory": 256 * 2**20}
    assert limit_in_force(found) == 256 * 2**20
    assert {each.plan for each in found.retried[1:]} <= {found.plan}
    assert found.retried[0].plan != found.plan


@pytest.mark.parametrize(("most", "expected"), [("128MiB", 128), ("64MiB", 64)])
def test_what_was_raised_holds_as_far_as_the_policy_of_now_raises_to_it(
    daemon_factory: Callable[..., Daemon], most: str, expected: int
) -> None:
    first = daemon_factory()
    name = raising(first, backoff="20s..20s")
    client = first.client()
    id_ = client.start(["sh", "-c", EATER], policy=name).id
    until(lambda: client.get(id_).retried, "it waits for another attempt")
    first.stop(signal.SIGKILL)
    text = (first.policies / "raising.yaml").read_text()
    if expected == 64:
        text = text.replace("memory: {times: 1, raise: {memory: 256MiB}}, ", "")
    (first.policies / "raising.yaml").write_text(text.replace("256MiB", most))
    second = daemon_factory(state=first.state, name="second", config=f"policies: [{first.policies}]\n")
    found = second.client().wait(id_, timeout=20)
    assert found.attempts == 2
    assert limit_in_force(found) == expected * 2**20


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


def test_times_of_a_cause_are_counted_over_daemons(daemon_factory: Callable[..., Daemon], lent: Path) -> None:
    """It is killed while the next attempt is waited for: what was tried is not tried once more."""
    first = daemon_factory()
    name, client = again(first, lent, times=2, backoff="3s..3s"), first.client()
    id_ = client.start(["sh", "-c", TRIES], policy=name, inputs={"in": "in\n"}).id
    until(lambda: client.get(id_).retried, "it waits for another attempt")
    first.stop(signal.SIGKILL)
    second = daemon_factory(state=first.state, name="second", config=f"policies: [{first.policies}]\n")
    found = second.client().wait(id_, timeout=30)
    assert (cause(found), found.attempts) == ("exited", 3)
    assert found.outcome is not None
    assert found.outcome.exit_code == 75
    assert [(each.number, each.exit_code) for each in found.retried] == [(1, 75), (2, 75)]
    assert found.stdout is not None
    assert found.stdout.text == "in\n" * 3


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
