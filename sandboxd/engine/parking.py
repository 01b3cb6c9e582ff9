"""What every engine finds out of a container that is up: its parked process, the disk that is throttled."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from sandboxd.kernel.cgroup import Cgroup

__all__ = ["parked_process", "whole_disk"]

RUNTIME_GONE = 1.0  # seconds until the runtime's own processes have left the cgroup, after its end


def parked_process(cgroup: Cgroup, init_pid: int) -> int:
    """The parked process: what is in the cgroup beside PID 1, once what the runtime forked has left.

    Blocks. Raises ControlNotEnforced where others are there.
    """
    until = time.monotonic() + RUNTIME_GONE
    while len(tools := [pid for pid in cgroup.processes() if pid != init_pid]) != 1:
        if time.monotonic() > until:
            raise errors.ControlNotEnforced(
                f"the cgroup holds {len(tools)} processes beside PID 1, not the parked one alone",
                control="cgroup",
            )
        time.sleep(0.0005)
    return tools[0]


def whole_disk(path: Path) -> tuple[int, int] | None:
    """The disk that a path is on, not its partition: the kernel throttles disks. None for no block device.

    Raises OSError.
    """
    device = path.stat().st_dev
    major, minor = os.major(device), os.minor(device)
    at = Path(f"/sys/dev/block/{major}:{minor}")
    if not at.exists():
        return None
    if (at / "partition").exists():
        disk = (at.resolve().parent / "dev").read_text().strip().split(":")
        return int(disk[0]), int(disk[1])
    return major, minor
