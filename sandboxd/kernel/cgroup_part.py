"""A cgroup within a slot's that limits nothing: it tells the processes of one call from those of others.

Whatever the call's command forks stays in it, wherever it goes and whoever becomes its parent; nothing in a
container can write to the hierarchy. On v1 it is in the freezer's alone.
"""

from __future__ import annotations

# ruff: noqa: PTH102, PTH110  -- building a Path costs more than these calls
import os
import time
from functools import partial

from sandboxd import errors
from sandboxd.kernel import cgroupfs, pidfd

__all__ = ["Part"]

KILL_SECONDS = 10.0  # the others' CPU quota stays, so a large tree takes its time
POLL_SECONDS = 0.002


class Part:
    """One such cgroup. Methods block, and raise HostFailed."""

    def __init__(self, directory: str) -> None:
        """Make it."""
        self._directory = directory
        try:
            os.mkdir(directory)
        except OSError as error:
            raise errors.HostFailed(f"cannot make cgroup {directory}: {error.strerror}") from error

    def join(self, pid: int) -> None:
        """Put a process in. On v1 that waits for a grace period of the kernel."""
        path = f"{self._directory}/cgroup.procs"
        try:
            cgroupfs.write(path, str(pid))
        except OSError as error:
            raise errors.HostFailed(f"{path}: {error.strerror}", file=path) from error

    def processes(self) -> list[int]:
        """Who is in it, as this daemon's pid namespace numbers them; zombies are not."""
        text = cgroupfs.read_or_none(f"{self._directory}/cgroup.procs") or ""
        return sorted(int(line) for line in text.split() if line != "0")

    def kill(self) -> None:
        """End every process in it, however fast it forks, and return when none is left."""
        until = time.monotonic() + KILL_SECONDS
        while pids := self.processes():
            if time.monotonic() > until:
                raise errors.HostFailed(f"processes of {self._directory} do not die", processes=pids[:16])
            self._kill_once(pids)
            time.sleep(POLL_SECONDS)

    def _kill_once(self, pids: list[int]) -> None:
        at_once = f"{self._directory}/cgroup.kill"
        if os.path.exists(at_once):  # v2, Linux 5.14
            self._write(at_once, "1")
            return
        state = f"{self._directory}/freezer.state"
        if os.path.exists(state):  # none can fork between the list and the signals
            cgroupfs.freeze(state, "FROZEN", "THAWED")
            pids = self.processes()
        try:
            for pid in pids:
                pidfd.kill_if(pid, partial(self._has, pid))
        finally:
            if os.path.exists(state):
                self._write(state, "THAWED")

    def _has(self, pid: int) -> bool:
        return pid in self.processes()

    def remove(self) -> bool:
        """Take it away, if nobody is in it; whether it is gone."""
        return cgroupfs.remove_tree(self._directory)

    @staticmethod
    def _write(path: str, value: str) -> None:
        try:
            cgroupfs.write(path, value)
        except OSError as error:
            raise errors.HostFailed(f"cannot write to {path}: {error.strerror}", file=path) from error
