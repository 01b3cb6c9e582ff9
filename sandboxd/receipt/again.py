"""A slot that waited, read in full when it was made and compared at hand-over.

Theory of operation.  ``take_reading`` keeps the bytes of the sources of a receipt, and then judges every
control. At hand-over the sources are read again, and as long as they are the same, byte for byte, so are
the controls. What differs is never explained away: but for the limits that the request narrowed, a
difference means that every control is read in full once more.

Read again: ``status`` (ids, groups, capabilities, no_new_privs, the number of filters, the parent, umask),
``oom_score_adj``, ``limits``, ``mountinfo``, ``net/dev``, the routes, of a namespace with network rules the
generation of its packet filter and its sysctls, the host name, the size of the upper layer of an overlay,
the change times of ``/dev``, the cgroups of both processes, who else is in the slot's, and its limits; and
whether a path of ``/proc`` that is to be masked has come into being, with a kernel module say. Where a
session has put its files into the workspace since, what is mounted there is judged anew. The process is the
same one: its files in ``/proc`` are read through descriptors that were opened when it was first read, and
those of a process that is gone say ESRCH for ever, whoever has its number. The packet filter and the sysctls
are asked for through descriptors that were opened in the namespace then, which is still its own (see below).

Not read again, since nothing can have changed it while that process lives:

- The content of its filter. A filter is never taken back or replaced, only added to (seccomp(2)), and
  ``status`` counts them.
- Its namespaces. A process changes them itself or not at all (setns(2), unshare(2)), and it is parked in
  our code, or is a warm interpreter under the filter and without a capability. Their owner and the id maps
  are written once (user_namespaces(7)).
- What PID 1 executes. Its filter, which it has taken before it says that it is parked, has no execve.
- The content of the bundle of authorities: the file is the daemon's own, on a file system that is mounted
  read-only wherever it is mounted.
- Which file system is behind a mount, and the numbers of device nodes. Neither can be changed in place; one
  that is put in its stead has another line of ``mountinfo``, or changes ``/dev``.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from sandboxd import errors
from sandboxd.kernel import files, uts
from sandboxd.kernel.mounts import parse_mountinfo
from sandboxd.models import Receipt
from sandboxd.network.mark import Mark
from sandboxd.receipt.mounted import absent_masks, presented_control, stacked_control
from sandboxd.receipt.parked import RESOLVE_IN_ROOT
from sandboxd.receipt.reading import check, limit_controls, read_receipt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sandboxd.engine.base import Slot
    from sandboxd.models import Control
    from sandboxd.plan import Limits

__all__ = ["Reading", "take_reading"]

READ_MAX = (
    32 * 1024
)  # more than any but ``mountinfo`` has; a buffer for much more would take longer than its file
STEADY = (  # the lines of ``status`` that a receipt speaks of; others count what the process does
    b"Umask", b"PPid", b"Uid", b"Gid", b"Groups", b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb",
    b"NoNewPrivs", b"Seccomp", b"Seccomp_filters",
)  # fmt: skip
NAMESPACED = ("net/dev", "net/route", "net/ipv6_route")
"""Opened for each reading: an open one would keep its namespace alive after the container's end."""
READ = ("_steady", "_absent", "_sources", "_workspace", "_limits", "counted")
"""What a reading knows beside the receipt."""
FILES = 4  # of ``/proc`` beside ``status``
Sources = tuple[bytes | int | str | tuple[bytes, ...], ...]


class Reading:
    """What was read of one slot. Holds descriptors until ``close``; a context manager."""

    def __init__(self, slot: Slot) -> None:
        """Open the sources and read them. Raises OSError."""
        self._slot = slot
        self._stack = ExitStack()
        with ExitStack() as stack:
            flags = os.O_RDONLY | os.O_CLOEXEC
            self._directory = os.open(f"/proc/{slot.tool_pid}", flags | os.O_DIRECTORY)
            stack.callback(os.close, self._directory)
            init = os.open(f"/proc/{slot.init_pid}", flags | os.O_DIRECTORY)
            stack.callback(os.close, init)
            self._files = []
            for directory, name in (
                (self._directory, "oom_score_adj"),
                (self._directory, "limits"),
                (self._directory, "cgroup"),
                (init, "cgroup"),
            ):
                self._files.append(os.open(name, flags, dir_fd=directory))
                stack.callback(os.close, self._files[-1])
            self._status = os.open("status", flags, dir_fd=self._directory)
            stack.callback(os.close, self._status)
            self._mark = None if slot.doors is None else self._open_mark(stack)
            lines = os.pread(self._status, READ_MAX, 0).splitlines()
            self._steady = [b"\n%b\n" % line for line in lines if line.partition(b":")[0] in STEADY]
            self._absent = absent_masks()  # before they are judged: what comes meanwhile is seen then
            self._sources, self._workspace = self._read()
            self._limits = slot.cgroup.read_limits()
            self.receipt = read_receipt(slot, slot.shape.limits)
            slot.cgroup.reset_peak()
            self.counted = slot.cgroup.usage()
            """What its cgroup had counted by then."""
            self._stack = stack.pop_all()

    @property
    def descriptors(self) -> list[int]:
        """All that it holds, for ``adopt``."""
        marked = [] if self._mark is None else self._mark.descriptors
        return [self._directory, self._status, *self._files, *marked]

    def __getstate__(self) -> dict[str, object]:
        """For the slot's way to another process: what was read. The rest is given by ``adopt``."""
        return {**{name: self.__dict__[name] for name in READ}, "receipt": self.receipt.model_dump_json()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, receipt=Receipt.model_validate_json(state["receipt"]))

    def adopt(self, slot: Slot, descriptors: Sequence[int]) -> None:
        """Be the reading of this slot, after a way by pickle, and own these ``descriptors``."""
        self._slot, self._stack = slot, ExitStack()
        for fd in descriptors:
            self._stack.callback(os.close, fd)
        self._directory, self._status, *files = descriptors
        self._files, marked = files[:FILES], files[FILES:]
        self._mark = Mark(marked) if marked else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the descriptors. Safe to call twice."""
        self._stack.close()

    def again(self, limits: Limits) -> Receipt | None:
        """The receipt of now, of a slot whose cgroup has ``limits`` in it; None: read it in full once more.

        Raises ControlNotEnforced when the process is gone.
        """
        slot, asked = self._slot, self._slot.shape.limits
        try:
            status = os.pread(self._status, READ_MAX, 0)
            sources, workspace = self._read()
            same = all(line in status for line in self._steady) and sources == self._sources
            same = same and not any(map(os.path.exists, self._absent))
            same = same and (workspace == self._workspace or slot.stacked is not None)
        except OSError as error:
            raise errors.ControlNotEnforced(
                f"the parked tool process cannot be read: {error}", control="process"
            ) from error
        if not same or (limits.open_files, limits.file_size) != (asked.open_files, asked.file_size):
            return None
        controls, found = self.receipt.controls, slot.cgroup.read_limits()
        if found != self._limits or limits != asked:
            judged: dict[str, Control] = {control.name: control for control in limit_controls(found, limits)}
            controls = [judged.get(control.name, control) for control in controls]
        if slot.stacked is not None:
            stacked = {control.name: control for control in self._stacked(workspace)}
            controls = [stacked.get(control.name, control) for control in controls]
        # Not validated: each control was, when it was made.
        return Receipt.model_construct(
            engine=slot.engine,
            runtime=slot.runtime,
            controls=controls,
            read_at=self.receipt.read_at,
            checked_at=time.time_ns() // 1000,
            warnings=self.receipt.warnings,
        )

    def _stacked(self, lines: list[bytes]) -> Iterator[Control]:
        """The controls of a workspace that took the place of the first. Raises ControlNotEnforced."""
        entries = parse_mountinfo(b"".join(lines).decode(errors="surrogateescape"))
        yield stacked_control(self._slot, entries[0] if len(entries) == 1 else None)
        try:
            root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory)
            try:
                inside = files.openat2(root, b"/workspace", os.O_PATH, resolve=RESOLVE_IN_ROOT)
            finally:
                os.close(root)
            try:
                found = os.fstat(inside)
            finally:
                os.close(inside)
        except OSError as error:
            raise errors.ControlNotEnforced(
                f"the workspace cannot be read: {error}", control="workspace"
            ) from error
        yield presented_control("/workspace", self._slot.presented["/workspace"], found)

    def _read(self) -> tuple[Sources, list[bytes]]:
        """The sources, but for the lines of ``mountinfo`` that are of the workspace, which come apart."""
        dev = os.stat("root/dev", dir_fd=self._directory)
        upper = None if self._slot.upper_fd is None else os.fstatvfs(self._slot.upper_fd)
        mounted = _whole("mountinfo", self._directory).splitlines(keepends=True)
        workspace = [line for line in mounted if b" /workspace " in line]
        uts_namespace = os.open("ns/uts", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        return (
            uts.hostname_of(uts_namespace),
            *(() if upper is None else (upper.f_blocks, upper.f_files)),
            *(() if self._mark is None else self._mark.read()),
            *(os.pread(file, READ_MAX, 0) for file in self._files),
            *(line for line in mounted if b" /workspace " not in line),
            *(_whole(name, self._directory) for name in NAMESPACED),
            dev.st_ino,
            dev.st_mtime_ns,
            dev.st_ctime_ns,
            *(_whole(path) for path in self._slot.cgroup.procs_files),
        ), workspace

    def _open_mark(self, stack: ExitStack) -> Mark:
        namespace = os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            mark = Mark.open(namespace)
        finally:
            os.close(namespace)
        for fd in mark.descriptors:
            stack.callback(os.close, fd)
        return mark


def _whole(path: str, directory: int | None = None) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:  # a kernel without IPv6; of a process that is gone it is ESRCH
        return b""
    try:
        data = os.read(fd, READ_MAX)
        while more := os.read(fd, READ_MAX):  # mountinfo comes by pages
            data += more
        return data
    finally:
        os.close(fd)


def take_reading(slot: Slot) -> Reading:
    """Read a slot in full, to compare with later. Raises ControlNotEnforced for what is not as asked."""
    try:
        reading = Reading(slot)
    except OSError as error:
        raise errors.ControlNotEnforced(
            f"the parked tool process cannot be read: {error}", control="process"
        ) from error
    try:
        check(reading.receipt)
    except BaseException:
        reading.close()
        raise
    return reading
