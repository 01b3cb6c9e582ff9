"""The containers of a daemon whose tools are parked or run, as the kernel has them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from daemons import until

from sandboxd.engine.host import instance_name

if TYPE_CHECKING:
    from daemons import Daemon


def processes(daemon: Daemon) -> dict[str, set[int]]:
    """The cgroups of containers, whether they wait or run, and the processes in each."""
    tree = f"sandboxd-{instance_name(daemon.state)}"
    found: dict[str, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text, name = (entry / "cgroup").read_text(), (entry / "comm").read_text().strip()
            except OSError:
                continue
            if f"/{tree}/" in text and name != "sandboxd-launch":
                slot = text.partition(f"/{tree}/")[2].split()[0]
                found.setdefault(slot, set()).add(int(entry.name))
    return {slot: pids for slot, pids in found.items() if len(pids) == 2}


def filled(daemon: Daemon, policy: str = "tiny", number: int = 2) -> dict[str, set[int]]:
    """The slots that the daemon says wait for this policy, once that many do, and their processes."""

    def found() -> set[str]:
        return {
            slot.id
            for slot in daemon.client().slots()
            if slot.id and slot.state == "waiting" and slot.policy == policy
        }

    until(lambda: len(found()) >= number, "slots wait")
    there = processes(daemon)
    return {slot: there[slot] for slot in found() & there.keys()}


def held_memory(slot: str) -> int:
    """Bytes that a slot's cgroup holds; 0 when it is gone."""
    for path, _, files in os.walk("/sys/fs/cgroup"):
        for file in ("memory.usage_in_bytes", "memory.current"):
            if path.endswith(f"/{slot}") and file in files:
                try:
                    return int((Path(path) / file).read_text())
                except OSError:
                    return 0
    return 0


def metrics(daemon: Daemon) -> dict[str, float]:
    """What the daemon counts."""
    argv = ["curl", "-sf", "--unix-socket", str(daemon.socket), "http://sandboxd/metrics"]
    text = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}
