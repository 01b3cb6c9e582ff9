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
from retried import EATER, NETWORK, began, cause, policy, written

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import Invocation

PATIENT = "retry: {failed: 2, backoff: 100ms..200ms}\n"
MEMORY = (
    "limits: {memory: 64MiB, workspace: {size: 16MiB}, tmp: {size: 16MiB}}\n"
    "retry: {memory: {times: 1, raise: {memory: 256MiB}}, backoff: 50ms..50ms}\n"
)


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
