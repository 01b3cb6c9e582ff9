"""A layer as files: what a walk gives is made in a directory, all by descriptors."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from sandboxd.workspace.layer import DIRECTORY, OPAQUE, Owner, extents
from sandboxd.workspace.tree import step

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from sandboxd.workspace.layer import Attributes, Looks

__all__ = ["LayerFiles", "copy_data"]

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LayerFiles:
    """Makes a layer in an empty directory; nothing is synced. Each method raises OSError.

    A name is a single one, and none of a link: whoever gives it has read it from a directory. To be used as
    a context, which closes what is open and empties ``scratch``.
    """

    def __init__(self, into: int, scratch: int) -> None:
        """Descriptors of two empty directories of one file system; entries with several names wait in one."""
        self._here = os.open(".", DIRECTORY, dir_fd=into)
        self._scratch = scratch
        self._file = -1
        self._depth = 0
        self._shared: set[str] = set()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is open."""
        for fd in (self._here, self._file):
            if fd >= 0:
                os.close(fd)
        for name in self._shared:
            os.unlink(name, dir_fd=self._scratch)

    def enter(self, name: str) -> None:
        """Make a directory and go into it."""
        os.mkdir(name, 0o700, dir_fd=self._here)
        self._here = step(self._here, name)
        self._depth += 1

    def leave(self, owner: Owner, attributes: Attributes, *, opaque: bool) -> Owner:
        """End the directory and go to the one above."""
        if opaque:
            os.setxattr(self._here, OPAQUE, b"y")
        kept = _settled(self._here, owner, attributes)
        if self._depth:
            self._here = step(self._here, "..")
            self._depth -= 1
        return kept

    def whiteout(self, name: str) -> None:
        """A device that says that there is none of this name."""
        os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=self._here)

    def symlink(self, name: str, aim: str, owner: Owner) -> Owner:
        """A symbolic link."""
        os.symlink(aim, name, dir_fd=self._here)
        return self._named(name, owner)

    def node(self, name: str, kind: int, owner: Owner) -> Owner:
        """A FIFO or socket."""
        os.mknod(name, kind | 0o600, dir_fd=self._here)
        return self._named(name, owner)

    def begin(self, name: str, looks: Looks | None = None) -> None:  # noqa: ARG002
        """A file."""
        self._file = os.open(name, NEW, 0o600, dir_fd=self._here)

    def run(self, data: bytes, offset: int) -> None:
        """Some of its bytes."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written

    def end(self, size: int, attributes: Attributes, owner: Owner) -> Owner:
        """End the file."""
        os.ftruncate(self._file, size)
        kept = _settled(self._file, owner, attributes)
        file, self._file = self._file, -1
        os.close(file)
        return kept

    def first(self, name: str, number: int) -> None:
        """Remember the entry just made by its number."""
        at = str(number)
        os.link(name, at, src_dir_fd=self._here, dst_dir_fd=self._scratch, follow_symlinks=False)
        self._shared.add(at)

    def again(self, name: str, number: int) -> None:
        """Another name of that entry."""
        os.link(str(number), name, src_dir_fd=self._scratch, dst_dir_fd=self._here, follow_symlinks=False)

    def _named(self, name: str, owner: Owner) -> Owner:
        """Give what has no descriptor its owner; returns what became of it."""
        os.chown(name, owner.uid, owner.gid, dir_fd=self._here, follow_symlinks=False)
        if not stat.S_ISLNK(os.stat(name, dir_fd=self._here, follow_symlinks=False).st_mode):
            os.chmod(name, owner.mode, dir_fd=self._here)
        os.utime(name, ns=(owner.mtime, owner.mtime), dir_fd=self._here, follow_symlinks=False)
        return _owner(os.stat(name, dir_fd=self._here, follow_symlinks=False))


def _settled(fd: int, owner: Owner, attributes: Attributes) -> Owner:
    for name, value in attributes:
        os.setxattr(fd, name, value)
    os.fchown(fd, owner.uid, owner.gid)
    os.fchmod(fd, owner.mode)  # after chown(2), which takes setuid away
    os.utime(fd, ns=(owner.mtime, owner.mtime))
    return _owner(os.fstat(fd))


def _owner(status: os.stat_result) -> Owner:
    return Owner(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)


def copy_data(source: int, target: int, size: int) -> None:
    """Copy so many bytes of a file to the same places of another, and no holes. Raises OSError."""
    for begin, end in extents(source, size):
        at = begin
        while at < end:
            done = os.copy_file_range(source, target, end - at, at, at)
            if not done:
                raise OSError(errno.EIO, "a file of a session has lost its end")
            at += done
