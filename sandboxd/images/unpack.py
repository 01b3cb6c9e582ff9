"""Unpacking layers into a root file system, one entry at a time.

A name in an archive is only ever a hint: it is split, ``..`` is refused, its parent is opened inside
the tree (``rootfs``), and its last part is made relative to that descriptor with nothing followed.
An entry replaces what an earlier one left, as the OCI image specification has it (layer.md), a
directory stays if a directory comes again, and whiteouts act on lower layers only.

What is left out, and counted in ``skipped``: device nodes under ``/dev`` (the container's is made by
the engine), extended attributes (file capabilities among them), owner names, and times other than a
file's own. Device nodes elsewhere are refused. Set-id bits are kept: the engine mounts nosuid.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from sandboxd.errors import ImageInvalid
from sandboxd.images.rootfs import Rootfs, remove, typed
from sandboxd.images.tarstream import Budget, ByteStream, Entry, TarStream
from sandboxd.images.tree import MAX_ID

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Unpacker"]

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Unpacker:
    """Applies layers to ``rootfs``, lowest first, within one budget."""

    def __init__(self, rootfs: Rootfs, budget: Budget) -> None:
        self._rootfs = rootfs
        self._budget = budget
        self._made: set[bytes] = set()
        self.skipped = 0

    def apply(self, stream: ByteStream, *, whiteouts: bool) -> None:
        """Unpack one tar. Raises ImageInvalid; what was unpacked before that stays."""
        self._made = set()
        tar = TarStream(stream, self._budget)
        for entry in tar:
            parts = _split(entry.path)
            if not parts:
                continue  # the root itself is ours
            with self._rootfs.directory(b"/".join(parts[:-1]), make=True) as (parent, real):
                if whiteouts and parts[-1].startswith(WHITEOUT):
                    self._whiteout(parent, real, parts[-1])
                else:
                    path = self._rootfs.check(real, parts[-1])
                    with typed(path):
                        self._place(tar, entry, parent, parts[-1], path)

    def _place(self, tar: TarStream, entry: Entry, parent: int, name: bytes, path: bytes) -> None:
        if max(entry.uid, entry.gid) > MAX_ID:
            raise ImageInvalid(
                f"{os.fsdecode(path)!r} belongs to {entry.uid}:{entry.gid}; "
                f"the ids of an image end at {MAX_ID}"
            )
        if entry.type == "device":
            if path.split(b"/", 1)[0] != b"dev":
                raise ImageInvalid(f"{os.fsdecode(path)!r} is a device node")
            self.skipped += 1
            return
        make: dict[str, Callable[[], None]] = {
            "file": lambda: _file(tar, entry, parent, name),
            "directory": lambda: _directory(entry, parent, name),
            "symlink": lambda: _symlink(entry, parent, name),
            "fifo": lambda: _fifo(entry, parent, name),
            "hardlink": lambda: self._hardlink(entry, parent, name, path),
        }
        make[entry.type]()
        self._mark(path)

    def _mark(self, path: bytes) -> None:
        """Remember that this layer has the path, and so the directories above it."""
        while path and path not in self._made:
            self._made.add(path)
            path = path.rpartition(b"/")[0]

    def _hardlink(self, entry: Entry, parent: int, name: bytes, path: bytes) -> None:
        parts = _split(entry.target)
        if not parts:
            raise ImageInvalid(f"{os.fsdecode(path)!r} is a hard link to the root")
        with self._rootfs.directory(b"/".join(parts[:-1])) as (source, real):
            if self._rootfs.check(real, parts[-1]) == path:
                return  # a link to itself says nothing
            kind = os.stat(parts[-1], dir_fd=source, follow_symlinks=False).st_mode
            if stat.S_ISDIR(kind):
                raise ImageInvalid(f"{os.fsdecode(path)!r} is a hard link to a directory")
            remove(parent, name)
            os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)

    def _whiteout(self, parent: int, real: bytes, name: bytes) -> None:
        if name == OPAQUE:
            self._clear(parent, real)
        elif not name.startswith(WHITEOUT * 2):  # other doubled names are aufs's own books
            hidden = name[len(WHITEOUT) :]
            if hidden in {b"", b".", b".."}:
                raise ImageInvalid(f"{os.fsdecode(name)!r} is no whiteout")
            path = self._rootfs.check(real, hidden)
            if path not in self._made:
                with typed(path):
                    remove(parent, hidden)

    def _clear(self, directory: int, real: bytes) -> None:
        """Remove what lower layers have in a directory, and keep what this one put there."""
        for text in os.listdir(directory):
            name = os.fsencode(text)
            path = self._rootfs.check(real, name)
            if path not in self._made:
                with typed(path):
                    remove(directory, name)
            elif stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                with self._rootfs.directory(path) as (inner, _):
                    self._clear(inner, path)


def _split(path: bytes) -> list[bytes]:
    """The parts of a path inside the tree; a leading slash means the tree's root."""
    parts = [part for part in path.split(b"/") if part not in {b"", b"."}]
    if b".." in parts or b"\0" in path:
        raise ImageInvalid(f"the archive has the path {os.fsdecode(path[:200])!r}, which leads out of it")
    return parts


def _file(tar: TarStream, entry: Entry, parent: int, name: bytes) -> None:
    remove(parent, name)
    descriptor = os.open(name, _NEW, 0o600, dir_fd=parent)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in tar.content():
            file.write(chunk)
        file.flush()
        os.fchown(descriptor, entry.uid, entry.gid)  # before the mode: it clears the set-id bits
        os.fchmod(descriptor, entry.mode)
        # Python judges a .pyc by the time of its source.
        os.utime(descriptor, (entry.mtime, entry.mtime))


def _directory(entry: Entry, parent: int, name: bytes) -> None:
    try:
        kind = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        kind = 0
    if not stat.S_ISDIR(kind):
        remove(parent, name)
        os.mkdir(name, 0o700, dir_fd=parent)
    os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
    os.chmod(name, entry.mode, dir_fd=parent)


def _symlink(entry: Entry, parent: int, name: bytes) -> None:
    if not entry.target or len(entry.target) > 4095 or b"\0" in entry.target:
        raise ImageInvalid(f"{os.fsdecode(name)!r} is a symlink to nothing that can be named")
    remove(parent, name)
    os.symlink(entry.target, name, dir_fd=parent)
    os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)


def _fifo(entry: Entry, parent: int, name: bytes) -> None:
    remove(parent, name)
    os.mkfifo(name, 0o600, dir_fd=parent)
    os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
    os.chmod(name, entry.mode, dir_fd=parent)
