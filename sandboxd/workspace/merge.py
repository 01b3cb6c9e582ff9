"""Several layers made into one, by hard links: what they show together, in the place of all of them.

Theory of operation.  As overlayfs looks a name up: the newest layer that has it decides, and only where all
that have it have a directory are they merged. Files are linked and not copied. What hides something of the
layers below, which are looked at and not merged, stays: whiteouts, and directories that are opaque, or
become so, since something in between hid what was below. A whiteout that hides nothing must not stay:
overlayfs shows it where its directory has no other below. The walk has one descriptor for each layer,
whatever the depth, and follows nothing.
"""

# ruff: noqa: PTH208  -- directories are descriptors here

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd.workspace.layer import DIRECTORY, OPAQUE, is_opaque, is_whiteout, step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["merge"]


@dataclass
class _Frame:
    """A directory: the layers that have it, the newest first, and the names that are still to come."""

    name: str
    members: list[int]
    opaque: bool
    """Whether something in between hides what is below."""
    left: list[tuple[str, list[int]]] = field(default_factory=list)


def merge(layers: Sequence[Path], into: int, *, below: Sequence[Path]) -> tuple[int, int]:
    """Merge layers, the newest first, into an empty directory (a descriptor); ``below`` are those beneath.

    Returns bytes that its files take on disk, and entries. Raises OSError.
    """
    return _Merge(into, len(layers)).run([*layers, *below])


class _Merge:
    """``count`` of the layers are merged, the others are below."""

    def __init__(self, into: int, count: int) -> None:
        self._into = into
        self._count = count
        self._at: list[int] = []
        self._target = -1
        self._size = 0
        self._entries = 0

    def run(self, layers: Sequence[Path]) -> tuple[int, int]:
        with ExitStack() as stack:
            stack.callback(self._close)
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
        return self._size, self._entries

    def _close(self) -> None:
        for fd in (*self._at, self._target):
            if fd >= 0:
                os.close(fd)

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
            if beneath or not is_whiteout(first):
                self._link(having[0], name, first)
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
        self._entries += 1
        self._move(members, name)
        return self._frame(name, members, opaque=opaque)

    def _link(self, member: int, name: str, status: os.stat_result) -> None:
        at = self._at[member]
        os.link(name, name, src_dir_fd=at, dst_dir_fd=self._target, follow_symlinks=False)
        self._entries += 1
        self._size += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0

    def _finish(self, frame: _Frame) -> None:
        """Give the directory what the newest has of it, when all is in it that changes its time."""
        newest = self._at[frame.members[0]]
        for name in os.listxattr(newest):
            if name != OPAQUE:
                os.setxattr(self._target, name, os.getxattr(newest, name))
        if frame.opaque and len(self._at) > self._count:
            os.setxattr(self._target, OPAQUE, b"y")
        status = os.fstat(newest)
        os.fchown(self._target, status.st_uid, status.st_gid)
        os.fchmod(self._target, stat.S_IMODE(status.st_mode))
        os.utime(self._target, ns=(status.st_mtime_ns, status.st_mtime_ns))
