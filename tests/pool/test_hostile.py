"""Slots whose interpreter does as it likes while it waits: it costs its own policy, and nobody else."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import PATIENCE, needs_containers, slots_of, start_daemon, until, waited
from waiting import filled, held_memory, metrics, processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

BUDGET = 160 * 2**20
LIMITS = """\
limits:
  wall: 5s
  memory: 96MiB
  workspace: {size: 16MiB, inodes: 1k}
  tmp: {size: 16MiB, inodes: 1k}
"""
MODULES = {
    "burns": "import threading\ndef burn():\n    while True: pass\n"
    "threading.Thread(target=burn, daemon=True).start()\n",
    "dies": "import os, threading\nthreading.Timer(0.2, lambda: os._exit(0)).start()\n",
    "grows": "import threading, time\nheld = []\ndef grow():\n"  # too slowly to be seen by its use of CPU
    "    for _ in range(160):\n        time.sleep(0.05)\n        held.append(b'x' * 500_000)\n"
    "threading.Thread(target=grow, daemon=True).start()\n",
    "slow": "import time\ntime.sleep(8)\n",
    "other": "import time\ntime.sleep(8)\n",
    "endless": "import time\ntime.sleep(3600)\n",
    "large": "held = b'x' * 20_000_000\n",
    "broken": "raise RuntimeError('no')\n",
}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    needs_containers()
    (tmp_path / "policies").mkdir()
    modules = tmp_path / "modules"
    modules.mkdir(mode=0o755)
    for name, text in MODULES.items():
        (modules / f"own_{name}.py").write_text(text)
        (tmp_path / "policies" / f"{name}.yaml").write_text(
            f"version: 1\nname: {name}\nextends: python\n{LIMITS}"
            f"mounts: [{{source: {modules}, target: /usr/local/lib/python3.11/dist-packages}}]\n"
            f"warm: {{command: python3, preload: [own_{name}]}}\n"
        )
    with start_daemon(tmp_path, config="pool: {min: 2, max: 2}\nbudget: {memory: 160MiB}\n") as running:
        yield running


def serves(daemon: Daemon, policy: str, **options: object) -> None:
    found = daemon.run("python3", "-c", "print(6 * 7)", policy=policy, **options)
    assert found.stdout is not None, found.outcome
    assert found.stdout.text == "42\n", found.outcome


def says(daemon: Daemon, text: str, seconds: float = 15) -> None:
    until(lambda: re.search(text, daemon.log.read_text()), f"the log says {text!r}", seconds)


def cpu(pids: set[int]) -> float:
    found = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(times.user + times.system for times in found)


def test_one_that_uses_cpu_is_taken_away(daemon: Daemon) -> None:
    serves(daemon, "burns")
    says(daemon, "a slot used CPU while it waited")

    def quiet() -> bool:
        pids = {pid for there in filled(daemon, "burns").values() for pid in there}
        try:
            before = cpu(pids)
            time.sleep(0.5)
            return cpu(pids) - before <= 0.02
        except psutil.NoSuchProcess:
            return False

    until(quiet, "those that wait are quiet")
    serves(daemon, "burns")


def test_slots_that_die_are_not_made_again_and_again(daemon: Daemon) -> None:
    serves(daemon, "dies")
    says(daemon, "a slot died while it waited")
    time.sleep(6)
    assert metrics(daemon)["sandboxd_slots_made_total"] <= 8
    filled(daemon, "dies")
    serves(daemon, "dies")


def test_slots_that_grow_stay_within_the_budget(daemon: Daemon) -> None:
    serves(daemon, "grows")
    filled(daemon, "grows")
    says(daemon, "a slot (grew|used CPU) while it waited", seconds=30)
    for _ in range(10):
        time.sleep(0.3)
        slots = [slot.id for slot in daemon.client().slots() if slot.id and slot.state == "waiting"]
        assert sum(held_memory(slot) for slot in slots) <= BUDGET
    serves(daemon, "grows")


def test_slow_imports_keep_nobody_else_from_slots(daemon: Daemon) -> None:
    for policy in ("slow", "other"):
        serves(daemon, policy)
    until(lambda: [slot.state for slot in daemon.client().slots()] == ["creating"] * 2, "both import")
    began = time.monotonic()
    daemon.run("true", policy="tiny")
    filled(daemon, "tiny")
    assert time.monotonic() - began < 5 * PATIENCE
    assert [slot.policy for slot in daemon.client().slots() if slot.state == "creating"] == ["slow", "other"]


def test_a_stop_does_not_wait_for_an_import(daemon: Daemon) -> None:
    serves(daemon, "endless")
    until(lambda: "creating" in [slot.state for slot in daemon.client().slots()], "it imports")
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 5 * PATIENCE
    assert not slots_of(daemon)


def test_a_call_with_little_memory_leaves_the_slots_alone(daemon: Daemon) -> None:
    serves(daemon, "large")
    slots = filled(daemon, "large")
    found = daemon.run("true", policy="large", limits={"memory": "16MiB"})
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, found.outcome
    assert not waited(found)
    assert set(filled(daemon, "large")) == set(slots)


def test_an_interpreter_that_is_not_ready_does_not_wait(daemon: Daemon) -> None:
    serves(daemon, "broken")
    slots = filled(daemon, "broken")
    for pids in slots.values():
        for pid in pids:
            assert b"python" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    serves(daemon, "broken")


def test_a_replaced_host_path_is_the_new_one(daemon: Daemon, tmp_path: Path) -> None:
    lent = tmp_path / "lent"
    lent.mkdir()
    (lent / "file").write_text("old")
    (daemon.policies / "lent.yaml").write_text(
        f"version: 1\nname: lent\nextends: tiny\nmounts: [{{source: {lent}, target: /data}}]\n"
    )
    until(lambda: "lent" in {one.name for one in daemon.client().policies()}, "the policy is there")

    def read() -> tuple[str | None, bool]:
        found = daemon.run("cat", "/data/file", policy="lent")
        assert found.stdout is not None, found.outcome
        return found.stdout.text, waited(found)

    assert read() == ("old", False)
    slots = filled(daemon, "lent")
    assert read() == ("old", True)
    filled(daemon, "lent")
    lent.rename(tmp_path / "before")
    lent.mkdir()
    (lent / "file").write_text("new")
    assert read() == ("new", False)
    until(lambda: not slots.keys() & processes(daemon).keys(), "the old ones are gone")
    filled(daemon, "lent")
    assert read() == ("new", True)
