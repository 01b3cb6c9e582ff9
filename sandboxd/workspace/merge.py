"""Several layers made into one, by hard links: what they show together, in the place of all of them.

Theory of operation.  As overlayfs looks a name up: the newest layer that has it decides, and only where all
that have it have a directory are they merged. Files are linked and not copied. What hides something of the
layers below, which are looked at and not merged, stays: whiteouts, and directories that are opaque, or
become so, since something in between hid what was below. A whiteout that hides nothing must not stay:
overlayfs shows it where its directory has no other below. The walk has one descriptor for each layer,
whatever the depth, and follows nothing.

Where a directory of a caller's is below, which changes, what it has at the moment says nothing: all that
may ever hide something of it stays. For overlayfs to show none of those whiteouts, their directories are
marked as copied from elsewhere, ``trusted.overlay.origin``, which is empty where nobody knows from where.

A file may have more names than a file system lets it have when each layer that it is in has as many: it is
copied then, and its further names are the copy's.
"""

# ruff: noqa: PTH208  -- directories are descriptors here

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sandboxd.workspace.layer import (
    DIRECTORY,
    FILE,
    OPAQUE,
    directory_size,
    is_opaque,
    is_whiteout,
    link_size,
    whole_blocks,
)
from sandboxd.workspace.layerfiles import copy_data
from sandboxd.workspace.tree import step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Merged", "merge"]

ORIGIN = "trusted.overlay.origin"


class Merged(NamedTuple):
    """What a merged layer shows, in bytes on disk as ``Figures`` has them and entries; and what is its own.

    That is what it does not share with the layers that it was made of: directories, and files copied.
    """

    size: int
    inodes: int
    own_size: int
    own_inodes: int


@dataclass
class _Frame:
    """A directory: the layers that have it, the newest first, and the names that are still to come."""

    name: str
    members: list[int]
    opaque: bool
    """Whether something in between hides what is below."""
    left: list[tuple[str, list[int]]] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    hiding: bool = False
    """Whether a whiteout was put here that may have nothing to hide."""


def merge(
    layers: Sequence[Path], into: int, *, below: Sequence[Path], scratch: int, lent: bool = False
) -> Merged:
    """Merge layers, the newest first, into an empty directory (a descriptor); ``below`` are those beneath.

    ``scratch`` is an empty directory beside it, which is empty again afterwards; with ``lent`` a directory
    that changes is below them all. Raises OSError.
    """
    return _Merge(into, len(layers), scratch, lent=lent).run([*layers, *below])


class _Merge:
    """``count`` of the layers are merged, the others are below."""

    def __init__(self, into: int, count: int, scratch: int, *, lent: bool) -> None:
        self._into = into
        self._count = count
        self._scratch = scratch
        self._lent = lent
        self._copies: dict[tuple[int, int], str] = {}
        self._copied = 0
        self._met: set[tuple[int, int]] = set()
        self._at: list[int] = []
        self._target = -1
        self._size = self._own_size = 0
        self._entries = self._own_entries = 0

    def run(self, layers: Sequence[Path]) -> Merged:
        with ExitStack() as stack:
            stack.callback(self._close)
            stack.callback(self._clear_scratch)
            for layer in layers:
                self._at.append(os.open(layer, DIRECTORY))
            self._target = os.open(".", DIRECTORY, dir_fd=self._into)
            frames = [self._frame("", list(range(len(layers))), opaque=False)]
            while frames:
                frame = frames[-1]
                if frame.left:
                    below = self._entry(frame, *frame.left.pop())
                    if below is not None:
                        frames.append(below)
                    continue
                self._finish(frame)
                frames.pop()
                if frames:
                    self._move(frame.members, "..")
        return Merged(self._size, self._entries, self._own_size, self._own_entries)

    def _close(self) -> None:
        for fd in (*self._at, self._target):
            if fd >= 0:
                os.close(fd)

    def _clear_scratch(self) -> None:
        for name in self._copies.values():
            os.unlink(name, dir_fd=self._scratch)

    def _move(self, members: list[int], name: str) -> None:
        for member in members:
            self._at[member] = step(self._at[member], name)
        self._target = step(self._target, name)

    def _frame(self, name: str, members: list[int], *, opaque: bool) -> _Frame:
        """The directory in which all members and the target are now."""
        having: dict[str, list[int]] = {}
        for number, member in enumerate(members):
            if member < self._count:
                for entry in os.listdir(self._at[member]):
                    having.setdefault(entry, []).append(member)
            if is_opaque(self._at[member]):
                opaque = opaque or member < self._count
                for later in members[number + 1 :]:
                    self._at[later] = step(self._at[later], "..")
                del members[number + 1 :]
                break
        return _Frame(name, members, opaque, list(having.items()))

    def _entry(self, frame: _Frame, name: str, having: list[int]) -> _Frame | None:
        first = os.stat(name, dir_fd=self._at[having[0]], follow_symlinks=False)
        beneath = [member for member in frame.members if member >= self._count]
        if not stat.S_ISDIR(first.st_mode):
            whiteout = is_whiteout(first)
            if beneath or not whiteout or (self._lent and not frame.opaque):
                self._link(having[0], name, first)
                frame.made.append(name)
                frame.hiding = frame.hiding or (whiteout and self._lent)
            return None
        members, opaque = [having[0]], frame.opaque
        for member in [*having[1:], *beneath]:
            try:
                found = os.stat(name, dir_fd=self._at[member], follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(found.st_mode):
                opaque = opaque or member < self._count
                break
            members.append(member)
        os.mkdir(name, 0o700, dir_fd=self._target)
        frame.made.append(name)
        self._entries += 1
        self._own_entries += 1
        self._move(members, name)
        return self._frame(name, members, opaque=opaque)

    def _link(self, member: int, name: str, status: os.stat_result) -> None:
        file = status.st_dev, status.st_ino
        known = self._copies.get(file)
        source, source_name = (self._at[member], name) if known is None else (self._scratch, known)
        fds = {"src_dir_fd": source, "dst_dir_fd": self._target}
        try:
            os.link(source_name, name, follow_symlinks=False, **fds)
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            source_name = self._copy(self._at[member], name, status)
            if known is not None:
                os.unlink(known, dir_fd=self._scratch)
            self._copies[file] = source_name
            os.link(
                source_name, name, src_dir_fd=self._scratch, dst_dir_fd=self._target, follow_symlinks=False
            )
            self._count_in(status)
            self._own_entries += 1
            self._own_size += _size_of(status)
            return
        if status.st_nlink > 1:
            if file in self._met:
                return
            self._met.add(file)
        self._count_in(status)

    def _count_in(self, status: os.stat_result) -> None:
        self._entries += 1
        self._size += _size_of(status)

    def _copy(self, at: int, name: str, status: os.stat_result) -> str:
        """Copy what is no directory to the scratch directory, where it has one name."""
        self._copied += 1
        copy, kind = str(self._copied), stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            self._copy_file(at, name, copy)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=at), copy, dir_fd=self._scratch)
        else:
            os.mknod(copy, kind | 0o600, status.st_rdev, dir_fd=self._scratch)
        os.chown(copy, status.st_uid, status.st_gid, dir_fd=self._scratch, follow_symlinks=False)
        if kind != stat.S_IFLNK:
            os.chmod(copy, stat.S_IMODE(status.st_mode), dir_fd=self._scratch)
        times = (status.st_mtime_ns, status.st_mtime_ns)
        os.utime(copy, ns=times, dir_fd=self._scratch, follow_symlinks=False)
        return copy

    def _copy_file(self, at: int, name: str, copy: str) -> None:
        with ExitStack() as stack:
            source = os.open(name, FILE, dir_fd=at)
            stack.callback(os.close, source)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(copy, flags, 0o600, dir_fd=self._scratch)
            stack.callback(os.close, target)
            size = os.fstat(source).st_size
            copy_data(source, target, size)
            os.ftruncate(target, size)
            for attribute in os.listxattr(source):
                os.setxattr(target, attribute, os.getxattr(source, attribute))

    def _finish(self, frame: _Frame) -> None:
        """Give the directory what the newest has of it, when all is in it that changes its time."""
        newest, attributes = self._at[frame.members[0]], 0
        for name in os.listxattr(newest):
            if name not in {OPAQUE, ORIGIN}:
                value = os.getxattr(newest, name)
                os.setxattr(self._target, name, value)
                attributes += len(name) + len(value)
        size = directory_size(frame.made) + whole_blocks(attributes)
        self._size, self._own_size = self._size + size, self._own_size + size
        if frame.opaque and (len(self._at) > self._count or self._lent):
            os.setxattr(self._target, OPAQUE, b"y")
        if frame.hiding:
            os.setxattr(self._target, ORIGIN, b"")
        status = os.fstat(newest)
        os.fchown(self._target, status.st_uid, status.st_gid)
        os.fchmod(self._target, stat.S_IMODE(status.st_mode))
        os.utime(self._target, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _size_of(status: os.stat_result) -> int:
    if stat.S_ISREG(status.st_mode):
        return whole_blocks(status.st_blocks * 512)
    return link_size(status.st_size) if stat.S_ISLNK(status.st_mode) else 0
