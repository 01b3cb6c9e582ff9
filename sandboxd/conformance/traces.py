"""What a call has on the host, seen from outside: processes, cgroups, namespaces.

A call is found by a word in the arguments of its command. From that one process follow the cgroups that it
is in, its namespaces, and every process that shares its PID namespace. Nothing of the engine is known here.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Traces", "mounts_naming", "processes_with"]

KINDS = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user")


@dataclass(frozen=True)
class Traces:
    """What one call had when it ran."""

    processes: frozenset[tuple[int, str]]
    """Pids with their start times: a pid is given again."""
    cgroups: frozenset[Path]
    namespaces: frozenset[str]
    """As ``pid:[4026531836]``, without those of this process and user namespaces, which may be used again."""
    seen: int
    """Clock ticks from boot to the look at it. The kernel gives the number of a namespace that is gone to the
    next one that is made, so a process that started later holds another's."""

    @classmethod
    def of(cls, word: str) -> Traces:
        """Of the call whose command has this word. Raises LookupError while there is none."""
        for pid in _pids():
            if word in _text(f"/proc/{pid}/cmdline") and _link(pid, "pid") != _link(os.getpid(), "pid"):
                break
        else:
            raise LookupError(word)
        space = _link(pid, "pid")
        inside = {one for one in _pids() if _link(one, "pid") == space}
        own = {_link(os.getpid(), kind) for kind in KINDS}
        return cls(
            processes=frozenset((one, _started(one)) for one in inside),
            cgroups=frozenset(_cgroups(pid)),
            namespaces=frozenset(_link(pid, kind) for kind in KINDS if kind != "user") - own,
            seen=int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")),
        )

    @property
    def first(self) -> int:
        """PID 1 of the container, as the host numbers it. Raises LookupError where it is gone."""
        for pid, _ in self.processes:
            status = _text(f"/proc/{pid}/status")
            if any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in status.splitlines()):
                return pid
        raise LookupError("PID 1")

    def left(self) -> list[str]:
        """What of it is still there."""
        found = [f"process {pid}" for pid, started in self.processes if started and _started(pid) == started]
        found += [f"cgroup {path}" for path in self.cgroups if path.exists()]
        for pid in (pid for pid in _pids() if int(_started(pid) or self.seen) < self.seen):
            held = {_link(pid, kind) for kind in KINDS} | set(_descriptors(pid))
            found += [f"namespace {name}, held by process {pid}" for name in self.namespaces & held]
        return found


def processes_with(mark: str) -> list[str]:
    """Processes that have a text in their environment, as lines for people."""
    return [
        f"process {pid}: {_text(f'/proc/{pid}/cmdline')!r}"
        for pid in _pids()
        if mark in _text(f"/proc/{pid}/environ")
    ]


def mounts_naming(word: str) -> list[str]:
    """Mounts of this process's namespace whose line has a word in it."""
    return [line for line in _text("/proc/self/mountinfo").splitlines() if word in line]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208


def _text(path: str) -> str:
    """A file of a process that may end at any time."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _link(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")  # noqa: PTH115  (a text)
    except OSError:
        return ""


def _descriptors(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115


def _started(pid: int) -> str:
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # proc_pid_stat(5)
    return fields[19] if len(fields) > 19 else ""


def _cgroups(pid: int) -> Iterator[Path]:
    """The directories of the cgroups that a process is in, but for roots."""
    mounted: dict[str, tuple[str, str]] = {}  # by controller, "" for version 2: root and place of the mount
    for line in _text("/proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        _, _, _, root, place, *_ = mount.split(" ")
        kind, _, options = system.split(" ", 2)
        names = options.split(",") if kind == "cgroup" else [""] if kind == "cgroup2" else []
        mounted |= dict.fromkeys(names, (root, place))
    for line in _text(f"/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        root, place = mounted.get(controllers.split(",")[0], ("", ""))
        below = path if root == "/" else path.removeprefix(root)
        if place and below not in {"", "/"}:
            yield Path(place + below)
