"""Slots that wait, in a real daemon: each is used once, is what its receipt says, and goes when it should."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import POLICIES, slots_of, until, waited
from waiting import filled, processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import Invocation

POOL = "pool: {min: 2, max: 4}\n"


@pytest.fixture
def pooled(daemon_factory: Callable[..., Daemon]) -> Daemon:
    return daemon_factory(config=POOL)


def controls(call: Invocation) -> dict[str, tuple[str, str]]:
    """What a receipt says, but for what names the one slot."""
    assert call.receipt is not None, call.outcome
    assert all(control.enforced for control in call.receipt.controls)
    own = ("mount ", "user", "group", "parent", "processes")
    return {
        one.name: (one.asked, one.in_force)
        for one in call.receipt.controls
        if not one.name.startswith(own) and "namespace" not in one.name
    }


def test_a_warm_call_is_as_a_cold_one(pooled: Daemon) -> None:
    cold = pooled.run("sh", "-c", "id; pwd; umask", policy="tiny")
    filled(pooled)
    ready = pooled.run("sh", "-c", "id; pwd; umask", policy="tiny")
    assert not waited(cold)
    assert waited(ready)
    assert cold.stdout is not None
    assert ready.stdout is not None
    assert cold.stdout.text == ready.stdout.text
    assert controls(cold) == controls(ready)
    assert [one.name for one in cold.receipt.controls] == [one.name for one in ready.receipt.controls]  # type: ignore[union-attr]
    assert ready.receipt is not None
    assert ready.receipt.checked_at is not None
    assert ready.receipt.read_at <= ready.receipt.checked_at


def test_what_a_request_narrows_is_in_the_receipt_of_a_warm_call(pooled: Daemon) -> None:
    pooled.run("true", policy="tiny")
    filled(pooled)
    found = pooled.run("true", policy="tiny", limits={"memory": 2**25, "pids": 7, "cpus": 0.5})
    assert waited(found)
    assert found.receipt is not None
    said = {one.name: one.in_force for one in found.receipt.controls}
    assert (said["memory"], said["pids"], said["cpu"]) == (str(2**25), "7", "500")


def test_usage_counts_from_hand_over(pooled: Daemon) -> None:
    pooled.run("true", policy="tiny")
    filled(pooled)
    found = pooled.run("sh", "-c", "head -c 8000000 /dev/zero > /workspace/file", policy="tiny")
    assert waited(found)
    assert found.usage is not None
    assert 8_000_000 <= found.usage.memory_peak < 24_000_000
    again = pooled.run("true", policy="tiny")
    assert again.usage is not None
    assert again.usage.memory_peak < 6_000_000


LEAVE = """
touch /tmp/mine /dev/shm/mine /workspace/mine
sleep 100 &
"""
LOOK = "ls -A /tmp /dev/shm /workspace; set -- /proc/[0-9]*; echo $#; cat /proc/sys/kernel/hostname"


def test_no_call_meets_another_through_a_slot(pooled: Daemon) -> None:
    clean = pooled.run("sh", "-c", LOOK, policy="tiny")
    for _ in range(6):
        filled(pooled, number=1)
        pooled.run("sh", "-c", LEAVE, policy="tiny")
        seen = pooled.run("sh", "-c", LOOK, policy="tiny")
        assert seen.stdout is not None
        assert clean.stdout is not None
        assert seen.stdout.text == clean.stdout.text


def test_no_slot_is_used_twice(pooled: Daemon) -> None:
    with ThreadPoolExecutor(8) as threads:
        calls = list(threads.map(lambda _: pooled.run("true", policy="tiny"), range(64)))
    assert all(call.outcome is not None and call.outcome.exit_code == 0 for call in calls)
    parents = [one.in_force for call in calls for one in call.receipt.controls if one.name == "processes"]  # type: ignore[union-attr]
    assert len(set(parents)) == 64


@pytest.mark.parametrize("victim", ["init", "tool"])
def test_a_slot_that_was_killed_while_it_waited_is_not_used(pooled: Daemon, victim: str) -> None:
    pooled.run("true", policy="tiny")
    for pids in filled(pooled).values():
        os.kill(max(pids) if victim == "tool" else min(pids), signal.SIGKILL)
    found = pooled.run("echo", "ran", policy="tiny")
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, found.outcome
    assert found.stdout is not None
    assert found.stdout.text == "ran\n"
    filled(pooled)
    assert waited(pooled.run("true", policy="tiny"))


def test_a_slot_whose_limit_was_raised_by_hand_is_not_used(pooled: Daemon) -> None:
    pooled.run("true", policy="tiny")
    for slot in filled(pooled):
        for path, _, files in os.walk("/sys/fs/cgroup"):
            if path.endswith(slot) and "pids.max" in files:
                (Path(path) / "pids.max").write_text("4000")
    found = pooled.run("true", policy="tiny")
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, found.outcome
    assert found.receipt is not None
    assert {one.name: one.in_force for one in found.receipt.controls}["pids"] == "32"


def test_a_changed_policy_takes_its_slots_away(pooled: Daemon) -> None:
    pooled.run("true", policy="tiny")
    old = set(filled(pooled))
    text = POLICIES["tiny"].replace("pids: 32", "pids: 33")
    (pooled.policies / "tiny.yaml").write_text(text)
    until(lambda: not old & set(processes(pooled)), "the old slots are gone")
    found = pooled.run("true", policy="tiny")
    assert found.receipt is not None
    assert {one.name: one.in_force for one in found.receipt.controls}["pids"] == "33"


def test_slots_grow_old(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="pool: {min: 1, max: 1, age: 1s}\n")
    daemon.run("true", policy="tiny")
    filled(daemon, number=1)
    until(lambda: not slots_of(daemon), "a shape that nobody asks for keeps no slots")


def test_a_killed_daemon_leaves_a_pool_that_the_next_one_clears(
    daemon_factory: Callable[..., Daemon],
) -> None:
    first = daemon_factory(config=POOL)
    first.run("true", policy="tiny")
    old = filled(first)
    first.stop(signal.SIGKILL)
    second = daemon_factory(config=POOL, state=first.state, name="second")
    until(lambda: not set(old) & set(processes(second)), "nothing of it is left")
    until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pids in old.values() for pid in pids), "all ended"
    )
    assert second.run("echo", "served", policy="tiny").outcome is not None
    assert second.stop() == 0
    assert not slots_of(second)


def test_waiting_slots_give_way_to_calls(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="pool: {min: 2, max: 4}\nbudget: {memory: 300MiB, slots: 4}\n")
    daemon.run("true", policy="tiny")
    filled(daemon)
    with ThreadPoolExecutor(16) as threads:
        calls = list(threads.map(lambda _: daemon.run("sleep", "0.05", policy="tiny"), range(64)))
    assert {call.outcome.exit_code for call in calls if call.outcome is not None} == {0}
    assert daemon.stop() == 0
    assert not slots_of(daemon)
