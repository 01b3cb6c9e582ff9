"""The files of one cgroup of the v2 hierarchy. Source: Documentation/admin-guide/cgroup-v2.rst."""

from __future__ import annotations

# ruff: noqa: PTH110  -- building a Path costs more than this call
import os

from sandboxd import errors
from sandboxd.kernel import cgroupfs
from sandboxd.kernel.cgroupfs import (
    CPU_PERIOD,
    READ_MAX,
    UNLIMITED,
    CgroupLimits,
    CgroupUsage,
    keyed,
    read,
    read_or_none,
)

__all__ = ["FilesV2", "parse_cpu_max", "parse_io_stat"]


def parse_cpu_max(text: str) -> str:
    """Thousandths of a CPU of ``cpu.max`` (``$MAX $PERIOD``), or ``max``."""
    quota, _, period = text.strip().partition(" ")
    return UNLIMITED if quota == UNLIMITED else cgroupfs.cpus_of_quota(int(quota), int(period or CPU_PERIOD))


def parse_io_stat(text: str) -> tuple[int, int]:
    """Bytes read and written over all devices of ``io.stat`` (nested keyed)."""
    totals = {"rbytes": 0, "wbytes": 0}
    for line in text.splitlines():
        for field in line.split()[1:]:
            key, _, value = field.partition("=")
            if key in totals and value.isdigit():
                totals[key] += int(value)
    return totals["rbytes"], totals["wbytes"]


class FilesV2:
    """One cgroup by its directory.

    ``memory.oom.group`` stays 0: PID 1 of a container is in the same cgroup, and the kernel then kills
    the tool (whose ``oom_score_adj`` is raised) but leaves PID 1 to report how the tool ended. PID 1
    ends what is left of the container by itself, so no half-killed group goes on.
    """

    def __init__(self, directory: str) -> None:
        self._dir = directory
        self.peak_fd: int | None = None

    def set(self, limits: CgroupLimits) -> None:
        """Write every limit; None lifts it."""
        memory = UNLIMITED if limits.memory is None else str(limits.memory)
        # Usage above the new value makes the kernel reclaim and, if that fails, kill: never EBUSY.
        cgroupfs.write_limit("memory", f"{self._dir}/memory.max", memory)
        swap = f"{self._dir}/memory.swap.max"
        if os.path.exists(swap):  # absent without swap accounting: see ``read_limits``
            cgroupfs.write_limit("memory", swap, UNLIMITED if limits.memory is None else "0")
        pids = UNLIMITED if limits.pids is None else str(limits.pids)
        cgroupfs.write_limit("pids", f"{self._dir}/pids.max", pids)
        quota = UNLIMITED if limits.cpus is None else str(limits.cpus * CPU_PERIOD // 1000)
        cgroupfs.write_limit("cpus", f"{self._dir}/cpu.max", f"{quota} {CPU_PERIOD}")
        for major, minor, read_bps, write_bps in limits.io:
            rates = f"rbps={read_bps or UNLIMITED} wbps={write_bps or UNLIMITED}"
            cgroupfs.write_limit("io", f"{self._dir}/io.max", f"{major}:{minor} {rates}")

    def read_limits(self) -> dict[str, tuple[str, str]]:
        """Memory, swap, pids, cpu and io as the kernel has them: (value, file)."""
        swap = read_or_none(f"{self._dir}/memory.swap.max")
        limits = {
            "memory": (read(f"{self._dir}/memory.max").strip(), f"{self._dir}/memory.max"),
            "swap": cgroupfs.swap_without_accounting()
            if swap is None
            else (swap.strip(), f"{self._dir}/memory.swap.max"),
            "pids": (read(f"{self._dir}/pids.max").strip(), f"{self._dir}/pids.max"),
            "cpu": (parse_cpu_max(read(f"{self._dir}/cpu.max")), f"{self._dir}/cpu.max"),
        }
        io = read_or_none(f"{self._dir}/io.max")
        if io is not None:
            limits["io"] = ("; ".join(sorted(_rates(line) for line in io.splitlines())) or UNLIMITED,
                            f"{self._dir}/io.max")  # fmt: skip
        return limits

    def usage(self) -> CgroupUsage:
        """All counters."""
        cpu = keyed(read(f"{self._dir}/cpu.stat"))
        pids_peak = read_or_none(f"{self._dir}/pids.peak")  # Linux 6.1
        io_read, io_written = parse_io_stat(read_or_none(f"{self._dir}/io.stat") or "")
        return CgroupUsage(
            cpu_user_us=cpu.get("user_usec", 0),
            cpu_system_us=cpu.get("system_usec", 0),
            cpu_total_us=cpu.get("usage_usec", 0),
            memory_peak=self._peak(),
            pids_peak=None if pids_peak is None else int(pids_peak),
            io_read=io_read,
            io_written=io_written,
        )

    def _peak(self) -> int:
        if self.peak_fd is not None:
            return int(os.pread(self.peak_fd, READ_MAX, 0))
        peak = read_or_none(f"{self._dir}/memory.peak")  # Linux 5.19
        return int(read(f"{self._dir}/memory.current") if peak is None else peak)

    def cpu_total(self) -> int:
        """Microseconds of CPU, in one read."""
        return keyed(read(f"{self._dir}/cpu.stat")).get("usage_usec", 0)

    def memory(self) -> int:
        """Bytes that it holds now, in one read."""
        return int(read(f"{self._dir}/memory.current"))

    def oom_kills(self) -> int:
        """Processes that the kernel killed for memory, in the cgroup or below it."""
        return keyed(read(f"{self._dir}/memory.events")).get("oom_kill", 0)

    def memory_limit_hits(self) -> int:
        """How often usage met the memory limit."""
        return keyed(read(f"{self._dir}/memory.events")).get("max", 0)

    def pids_denied(self) -> int:
        """Forks that failed at the pids limit; before Linux 6.12 also those at a limit above (``TasksMax=``).

        ``pids.events.local`` would say the same: nothing makes a cgroup below that of a slot.
        """
        return keyed(read(f"{self._dir}/pids.events")).get("max", 0)

    def reset_peak(self) -> bool:
        """Let the memory peak count from now.

        Since Linux 6.12 a write to ``memory.peak`` resets it *for reads through the same descriptor*,
        which is therefore kept until ``close``.
        """
        try:
            if self.peak_fd is None:
                fd = os.open(f"{self._dir}/memory.peak", os.O_RDWR | os.O_CLOEXEC)
                try:
                    os.write(fd, b"reset")
                except OSError:
                    os.close(fd)
                    raise
                self.peak_fd = fd
            else:
                os.pwrite(self.peak_fd, b"reset", 0)
        except OSError:  # EACCES or EINVAL before 6.12
            return False
        return True

    def thaw_and_unthrottle(self) -> None:
        """Thaw, and lift the CPU quota: a throttled task dies late."""
        self._write_if_there("cgroup.freeze", "0")
        self._write_if_there("cpu.max", UNLIMITED)

    def freeze(self) -> None:
        """Let no process run (Linux 5.2)."""
        cgroupfs.freeze(f"{self._dir}/cgroup.freeze", "1", "0", said=f"{self._dir}/cgroup.events")

    def thaw(self) -> None:
        """Let them run again."""
        self._write_if_there("cgroup.freeze", "0")

    def part(self, name: str) -> str:
        """The directory of a cgroup within. No controller is passed down to it: it limits nothing."""
        return f"{self._dir}/{name}"

    def forbid_forks(self) -> None:
        """Let no further process be made."""
        self._write_if_there("pids.max", "0")

    def kill_all(self) -> bool:
        """Kill every process of the cgroup and below it in one step (Linux 5.14)."""
        if not os.path.exists(f"{self._dir}/cgroup.kill"):
            return False
        self._write_if_there("cgroup.kill", "1")
        return True

    def close(self) -> None:
        """Let go of the descriptor that ``reset_peak`` keeps; safe twice."""
        if self.peak_fd is not None:
            fd, self.peak_fd = self.peak_fd, None
            os.close(fd)

    def _write_if_there(self, name: str, value: str) -> None:
        path = f"{self._dir}/{name}"
        try:
            cgroupfs.write(path, value)
        except OSError as error:
            if os.path.exists(path):
                message = f"cannot write {value!r} to {path}: {error.strerror}"
                raise errors.HostFailed(message, file=path) from error


def _rates(line: str) -> str:
    """A line of ``io.max`` without what is unlimited."""
    device, *fields = line.split()
    return " ".join([device, *(field for field in fields if not field.endswith("=max"))])
