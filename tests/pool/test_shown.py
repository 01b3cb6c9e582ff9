"""What an operator sees of the slots, and what nobody else does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from daemons import until
from waiting import metrics, processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

SANDBOXD = Path(sys.executable).with_name("sandboxd")


def ps(daemon: Daemon, *options: str) -> str:
    argv = [str(SANDBOXD), "ps", "--slots", "--socket", str(daemon.socket), *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_metrics(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="pool: {min: 1, max: 1}\n")
    before = metrics(daemon)
    assert before['sandboxd_hand_overs_total{kind="cold"}'] == 0
    daemon.run("true", policy="tiny")
    name = 'sandboxd_slots{policy="tiny",state="waiting"}'
    until(lambda: metrics(daemon).get(name) == 1, "one waits")
    daemon.run("sleep", "20", policy="tiny", limits={"wall": "200ms"})
    until(lambda: metrics(daemon).get(name) == 1, "another waits")
    found = metrics(daemon)
    assert found['sandboxd_hand_overs_total{kind="cold"}'] == 1
    assert found['sandboxd_hand_overs_total{kind="warm"}'] == 1
    assert found['sandboxd_pool_slots_taken_total{fate="used"}'] == 1
    assert found["sandboxd_slots_made_total"] == 3
    assert found['sandboxd_calls_total{cause="exited"}'] == 1
    assert found['sandboxd_calls_total{cause="wall_time"}'] == 1
    assert found['sandboxd_calls_total{cause="denied"}'] == 0
    assert found["sandboxd_memory_budget_bytes"] > 0


def test_a_slot_that_was_killed_is_counted(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="pool: {min: 1, max: 1}\n")
    daemon.run("true", policy="tiny")
    until(lambda: [slot.state for slot in daemon.client().slots()] == ["waiting"], "one waits")
    [dead] = daemon.client().slots()
    os.kill(min(processes(daemon)[dead.id or ""]), signal.SIGKILL)
    died = 'sandboxd_pool_slots_taken_total{fate="died"}'
    until(lambda: metrics(daemon)[died] == 1, "it is counted")
    until(lambda: dead.id not in {slot.id for slot in daemon.client().slots()}, "it is destroyed")


def test_slots_are_shown_through_their_lives(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="pool: {min: 1, max: 1}\n")
    client = daemon.client()
    assert list(client.slots()) == []
    first = client.start(["sleep", "30"], policy="tiny")
    until(lambda: {slot.state for slot in client.slots()} == {"waiting", "running"}, "one of each")
    waits, runs = sorted(client.slots(), key=lambda slot: slot.state, reverse=True)
    assert (waits.policy, waits.image, waits.warm) == ("tiny", "base", True)
    assert (runs.policy, runs.image, runs.warm) == ("tiny", "base", False)
    assert waits.shape == runs.shape
    assert waits.since > runs.since
    assert {slot["id"] for slot in json.loads(ps(daemon, "--json"))["slots"]} == {waits.id, runs.id}
    assert json.loads(ps(daemon, "--json", "--policy", "default")) == {"slots": []}
    table = ps(daemon)
    assert "waiting" in table
    assert "running" in table
    client.cancel(first.id)
    second = client.start(["sleep", "30"], policy="tiny")
    until(lambda: next(slot for slot in client.slots() if slot.id == waits.id).state == "running", "it runs")
    client.cancel(second.id)
    until(lambda: waits.id not in {slot.id for slot in client.slots()}, "it was used once")
