"""Files in a directory that somebody else controls: opened, listed and written without being led astray.

Theory of operation: every path is resolved by ``openat2(2)`` (Linux 5.6) from a descriptor of the
workspace's root, beneath it, through no symbolic or magic link and onto no other mount. What is to be
read is first opened with ``O_PATH``, which has no effect on a device or a FIFO, looked at, and only a
regular file is then opened for reading, through its own descriptor, so that no swap of the name
matters. Nothing here keeps a descriptor per level, so depth costs nothing; a path longer than the
kernel takes (``PATH_MAX``) cannot be addressed and is refused.

Writers put a caller's files into a workspace that no tool has seen yet. The size of the workspace is
the kernel's to enforce: its ENOSPC becomes ``TooLarge``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from sandboxd import errors, units

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "MAX_COMPONENT",
    "MAX_PATH",
    "NotRegular",
    "Writer",
    "open_directory",
    "open_regular",
    "openat2",
    "split_path",
    "write_inputs",
]

MAX_PATH = 4095
"""Bytes of a path; PATH_MAX of limits.h less its NUL."""
MAX_COMPONENT = 255
"""Bytes of a name; NAME_MAX of limits.h."""

# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
CONFINED = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV

_SYS_OPENAT2 = 437  # the same number on every architecture: include/uapi/asm-generic/unistd.h
_LIBC = ctypes.CDLL(None, use_errno=True)
_SYSCALL = _LIBC.syscall
_SYSCALL.restype = ctypes.c_long
_CHUNK = 1 << 20


_THEIRS = {
    errno.EEXIST: "is given twice",
    errno.ENOTDIR: "needs a directory where a file is",
    errno.EISDIR: "is a directory already",
    errno.ELOOP: "passes through a symbolic link",
    errno.EXDEV: "leaves the workspace",
    errno.ENOENT: "refers to a file that is not there",
}
"""What a failed write says about the caller's paths; every other errno is a fault of the host."""


class _OpenHow(ctypes.Structure):
    """``struct open_how``."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class NotRegular(OSError):
    """Raised when what was to be read is no regular file; ``kind`` says what it is."""

    def __init__(self, path: bytes, kind: str) -> None:
        super().__init__(errno.EINVAL, f"is a {kind}", path)
        self.kind = kind

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return self.kind == "symbolic link"


def openat2(directory: int, path: bytes, flags: int, mode: int = 0, resolve: int = CONFINED) -> int:
    """Open a path relative to a descriptor; by default beneath it, through no link, onto no mount.

    Returns a close-on-exec descriptor. Raises OSError: ELOOP for a link on the way, EXDEV for a path
    that leaves the directory or its mount, ENOSYS before Linux 5.6.
    """
    if b"\0" in path:
        raise OSError(errno.EINVAL, "path has a NUL byte", path)
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    while True:
        fd = _SYSCALL(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_long(directory),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number not in {errno.EINTR, errno.EAGAIN}:  # EAGAIN: a rename raced with the lookup
            raise OSError(number, os.strerror(number), path)


def open_directory(root: int, path: bytes = b".") -> int:
    """Open a directory beneath ``root`` for listing. Raises OSError."""
    return openat2(root, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def kind_of(mode: int) -> str:
    """What a file of this ``st_mode`` is, in a word or two."""
    kinds = {
        stat.S_IFREG: "regular file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
    }
    return kinds.get(stat.S_IFMT(mode), "file of an unknown kind")


def open_regular(root: int, path: bytes) -> tuple[int, os.stat_result]:
    """Open a regular file beneath ``root`` for reading; a device or FIFO is never opened, not even briefly.

    Returns the descriptor and its status. Raises NotRegular, or OSError with the errno of openat2(2).
    """
    # openat2(2): with O_PATH|O_NOFOLLOW a link as the last component is itself what is opened, so it is
    # told apart from one on the way, which is ELOOP.
    handle = openat2(root, path, os.O_PATH | os.O_NOFOLLOW)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise NotRegular(path, kind_of(found.st_mode))
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fd = os.open(f"/proc/self/fd/{handle}", flags)
    finally:
        os.close(handle)
    return fd, os.fstat(fd)


def split_path(path: bytes) -> list[bytes]:
    """The components of a relative path that a caller gave.

    Raises InvalidRequest when it is empty, absolute or too long, has a NUL byte, or has an empty,
    ``.`` or ``..`` component.
    """
    shown = _shown(path)
    if not path or len(path) > MAX_PATH:
        raise errors.InvalidRequest(f"path {shown} must have 1 to {MAX_PATH} bytes", path=shown)
    if b"\0" in path:
        raise errors.InvalidRequest(f"path {shown} has a NUL byte", path=shown)
    parts = path.split(b"/")
    for part in parts:
        if part in {b"", b".", b".."}:
            raise errors.InvalidRequest(
                f"path {shown} must be relative to the workspace, with no empty, '.' or '..' component",
                path=shown,
            )
        if len(part) > MAX_COMPONENT:
            raise errors.InvalidRequest(
                f"path {shown} has a name of more than {MAX_COMPONENT} bytes", path=shown
            )
    return parts


def _shown(path: bytes) -> str:
    text = ascii(path.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 120 else f"{text[:100]}…"


class Writer:
    """Writes files into a workspace that no tool runs in yet, owned by the given host ids.

    A context manager: it keeps the directory that it wrote to last open. ``replace`` lets a later entry
    take the place of an earlier one that is no directory, as tar does.
    """

    def __init__(self, root: int, uid: int, gid: int, *, replace: bool = False) -> None:
        self._root = root
        self._uid = uid
        self._gid = gid
        self._replace = replace
        self._at: list[bytes] = []
        self._dir = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._dir >= 0:
            os.close(self._dir)
            self._dir = -1

    def file(self, parts: list[bytes], chunks: Iterable[bytes], mode: int, mtime: int | None = None) -> None:
        """Create a file (and its parents) from its bytes; only the permission bits of ``mode`` count.

        ``mtime`` is in seconds. Raises InvalidRequest, TooLarge (the workspace is full), HostFailed.
        """
        with self._mapped(parts):
            parent = self._parent(parts)
            self._clear(parent, parts)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            fd = openat2(parent, parts[-1], flags, 0o600)
        try:
            # Not under _mapped as a whole: what the source of the chunks raises is its own affair.
            for chunk in chunks:
                with self._mapped(parts):
                    write_all(fd, chunk)
            with self._mapped(parts):
                os.fchown(fd, self._uid, self._gid)
                os.fchmod(fd, mode & 0o777)
                if mtime is not None:
                    os.utime(fd, (mtime, mtime))
        finally:
            os.close(fd)

    def directory(self, parts: list[bytes], mode: int) -> None:
        """Create a directory and its parents; one that is there gets the mode. Raises as ``file``."""
        with self._mapped(parts):
            parent = self._parent(parts)
            self._mkdir(parent, parts[-1])
            # The owner keeps access, so that what follows can be written without CAP_DAC_OVERRIDE.
            fd = openat2(parent, parts[-1], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                os.fchmod(fd, mode & 0o777 | 0o700)
            finally:
                os.close(fd)

    def symlink(self, parts: list[bytes], target: bytes) -> None:
        """Create a symbolic link. One that plainly leads out of the workspace is an InvalidRequest.

        This is for the caller's sake and no boundary: the daemon follows no link, and the tool is held
        by its mount namespace.
        """
        depth = len(parts) - 1
        outside = not target or target.startswith(b"/") or len(target) > MAX_PATH or b"\0" in target
        for step in target.split(b"/"):
            depth += {b"..": -1, b".": 0, b"": 0}.get(step, 1)
            outside = outside or depth < 0
        if outside:
            raise errors.InvalidRequest(
                f"link {_shown(b'/'.join(parts))} leads out of the workspace, to {_shown(target)}"
            )
        with self._mapped(parts):
            parent = self._parent(parts)
            self._clear(parent, parts)
            os.symlink(target, parts[-1], dir_fd=parent)
            os.chown(parts[-1], self._uid, self._gid, dir_fd=parent, follow_symlinks=False)

    def hard_link(self, parts: list[bytes], target: list[bytes]) -> None:
        """Create a hard link to a regular file that was written before. Raises as ``file``."""
        if parts == target:
            raise errors.InvalidRequest(f"{_shown(b'/'.join(parts))} is a hard link to itself")
        with self._mapped(parts):
            source = openat2(self._root, b"/".join(target), os.O_PATH | os.O_NOFOLLOW)
            try:
                if not stat.S_ISREG(os.fstat(source).st_mode):
                    shown, aim = _shown(b"/".join(parts)), _shown(b"/".join(target))
                    raise errors.InvalidRequest(f"hard link {shown} is to no regular file: {aim}")
                parent = self._parent(parts)
                self._clear(parent, parts)
                # By the descriptor, so that it is the file that was looked at (linkat(2)).
                os.link(f"/proc/self/fd/{source}", parts[-1], dst_dir_fd=parent, follow_symlinks=True)
            finally:
                os.close(source)

    def _parent(self, parts: list[bytes]) -> int:
        above = parts[:-1]
        if self._dir >= 0 and above == self._at:
            return self._dir
        self._leave()
        try:
            self._dir = openat2(self._root, b"/".join(above) or b".", os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            self._dir = self._make(above)
        self._at = above
        return self._dir

    def _make(self, parts: list[bytes]) -> int:
        here = openat2(self._root, b".", os.O_PATH | os.O_DIRECTORY)
        for part in parts:
            above = here
            try:
                self._mkdir(above, part)
                here = openat2(above, part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
            finally:
                os.close(above)
        return here

    def _mkdir(self, parent: int, name: bytes) -> None:
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        except FileExistsError:
            return  # if it is no directory, opening it says so
        fd = openat2(parent, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchown(fd, self._uid, self._gid)
            os.fchmod(fd, 0o755)
        finally:
            os.close(fd)

    def _clear(self, parent: int, parts: list[bytes]) -> None:
        if not self._replace:
            return
        try:
            os.unlink(parts[-1], dir_fd=parent)
        except FileNotFoundError:
            return

    @contextmanager
    def _mapped(self, parts: list[bytes]) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(error, _shown(b"/".join(parts))) from error

    def _error(self, error: OSError, shown: str) -> errors.SandboxdError:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            room = os.fstatvfs(self._root)
            size = room.f_blocks * room.f_frsize
            if room.f_files and not room.f_favail:
                count = units.format_count(room.f_files)
                message = f"{shown} does not fit: the workspace holds {count} files, and all are taken"
                return errors.TooLarge(message, limit=size, inodes=room.f_files)
            message = f"{shown} does not fit into the workspace of {units.format_size(size)}"
            return errors.TooLarge(message, limit=size)
        if error.errno in _THEIRS:
            return errors.InvalidRequest(f"{shown} {_THEIRS[error.errno]}", path=shown)
        return errors.HostFailed(f"cannot write {shown} into the workspace: {error.strerror}")


def write_all(fd: int, data: bytes) -> None:
    """Write all of it. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[:_CHUNK]) :]


def write_inputs(
    root: int, inputs: Iterable[tuple[str, bytes, int]], uid: int, gid: int, *, replace: bool = False
) -> None:
    """Write ``(path, bytes, mode)`` files into a workspace before its tool starts, owned by these host ids.

    ``root`` is a descriptor of the workspace's root (``O_PATH`` will do). With ``replace`` a file that is
    there already gives way. Blocks; call it in a thread.
    Raises InvalidRequest for a bad path or one that is given twice, TooLarge when the workspace is
    full, HostFailed.
    """
    with Writer(root, uid, gid, replace=replace) as writer:
        for path, data, mode in inputs:
            try:
                name = path.encode()
            except UnicodeEncodeError:
                raise errors.InvalidRequest(f"path {path!a} is not valid Unicode") from None
            writer.file(split_path(name), (data,), mode)
