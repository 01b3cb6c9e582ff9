"""Where this host's cgroup hierarchies are, and single reads and writes of their files.

Theory of operation. ``/proc/self/mountinfo`` says which hierarchies are mounted and which subtree of
each is visible; ``/proc/self/cgroup`` says where this process is in each. Both together give the
directory of our own cgroup, also in a container (with or without a cgroup namespace). A host is v2
when the cgroup2 mount offers the controllers that no limit can do without, else v1 when those are
mounted as hierarchies; on a hybrid host a controller is in one of them only, so the test decides.

A cgroup file takes one write(2) with the whole value and gives it in one read(2), lists of processes aside.

Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst, Documentation/admin-guide/cgroup-v1/.
"""

from __future__ import annotations

# ruff: noqa: PTH106, PTH116  -- building a Path costs more than these calls
import contextlib
import errno
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CgroupLimits",
    "CgroupUsage",
    "Hierarchy",
    "Host",
    "Interface",
    "cpus_of_quota",
    "detect",
    "freeze",
    "keyed",
    "named",
    "parse_mountinfo",
    "parse_self_cgroup",
    "read",
    "read_or_none",
    "remove_tree",
    "subtree",
    "swap_without_accounting",
    "write",
    "write_limit",
]

READ_MAX = 32 * 1024
SHORT = 2048  # bytes of an answer after which there is no more: the kernel gives a long list by pages
SEARCH_DEPTH = 10
FREEZE_SECONDS = 5.0
CPU_PERIOD = 100_000  # microseconds: the kernel's default for cpu.max and cpu.cfs_period_us
UNLIMITED = "max"
REQUIRED_V1 = ("memory", "pids", "cpu", "cpuacct")
OPTIONAL_V1 = ("blkio", "freezer")
REQUIRED_V2 = ("memory", "pids", "cpu")
OPTIONAL_V2 = ("io",)


@dataclass(frozen=True)
class CgroupLimits:
    """What a cgroup may use. None: no limit.

    ``memory`` is in bytes and counts swap too; ``pids`` counts processes and threads; ``cpus`` is in
    thousandths of a CPU; ``io`` holds (major, minor, bytes read per second, bytes written per second).
    """

    memory: int | None
    pids: int | None
    cpus: int | None
    io: tuple[tuple[int, int, int | None, int | None], ...] = ()


@dataclass(frozen=True)
class CgroupUsage:
    """What a cgroup has used: microseconds and bytes. ``pids_peak`` is None where nobody counts it."""

    cpu_user_us: int
    cpu_system_us: int
    cpu_total_us: int
    memory_peak: int
    pids_peak: int | None
    io_read: int
    io_written: int


class Interface(Protocol):
    """The files of one cgroup in one version of the kernel's interface.

    Every method raises ``HostFailed`` when the cgroup is gone, and those that write a limit
    ``ControlNotEnforced`` with ``details["control"]`` when the kernel does not take the value.
    """

    peak_fd: int | None
    """A descriptor that the peak is read from, until ``close``; None where it is read from its file."""

    def set(self, limits: CgroupLimits) -> None:
        """Write every limit; None lifts it."""
        ...

    def read_limits(self) -> dict[str, tuple[str, str]]:
        """Memory, swap, pids, cpu and io as the kernel has them: (value, file)."""
        ...

    def usage(self) -> CgroupUsage:
        """All counters."""
        ...

    def cpu_total(self) -> int:
        """Microseconds of CPU, in one read."""
        ...

    def memory(self) -> int:
        """Bytes that it holds now, in one read."""
        ...

    def oom_kills(self) -> int:
        """Processes that the kernel killed for memory."""
        ...

    def memory_limit_hits(self) -> int:
        """How often usage met the memory limit."""
        ...

    def pids_denied(self) -> int:
        """Forks that failed at the pids limit."""
        ...

    def reset_peak(self) -> bool:
        """Let the memory peak count from now; False where this kernel cannot."""
        ...

    def thaw_and_unthrottle(self) -> None:
        """Let every process run, so that a kill is acted on at once."""
        ...

    def freeze(self) -> None:
        """Let no process run, until ``thaw``. Returns when none does; raises HostFailed where one goes on."""
        ...

    def thaw(self) -> None:
        """Let them run again."""
        ...

    def part(self, name: str) -> str:
        """The directory of a cgroup within, which only tells processes apart. Raises HostFailed."""
        ...

    def forbid_forks(self) -> None:
        """Let no further process be made."""
        ...

    def kill_all(self) -> bool:
        """Kill every process in one step; False where the kernel has no such file."""
        ...

    def close(self) -> None:
        """Let go of descriptors; safe twice."""
        ...


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup hierarchy. ``controllers`` of a named v1 hierarchy is ``{"name=…"}``."""

    version: Literal[1, 2]
    controllers: frozenset[str]
    mount: str
    root: str
    """The cgroup that is visible at ``mount``, as ``/proc/PID/cgroup`` would name it."""
    own: str
    """This process's cgroup, as ``/proc/self/cgroup`` names it."""
    writable: bool

    def path_of(self, cgroup: str) -> str:
        """The directory of a cgroup that ``/proc/PID/cgroup`` names; the mount point if not visible."""
        root = self.root.rstrip("/")
        if cgroup != root and not cgroup.startswith(root + "/"):
            return self.mount
        below = cgroup[len(root) :].strip("/")
        return f"{self.mount}/{below}" if below and ".." not in below.split("/") else self.mount

    def name_of(self, path: str) -> str:
        """The inverse of ``path_of``."""
        below = path[len(self.mount) :].strip("/")
        return f"{self.root.rstrip('/')}/{below}" if below else self.root


@dataclass(frozen=True)
class Host:
    """The hierarchies of this host and the version whose files we use."""

    version: Literal[1, 2]
    controllers: frozenset[str]
    used: tuple[Hierarchy, ...]
    """Those that a cgroup of ours is made in."""
    mounted: tuple[Hierarchy, ...]
    """All of them: an OCI runtime may have made directories in any."""


def read(path: str) -> str:
    """The content of a cgroup file. Raises HostFailed, also when the cgroup is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = piece = os.read(fd, READ_MAX)
            while len(piece) > SHORT:
                data += (piece := os.read(fd, READ_MAX))
        finally:
            os.close(fd)
    except OSError as error:
        raise errors.HostFailed(f"cannot read {path}: {error.strerror}", file=path) from error
    return data.decode("ascii", "replace")


def read_or_none(path: str) -> str | None:
    """The content of a cgroup file that this kernel may not have."""
    try:
        return read(path)
    except errors.HostFailed:
        return None


def write(path: str, value: str) -> None:
    """Replace a cgroup file's value by one system call. Raises OSError: its caller knows what it means."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def freeze(path: str, frozen: str, thawed: str, *, said: str | None = None) -> None:
    """Freeze a cgroup by writing ``frozen`` to a file, and wait until every process has stopped.

    ``said`` is the file that says so by ``frozen 1``, where it is another. Raises HostFailed, thawed.
    """
    until = time.monotonic() + FREEZE_SECONDS
    try:
        while True:
            write(path, frozen)  # v1 tries again what was about to be frozen and was not
            now = read(path).strip() == frozen if said is None else keyed(read(said)).get("frozen") == 1
            if now:
                return
            if time.monotonic() > until:
                raise errors.HostFailed(f"the processes of {path} do not stop", file=path)
            time.sleep(0.001)
    except BaseException as error:
        with contextlib.suppress(OSError):
            write(path, thawed)
        if isinstance(error, OSError):
            raise errors.HostFailed(f"cannot freeze {path}: {error.strerror}", file=path) from error
        raise


def write_limit(control: str, path: str, value: str) -> None:
    """Write a limit. Raises ControlNotEnforced with the control's name when it is not taken."""
    try:
        write(path, value)
    except OSError as error:
        raise errors.ControlNotEnforced(
            f"cannot write {value!r} to {path}: {error.strerror}",
            control=control,
            file=path,
            asked=value,
            errno=errno.errorcode.get(error.errno or 0, ""),
        ) from error


def keyed(text: str) -> dict[str, int]:
    """A flat keyed file, such as ``cpu.stat`` or ``memory.events``; lines of other forms are left out."""
    values = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.strip().isdigit():
            values[key] = int(value)
    return values


def cpus_of_quota(quota: int, period: int) -> str:
    """Thousandths of a CPU of a quota; ``max`` for none (a negative quota)."""
    return UNLIMITED if quota < 0 or period <= 0 else str(quota * 1000 // period)


def swap_without_accounting() -> tuple[str, str]:
    """What a receipt says where the kernel does not count swap: nothing to limit if there is none."""
    swaps = read_or_none("/proc/swaps") or ""
    return ("0" if len(swaps.splitlines()) <= 1 else "not limited by this kernel", "/proc/swaps")


def _unescape(field: str) -> str:
    """Undo the octal escapes of proc_pid_mountinfo(5)."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field


def parse_mountinfo(text: str) -> list[tuple[Literal[1, 2], str, str, bool, frozenset[str]]]:
    """The cgroup mounts of a mountinfo file: (version, root, mount point, writable, super options).

    A mount point that a later mount covers is listed too; ``detect`` takes the first that is writable.
    """
    found: list[tuple[Literal[1, 2], str, str, bool, frozenset[str]]] = []
    for line in text.splitlines():
        head, separator, tail = line.partition(" - ")
        fields, kind = head.split(" "), tail.split(" ")
        if not separator or len(fields) < 6 or len(kind) < 3 or kind[0] not in {"cgroup", "cgroup2"}:
            continue
        writable = "rw" in fields[5].split(",") and "rw" in kind[2].split(",")
        version: Literal[1, 2] = 2 if kind[0] == "cgroup2" else 1
        options = frozenset(kind[2].split(","))
        found.append((version, _unescape(fields[3]), _unescape(fields[4]), writable, options))
    return found


def parse_self_cgroup(text: str) -> dict[str, str]:
    """The lines of /proc/PID/cgroup: controller, or ``name=…``, or ``""`` for v2, to the cgroup."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        names, separator, path = rest.partition(":")
        if not number.isdigit() or not separator:
            continue
        for name in names.split(","):
            found[name] = path.removesuffix(" (deleted)")
    return found


def _hierarchies(mountinfo: str, self_cgroup: str) -> tuple[Hierarchy, ...]:
    own = parse_self_cgroup(self_cgroup)
    best: dict[frozenset[str], Hierarchy] = {}
    for version, root, mount, writable, options in parse_mountinfo(mountinfo):
        if version == 2:
            key, path = frozenset({""}), own.get("")
            offered = frozenset((read_or_none(f"{mount}/cgroup.controllers") or "").split())
        else:
            key = offered = options.intersection(own)
            path = next((own[name] for name in sorted(offered)), None)
        if not key or path is None:
            continue
        # The same hierarchy may be mounted twice: one that we may write to is worth more.
        if key not in best or (writable and not best[key].writable):
            best[key] = Hierarchy(version, offered, mount, root, path, writable)
    return tuple(best.values())


def detect(mountinfo: str | None = None, self_cgroup: str | None = None) -> Host:
    """The hierarchies of this host. Raises HostUnsupported when a controller is nowhere to be found."""
    mounted = _hierarchies(
        read("/proc/self/mountinfo") if mountinfo is None else mountinfo,
        read("/proc/self/cgroup") if self_cgroup is None else self_cgroup,
    )
    for hierarchy in mounted:
        if hierarchy.version == 2 and hierarchy.controllers.issuperset(REQUIRED_V2):
            wanted = frozenset((*REQUIRED_V2, *OPTIONAL_V2))
            return Host(2, hierarchy.controllers & wanted, (hierarchy,), mounted)
    legacy = [hierarchy for hierarchy in mounted if hierarchy.version == 1]
    wanted = frozenset((*REQUIRED_V1, *OPTIONAL_V1))
    used = tuple(hierarchy for hierarchy in legacy if hierarchy.controllers & wanted)
    offered = frozenset().union(*(hierarchy.controllers for hierarchy in used)) & wanted
    missing = [name for name in REQUIRED_V1 if name not in offered]
    if missing:
        raise errors.HostUnsupported(
            f"no cgroup hierarchy offers {', '.join(missing)}: mount cgroup2 on /sys/fs/cgroup, or, in a "
            "container, give it a writable cgroup mount",
            missing=missing,
        )
    return Host(1, offered, used, mounted)


def subtree(directory: str, depth: int = SEARCH_DEPTH) -> Iterator[str]:
    """A cgroup and those below it, deepest first; nothing when it does not exist."""
    below = []
    try:
        if os.stat(directory).st_nlink != 2:  # kernfs counts the directories below, and listing takes longer
            with os.scandir(directory) as entries:
                below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for path in below if depth else []:
        yield from subtree(path, depth - 1)
    yield directory


def remove_tree(directory: str) -> bool:
    """Whether a cgroup and those below it are gone; False when one is busy. Raises HostFailed."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.ENOTEMPTY}:
            raise errors.HostFailed(f"cannot remove {directory}: {error.strerror}", file=directory) from error
    else:
        return True
    below = [path for path in subtree(directory) if path != directory]
    return bool(below) and all(remove_tree(path) for path in below) and remove_tree(directory)


def named(directory: str, name: str, depth: int = SEARCH_DEPTH) -> Iterator[str]:
    """Directories of a name at most ``depth`` levels below another."""
    try:
        with os.scandir(directory) as entries:
            below = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for entry in below:
        if entry.name == name:
            yield entry.path
        elif depth:
            yield from named(entry.path, name, depth - 1)
