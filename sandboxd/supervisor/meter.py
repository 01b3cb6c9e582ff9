"""What the kernel counts of a call from hand-over on: the call's own share of its counters."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Literal

from sandboxd.models import Denial, Usage
from sandboxd.policy import seccomp
from sandboxd.supervisor.ending import Evidence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd.engine.base import Slot
    from sandboxd.models import NetworkUse

__all__ = ["Meter"]


class Meter:
    """Takes the counters when it is made; what reads the cgroup raises HostFailed."""

    def __init__(self, slot: Slot) -> None:
        """To be made when nothing but the hand-over is left to do."""
        self._slot = slot
        cgroup = slot.cgroup
        self._killed = self._denied = 0
        if slot.reading is not None and not slot.warm:  # nothing but our own code has waited there
            self._before = slot.reading.counted
            return
        cgroup.reset_peak()
        self._before = cgroup.usage()  # of the runtime and PID 1, which are not the call's
        if slot.warm or slot.shared:  # nor is what the interpreter met while it started, or another call
            self._killed, self._denied = cgroup.oom_kills(), cgroup.pids_denied()

    def cpu(self) -> int:
        """Microseconds of CPU."""
        return self._slot.cgroup.cpu_total() - self._before.cpu_total_us

    def oom_kills(self) -> int:
        """Processes that the kernel killed for memory."""
        return self._slot.cgroup.oom_kills() - self._killed

    def pids_denied(self) -> int:
        """Forks that failed at the pids limit."""
        return self._slot.cgroup.pids_denied() - self._denied

    def usage(self, *, wall: int, stdout: int, stderr: int, network: NetworkUse) -> Usage:
        """All that was used; what no cgroup counts is given."""
        used, before = self._slot.cgroup.usage(), self._before
        # of a warm slot the kernel's peak may be that of its start, and nothing takes it back
        peak_is_own = not (self._slot.warm or self._slot.shared) or used.pids_peak != before.pids_peak
        return Usage(
            wall=wall,
            cpu_user=used.cpu_user_us - before.cpu_user_us,
            cpu_system=used.cpu_system_us - before.cpu_system_us,
            memory_peak=used.memory_peak,
            pids_peak=used.pids_peak if peak_is_own else None,
            io_read=used.io_read - before.io_read,
            io_written=used.io_written - before.io_written,
            stdout=stdout,
            stderr=stderr,
            connections=network.connections,
            requests=network.requests,
            network_in=network.bytes_in,
            network_out=network.bytes_out,
        )

    def evidence(self, tmp: int, dropped: Mapping[Literal["stdout", "stderr"], int]) -> Evidence:
        """What says which limits were reached, when everything is dead; ``tmp`` is the open /tmp."""
        workspace, temporary = os.fstatvfs(self._slot.workspace_fd), os.fstatvfs(tmp)
        return Evidence(
            oom_kills=self.oom_kills(),
            pids_denied=self.pids_denied(),
            cpu_total=self.cpu(),
            stdout_dropped=dropped["stdout"],
            stderr_dropped=dropped["stderr"],
            workspace_full=workspace.f_bfree == 0,
            workspace_inodes_gone=workspace.f_ffree == 0,
            tmp_full=temporary.f_bfree == 0 or temporary.f_ffree == 0,
        )

    def denials(self) -> list[Denial]:
        """System calls that the call's filter denied."""
        found = []
        for one in self._slot.listener.counts():
            name, detail = seccomp.describe(one.arch, one.nr, one.args)
            code = errno.errorcode.get(one.errno, str(one.errno))
            found.append(Denial(kind="syscall", name=name, count=one.count, detail=detail, errno=code))
        return found
