"""Adopted processes: what a runtime leaves behind becomes the daemon's child, and is reaped here.

A process that double-forked hands its orphan to the nearest subreaper above (prctl(2),
``PR_SET_CHILD_SUBREAPER``): PID 1 of each container comes to the daemon in this way, and so does every
helper that a runtime did not wait for, which would stay in the process table for ever. Orphans come to
the first thread of the process, while ``subprocess`` forks from worker threads and waits by itself, so
that waiting for the children of the first thread alone takes nothing away from it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from contextlib import suppress

from sandboxd import errors

__all__ = ["adopt_orphans", "end_process", "reap", "reap_orphans"]

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
WNOTHREAD = 0x20000000  # __WNOTHREAD: children of the calling thread only, waitpid(2)


def adopt_orphans() -> None:
    """Become the parent of every orphan below this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans() -> int:
    """Reap the orphans that have ended; returns how many. Does not block; for the main thread alone."""
    reaped = 0
    if threading.current_thread() is not threading.main_thread():
        return reaped
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG | WNOTHREAD)
        except ChildProcessError:
            return reaped
        if pid == 0:
            return reaped
        reaped += 1


def reap(pidfd: int) -> None:
    """Take a process that has ended from the process table; nothing happens if it is not ours, or was."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def end_process(pidfd: int, timeout: float) -> None:
    """Kill a process, wait for its end, reap it, and close the descriptor. Blocks. Raises HostFailed."""
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        if not ended.poll(timeout * 1000):
            raise errors.HostFailed(f"a process did not die within {timeout:.0f} s of being killed")
        reap(pidfd)
    finally:
        os.close(pidfd)
