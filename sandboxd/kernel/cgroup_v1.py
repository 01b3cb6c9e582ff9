"""The files of one cgroup in the v1 hierarchies. Source: Documentation/admin-guide/cgroup-v1/."""

from __future__ import annotations

# ruff: noqa: PTH110  -- building a Path costs more than this call
import os
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.kernel import cgroupfs
from sandboxd.kernel.cgroupfs import CPU_PERIOD, UNLIMITED, CgroupLimits, CgroupUsage, read, read_or_none

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FilesV1", "socket_limit"]

NANO_PER_MICRO = 1000
NO_LIMIT = 1 << 62  # memory files say 2**63 rounded down to pages when there is no limit
SOCKET_SHARE = 8
MIN_SOCKETS = 1 << 20


def socket_limit(memory: int) -> int:
    """Bytes of internet sockets' buffers that a cgroup with this much memory may have beside it.

    v1 counts them apart from all other memory, and without a limit of their own not at all: 64 MiB of
    container could hold gigabytes in connections to itself, up to the host's ``net.ipv4.tcp_mem``. v2
    counts them as memory.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    return max(memory // SOCKET_SHARE, MIN_SOCKETS) // page * page


class FilesV1:
    """One cgroup by its directory in each controller's hierarchy."""

    def __init__(self, directories: Mapping[str, str]) -> None:
        self.peak_fd: int | None = None  # v1 keeps nothing open
        absent = "/nonexistent"  # a leftover may lack a hierarchy; reading then says so
        self._memory = directories.get("memory", absent)
        self._pids = directories.get("pids", absent)
        self._cpu = directories.get("cpu", absent)
        self._cpuacct = directories.get("cpuacct", absent)
        self._blkio = directories.get("blkio")
        self._freezer = directories.get("freezer")

    def set(self, limits: CgroupLimits) -> None:
        """Write every limit; None lifts it."""
        self._set_memory(limits.memory)
        self._set_sockets(limits.memory)
        pids = UNLIMITED if limits.pids is None else str(limits.pids)
        cgroupfs.write_limit("pids", f"{self._pids}/pids.max", pids)
        quota = -1 if limits.cpus is None else limits.cpus * CPU_PERIOD // 1000
        if read(f"{self._cpu}/cpu.cfs_period_us").strip() != str(CPU_PERIOD):
            cgroupfs.write_limit("cpus", f"{self._cpu}/cpu.cfs_period_us", str(CPU_PERIOD))
        cgroupfs.write_limit("cpus", f"{self._cpu}/cpu.cfs_quota_us", str(quota))
        for major, minor, read_bps, write_bps in limits.io:
            if self._blkio is None:
                raise errors.ControlNotEnforced("no blkio hierarchy is mounted", control="io")
            for way, rate in (("read", read_bps), ("write", write_bps)):
                path = f"{self._blkio}/blkio.throttle.{way}_bps_device"
                cgroupfs.write_limit("io", path, f"{major}:{minor} {rate or 0}")  # 0 lifts it

    def _set_memory(self, limit: int | None) -> None:
        """Memory, and memory with swap, to the same value: so no page of the cgroup goes to swap."""
        value = "-1" if limit is None else str(limit)
        plain, with_swap = (
            f"{self._memory}/memory.limit_in_bytes",
            f"{self._memory}/memory.memsw.limit_in_bytes",
        )
        counted = read_or_none(with_swap)
        if counted is None:  # no swap accounting: see ``read_limits``
            cgroupfs.write_limit("memory", plain, value)
            return
        # The kernel keeps memory <= memsw at all times, so the order depends on the direction.
        raising = limit is None or limit > int(counted)
        for path in (with_swap, plain) if raising else (plain, with_swap):
            cgroupfs.write_limit("memory", path, value)

    def _set_sockets(self, memory: int | None) -> None:
        path = f"{self._memory}/memory.kmem.tcp.limit_in_bytes"
        if memory is not None:
            cgroupfs.write_limit("sockets", path, str(socket_limit(memory)))
        elif int(read_or_none(path) or NO_LIMIT) < NO_LIMIT:
            cgroupfs.write_limit("sockets", path, "-1")

    def read_limits(self) -> dict[str, tuple[str, str]]:
        """Memory, swap, sockets, pids, cpu and io as the kernel has them: (value, file)."""
        memory_file, swap_file = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
        memory = int(read(f"{self._memory}/{memory_file}"))
        with_swap = read_or_none(f"{self._memory}/{swap_file}")
        if with_swap is None:
            swap = cgroupfs.swap_without_accounting()
        elif int(with_swap) >= NO_LIMIT:
            swap = (UNLIMITED, f"{self._memory}/{swap_file}")
        else:
            swap = (str(max(0, int(with_swap) - memory)), f"{self._memory}/{swap_file}")
        sockets_file = f"{self._memory}/memory.kmem.tcp.limit_in_bytes"
        sockets = int(read(sockets_file))
        quota = int(read(f"{self._cpu}/cpu.cfs_quota_us"))
        period = int(read(f"{self._cpu}/cpu.cfs_period_us"))
        limits = {
            "memory": (UNLIMITED if memory >= NO_LIMIT else str(memory), f"{self._memory}/{memory_file}"),
            "swap": swap,
            "sockets": (UNLIMITED if sockets >= NO_LIMIT else str(sockets), sockets_file),
            "pids": (read(f"{self._pids}/pids.max").strip(), f"{self._pids}/pids.max"),
            "cpu": (cgroupfs.cpus_of_quota(quota, period), f"{self._cpu}/cpu.cfs_quota_us"),
        }
        if self._blkio is not None:
            limits["io"] = self._read_io(self._blkio)
        return limits

    def _read_io(self, directory: str) -> tuple[str, str]:
        devices: dict[str, list[str]] = {}
        for way, key in (("read", "rbps"), ("write", "wbps")):
            for line in read(f"{directory}/blkio.throttle.{way}_bps_device").splitlines():
                device, _, rate = line.partition(" ")
                devices.setdefault(device, []).append(f"{key}={rate.strip()}")
        text = "; ".join(f"{device} {' '.join(rates)}" for device, rates in sorted(devices.items()))
        return text or UNLIMITED, f"{directory}/blkio.throttle.{{read,write}}_bps_device"

    def usage(self) -> CgroupUsage:
        """All counters."""
        pids_peak = read_or_none(f"{self._pids}/pids.peak")
        io_read, io_written = self._io()
        return CgroupUsage(
            cpu_user_us=int(read(f"{self._cpuacct}/cpuacct.usage_user")) // NANO_PER_MICRO,
            cpu_system_us=int(read(f"{self._cpuacct}/cpuacct.usage_sys")) // NANO_PER_MICRO,
            cpu_total_us=self.cpu_total(),  # not their sum: those two are told apart by ticks
            memory_peak=int(read(f"{self._memory}/memory.max_usage_in_bytes")),
            pids_peak=None if pids_peak is None else int(pids_peak),
            io_read=io_read,
            io_written=io_written,
        )

    def _io(self) -> tuple[int, int]:
        if self._blkio is None:
            return 0, 0
        totals = {"Read": 0, "Write": 0}
        for line in read(f"{self._blkio}/blkio.throttle.io_service_bytes").splitlines():
            fields = line.split()  # "254:0 Read 4096"; the last line is "Total 4096"
            if len(fields) == 3 and fields[1] in totals:
                totals[fields[1]] += int(fields[2])
        return totals["Read"], totals["Write"]

    def cpu_total(self) -> int:
        """Microseconds of CPU, in one read."""
        return int(read(f"{self._cpuacct}/cpuacct.usage")) // NANO_PER_MICRO

    def memory(self) -> int:
        """Bytes that it holds now, in one read."""
        return int(read(f"{self._memory}/memory.usage_in_bytes"))

    def oom_kills(self) -> int:
        """Processes that the kernel killed for memory (counted since Linux 4.13)."""
        return cgroupfs.keyed(read(f"{self._memory}/memory.oom_control")).get("oom_kill", 0)

    def memory_limit_hits(self) -> int:
        """How often usage met the memory limit."""
        # With both limits equal, a charge fails at memory+swap first and then is not tried at memory;
        # Linux 6.18 was seen not to count that (memsw.failcnt stays 0), but an OOM kill is a hit too.
        with_swap = read_or_none(f"{self._memory}/memory.memsw.failcnt")
        return max(self.oom_kills(), int(read(f"{self._memory}/memory.failcnt")) + int(with_swap or 0))

    def pids_denied(self) -> int:
        """Forks that failed at the pids limit."""
        return cgroupfs.keyed(read(f"{self._pids}/pids.events")).get("max", 0)

    def reset_peak(self) -> bool:
        """Let the memory peak count from now."""
        try:
            cgroupfs.write(f"{self._memory}/memory.max_usage_in_bytes", "0")
        except OSError:
            return False
        return True

    def thaw_and_unthrottle(self) -> None:
        """Thaw, and lift the CPU quota: a frozen task does not die, a throttled one dies late."""
        if self._freezer is not None:
            _write_if_there(f"{self._freezer}/freezer.state", "THAWED")
        _write_if_there(f"{self._cpu}/cpu.cfs_quota_us", "-1")

    def freeze(self) -> None:
        """Let no process run."""
        cgroupfs.freeze(f"{self._freezer_of()}/freezer.state", "FROZEN", "THAWED")

    def thaw(self) -> None:
        """Let them run again."""
        _write_if_there(f"{self._freezer_of()}/freezer.state", "THAWED")

    def part(self, name: str) -> str:
        """The directory of a cgroup within: of the freezer, by which its processes can be stopped at once."""
        return f"{self._freezer_of()}/{name}"

    def _freezer_of(self) -> str:
        if self._freezer is None:
            raise errors.ControlNotEnforced(
                "no freezer hierarchy is mounted, without which no container can be kept over several calls",
                control="isolation",
            )
        return self._freezer

    def forbid_forks(self) -> None:
        """Let no further process be made."""
        _write_if_there(f"{self._pids}/pids.max", "0")

    def kill_all(self) -> bool:
        """v1 has no file for it."""
        return False

    def close(self) -> None:
        """Nothing is held."""


def _write_if_there(path: str, value: str) -> None:
    try:
        cgroupfs.write(path, value)
    except OSError as error:
        if os.path.exists(path):
            raise errors.HostFailed(
                f"cannot write {value!r} to {path}: {error.strerror}", file=path
            ) from error
