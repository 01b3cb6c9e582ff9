"""Processes by descriptors of them, which are never those of a later process with the same number."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ended", "kill_if", "number_of"]


def number_of(pidfd: int) -> int:
    """Its process id, as this process's pid namespace numbers it. Raises ProcessLookupError when it is gone.

    Source: pidfd_open(2), proc_pid_fdinfo(5).
    """
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "Pid" and int(value) > 0:
            return int(value)
    raise ProcessLookupError(f"the process of descriptor {pidfd} is gone")


def ended(pidfd: int) -> bool:
    """Whether the process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def kill_if(pid: int, is_ours: Callable[[], bool]) -> None:
    """Kill a process, if ``is_ours`` still says so once no other can have its number."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if is_ours():
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)
