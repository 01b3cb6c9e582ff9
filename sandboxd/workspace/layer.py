"""One layer of a workspace: what a call changed, in the format of overlayfs, and its digest.

Theory of operation.  A call writes to the upper layer of an overlay, a tmpfs. When it commits, all its
processes are dead, and ``take`` copies that tree to disk: with the container's own ids, sparse, and with
nothing that a tool could have written for overlayfs to believe. Names, links and sizes are the tool's, so
nothing is opened by a path: the walk steps from directory to directory by single names that are no links,
and back by ``..``, with two descriptors whatever the depth.

A whiteout is a character device 0:0, an opaque directory has ``trusted.overlay.opaque``: only overlayfs and
the host's root can make either (overlayfs refuses to make such a device; ``trusted.*`` needs CAP_SYS_ADMIN
in the first user namespace). Every other name of overlayfs is left behind. FIFOs and sockets are kept,
which nobody opens.

The digest is that of a tree: an entry is its name, kind, owner, mode, time, extended attributes, and the
digest of what it holds; a further name of a file is the number of the first. Blocks of zeros count like
holes, so the digest does not depend on how a disk keeps them.
"""

# ruff: noqa: PTH208  -- directories are descriptors here

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.workspace.tree import DIRECTORY, step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "DIRECTORY",
    "IDS",
    "OPAQUE",
    "Figures",
    "directory_size",
    "dress",
    "extents",
    "is_opaque",
    "is_same",
    "is_whiteout",
    "link_size",
    "measure",
    "take",
    "whole_blocks",
]

IDS = 65_536
"""Ids of a container's range."""
OPAQUE = "trusted.overlay.opaque"
ACLS = ("system.posix_acl_access", "system.posix_acl_default")
BLOCK = 4096
INLINE = 60  # bytes of a symbolic link that ext4 keeps in the inode; others keep more
ROW = 16  # bytes of a directory's entry beside its name, rounded up
ZEROS = bytes(BLOCK)
CHUNK = 256 * BLOCK
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
ACL_VERSION, ACL_USER, ACL_GROUP = 2, 0x02, 0x08  # linux/posix_acl_xattr.h, linux/posix_acl.h
UNFIT = {
    errno.EFBIG: "a file is larger than the state directory's file system can hold",
    errno.ENAMETOOLONG: "a name is longer than the state directory's file system can hold",
    errno.EMLINK: "a file has more names than the state directory's file system can hold",
    errno.E2BIG: "an extended attribute is larger than the state directory's file system can hold",
    errno.ERANGE: "an extended attribute is larger than the state directory's file system can hold",
    errno.EOPNOTSUPP: "it has extended attributes or kinds of files that the state directory's file system "
    "cannot hold",
}


@dataclass(frozen=True)
class Figures:
    """What is known of a layer: the digest of its content, bytes that it takes on disk, and entries.

    Bytes are whole blocks, and those of directories, links and attributes too: at least one in each layer.
    """

    digest: str
    size: int
    inodes: int


def whole_blocks(size: int) -> int:
    """Bytes on disk of so many."""
    return -(-size // BLOCK) * BLOCK


def directory_size(names: Iterable[str]) -> int:
    """Bytes on disk of a directory with these names. Its blocks may be no more than half full."""
    return max(BLOCK, whole_blocks(2 * sum(ROW + len(_bytes(name)) for name in names)))


def link_size(length: int) -> int:
    """Bytes on disk of a symbolic link to a path of so many."""
    return 0 if length < INLINE else BLOCK


def is_whiteout(status: os.stat_result) -> bool:
    """Whether an entry of a layer says that there is none of its name."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def take(upper: int, into: int, base: int, *, scratch: int) -> Figures:
    """Copy an upper layer into an empty directory, all by descriptors; nobody else may be at work in either.

    ``base`` is the host id of the container's root, ``scratch`` an empty directory beside ``into``, which is
    empty again afterwards. Not synced. Raises WorkspaceUnfit for what no layer can hold, HostFailed.
    """
    with _mapped(into):
        return _Walk(upper, into, base, scratch).run()


def measure(layer: int) -> Figures:
    """The same of a layer as it stands. Raises HostFailed, WorkspaceUnfit."""
    with _mapped(layer):
        return _Walk(layer, None, 0, None).run()


@contextmanager
def _mapped(into: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if number in UNFIT:
            raise errors.WorkspaceUnfit(f"the files cannot be kept: {UNFIT[number]}") from error
        if number in {errno.ENOSPC, errno.EDQUOT}:
            room = os.fstatvfs(into)
            if number == errno.ENOSPC and room.f_bavail and (room.f_favail or not room.f_files):
                # what setxattr(2) says of too much for one file
                raise errors.WorkspaceUnfit(f"the files cannot be kept: {UNFIT[errno.E2BIG]}") from error
            raise errors.HostFailed("no space left for a session's files in the state directory") from error
        raise errors.HostFailed(f"a session's files cannot be kept: {error.strerror}") from error


@dataclass
class _Frame:
    """A directory on the way: its entries that are still to come, last first, and the digest so far."""

    name: str
    status: os.stat_result
    left: list[str]
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


class _Walk:
    """One walk through a tree, in the order of names; ``target`` None: nothing is copied."""

    def __init__(self, source: int, target: int | None, base: int, scratch: int | None) -> None:
        self._root = source
        self._target_root = target
        self._base = base
        self._scratch = scratch
        self._source = self._target = -1
        self._links: dict[int, tuple[int, str]] = {}
        self._size = 0
        self._inodes = 0
        self._met = 0

    def run(self) -> Figures:
        with ExitStack() as stack:
            stack.callback(self._close)
            self._source = os.open(".", DIRECTORY, dir_fd=self._root)
            if self._target_root is not None:
                self._target = os.open(".", DIRECTORY, dir_fd=self._target_root)
                stack.callback(self._clear_scratch)
            frames = [self._frame("")]
            while True:
                frame = frames[-1]
                if frame.left:
                    below = self._entry(frame, frame.left.pop())
                    if below is not None:
                        frames.append(below)
                    continue
                entry = self._end_directory(frame)
                frames.pop()
                if not frames:
                    return Figures(f"sha256:{hashlib.sha256(entry).hexdigest()}", self._size, self._inodes)
                frames[-1].digest.update(entry)
                self._move("..")

    def _close(self) -> None:
        for fd in (self._source, self._target):
            if fd >= 0:
                os.close(fd)

    def _clear_scratch(self) -> None:
        for _, name in self._links.values():
            if name:
                os.unlink(name, dir_fd=self._scratch)

    def _move(self, name: str) -> None:
        self._source = step(self._source, name)
        if self._target >= 0:
            self._target = step(self._target, name)

    def _frame(self, name: str) -> _Frame:
        names = sorted(os.listdir(self._source), key=_bytes, reverse=True)
        self._size += directory_size(names)
        return _Frame(name, os.fstat(self._source), names)

    def _entry(self, frame: _Frame, name: str) -> _Frame | None:
        """Take one entry of a directory; a directory is returned, to be taken next."""
        status = os.stat(name, dir_fd=self._source, follow_symlinks=False)
        self._inodes += 1
        self._met += 1
        if stat.S_ISDIR(status.st_mode):
            if self._target >= 0:
                os.mkdir(name, 0o700, dir_fd=self._target)
            self._move(name)
            return self._frame(name)
        frame.digest.update(self._leaf(name, status))
        return None

    def _leaf(self, name: str, status: os.stat_result) -> bytes:
        if is_whiteout(status):
            if self._target >= 0:
                os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=self._target)
            return _framed(b"whiteout", _bytes(name))
        # also where its other names are elsewhere, as in a layer that this one was merged into
        shared = status.st_nlink > 1
        first, known = self._links.get(status.st_ino, (0, "")) if shared else (0, "")
        if first:
            self._inodes -= 1
            if self._target >= 0:
                os.link(known, name, src_dir_fd=self._scratch, dst_dir_fd=self._target)
            return _framed(b"link", _bytes(name), _number(first))
        kind, detail, attributes, kept = self._content(name, status)
        if shared:
            at = str(self._met) if self._target >= 0 else ""
            if at:
                fds = {"src_dir_fd": self._target, "dst_dir_fd": self._scratch}
                os.link(name, at, follow_symlinks=False, **fds)
            self._links[status.st_ino] = self._met, at
        return _framed(kind, _bytes(name), self._owner(kept), detail, attributes)

    def _content(self, name: str, status: os.stat_result) -> tuple[bytes, bytes, bytes, os.stat_result]:
        """Kind, digest or target, extended attributes, and the status as it is kept."""
        mode = status.st_mode
        if stat.S_ISREG(mode):
            return self._file(name, status)
        if stat.S_ISLNK(mode):
            aim = os.readlink(name, dir_fd=self._source)
            self._size += link_size(len(_bytes(aim)))
            if self._target >= 0:
                os.symlink(aim, name, dir_fd=self._target)
            return b"symlink", _bytes(aim), b"", self._settled(name, status)
        kinds = {stat.S_IFIFO: b"fifo", stat.S_IFSOCK: b"socket"}
        if (kind := kinds.get(stat.S_IFMT(mode))) is None:
            raise errors.WorkspaceUnfit(f"the files cannot be kept: {name!a} is a device")
        if self._target >= 0:
            os.mknod(name, stat.S_IFMT(mode) | 0o600, dir_fd=self._target)
        return kind, b"", b"", self._settled(name, status)

    def _settled(self, name: str, status: os.stat_result) -> os.stat_result:
        """Give what was made its owner, mode and time; returns what became of it."""
        if self._target < 0:
            return status
        os.chown(name, *self._ids(status), dir_fd=self._target, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=self._target)
        times = (status.st_mtime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=self._target, follow_symlinks=False)
        return os.stat(name, dir_fd=self._target, follow_symlinks=False)

    def _file(self, name: str, status: os.stat_result) -> tuple[bytes, bytes, bytes, os.stat_result]:
        with ExitStack() as stack:
            source = os.open(name, FILE, dir_fd=self._source)
            stack.callback(os.close, source)
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode) or found.st_ino != status.st_ino:
                raise errors.HostFailed("a session's files changed while they were kept")
            target = -1
            if self._target >= 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                target = os.open(name, flags, 0o600, dir_fd=self._target)
                stack.callback(os.close, target)
            digest = self._data(source, target, found.st_size)
            attributes = self._attributes(source, target)
            return b"file", digest, attributes, self._settled_file(target, found)

    def _settled_file(self, target: int, status: os.stat_result) -> os.stat_result:
        if target < 0:
            return status
        os.fchown(target, *self._ids(status))
        os.fchmod(target, stat.S_IMODE(status.st_mode))  # after chown(2), which takes setuid away
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
        return os.fstat(target)

    def _data(self, source: int, target: int, size: int) -> bytes:
        """Copy what is no hole, block by block; returns the digest of it."""
        digest, runs, end = hashlib.sha256(), bytearray(), -1
        for begin, until in extents(source, size):
            at = begin
            if target < 0:  # zeros that are there take room, and are not copied
                self._size += whole_blocks(until - at)
            while at < until:
                data = os.pread(source, min(CHUNK, until - at), at)
                if not data:
                    break
                for offset, run in _nonzero(data):
                    where = at + offset
                    if target >= 0:
                        _write_at(target, run, where)
                        self._size += whole_blocks(len(run))
                    if where != end:
                        runs += struct.pack(">q", where)
                    end = where + len(run)
                    digest.update(run)
                at += len(data)
        if target >= 0:
            os.ftruncate(target, size)
        digest.update(struct.pack(">qq", size, len(runs)) + runs)
        return digest.digest()

    def _attributes(self, source: int, target: int) -> bytes:
        """Copy the extended attributes that are kept; returns them framed."""
        kept = []
        for name in sorted(os.listxattr(source)):
            if name.startswith("user.") and not name.startswith("user.overlay."):
                value = os.getxattr(source, name)
            elif name in ACLS:
                value = _moved(os.getxattr(source, name), self._base)
            else:
                continue
            kept += [os.fsencode(name), value]
            if target >= 0:
                os.setxattr(target, name, value)
        self._size += whole_blocks(sum(ROW + len(one) for one in kept))
        return _framed(*kept)

    def _end_directory(self, frame: _Frame) -> bytes:
        source, target = self._source, self._target
        opaque = is_opaque(source)
        if opaque and target >= 0:
            os.setxattr(target, OPAQUE, b"y")
        attributes = self._attributes(source, target)
        kept = self._settled_file(target, frame.status)
        kind = b"opaque" if opaque else b"directory"
        return _framed(kind, _bytes(frame.name), self._owner(kept), frame.digest.digest(), attributes)

    def _ids(self, status: os.stat_result) -> tuple[int, int]:
        ids = status.st_uid - self._base, status.st_gid - self._base
        if self._base and not all(0 <= one < IDS for one in ids):
            raise errors.HostFailed("a session's files belong to somebody outside of the container")
        return ids

    def _owner(self, status: os.stat_result) -> bytes:
        """Mode, owner and time of what is kept, whose ids are the container's."""
        uid, gid = (
            (status.st_uid, status.st_gid) if self._target >= 0 or not self._base else self._ids(status)
        )
        owner = struct.pack(">III", stat.S_IMODE(status.st_mode), uid, gid)
        if -(1 << 63) <= status.st_mtime_ns < 1 << 63:
            return owner + _number(status.st_mtime_ns)
        # before 1677 or after 2262
        return owner + struct.pack(">qI", *divmod(status.st_mtime_ns, 10**9))


def _bytes(name: str) -> bytes:
    return os.fsencode(name)


def _number(value: int) -> bytes:
    return struct.pack(">q", value)


def _framed(*fields: bytes) -> bytes:
    return b"".join(struct.pack(">q", len(one)) + one for one in (_number(len(fields)), *fields))


def is_opaque(directory: int) -> bool:
    """Whether a directory of a layer, a descriptor, hides those below. Raises OSError."""
    try:
        return os.getxattr(directory, OPAQUE) == b"y"
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
            return False
        raise


def extents(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file is no hole, in whole blocks but for its end: begin and end. Raises OSError."""
    end = 0
    while end < size:
        try:
            at = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole is left
                raise
            return
        begin, end = at // BLOCK * BLOCK, min(size, whole_blocks(os.lseek(file, at, os.SEEK_HOLE)))
        yield begin, end


def _nonzero(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The longest runs of blocks that are not all zeros."""
    tail = data[len(data) // BLOCK * BLOCK :]
    if ZEROS not in data and not (tail and tail.count(0) == len(tail)):
        yield 0, data
        return
    begun = None
    for at in range(0, len(data), BLOCK):
        block = data[at : at + BLOCK]
        if block.count(0) == len(block):
            if begun is not None:
                yield begun, data[begun:at]
                begun = None
        elif begun is None:
            begun = at
    if begun is not None:
        yield begun, data[begun:]


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _moved(acl: bytes, base: int) -> bytes:
    """An access list with the container's ids. Raises WorkspaceUnfit for one that speaks of others."""
    if not base:
        return acl
    parts = [acl[:4]]
    for tag, permissions, who in struct.iter_unpack("<HHI", acl[4:]):
        if tag in {ACL_USER, ACL_GROUP}:
            if not 0 <= who - max(base, 0) < IDS:
                raise errors.WorkspaceUnfit("the files cannot be kept: an access list names an unknown id")
            parts.append(struct.pack("<HHI", tag, permissions, who - base))
        else:
            parts.append(struct.pack("<HHI", tag, permissions, who))
    return b"".join(parts)


def dress(target: int, layer: int, base: int) -> None:
    """Give a directory what the root of a layer has, with a container's ids on the host. Raises OSError."""
    status = os.fstat(layer)
    for name in os.listxattr(layer):
        if name.startswith("user."):
            os.setxattr(target, name, os.getxattr(layer, name))
        elif name in ACLS:
            os.setxattr(target, name, _moved(os.getxattr(layer, name), -base))
    os.fchown(target, base + status.st_uid, base + status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))


def is_same(one: int, other: int, base: int) -> bool:
    """Whether an upper layer (a descriptor) is as it was dressed, with nothing in it. Raises OSError."""

    def attributes(fd: int, base: int) -> dict[str, bytes]:
        kept = {name: os.getxattr(fd, name) for name in os.listxattr(fd) if name.startswith("user.")}
        return kept | {name: _moved(os.getxattr(fd, name), base) for name in ACLS if name in os.listxattr(fd)}

    ours, theirs = os.fstat(one), os.fstat(other)
    return (
        not os.listdir(one)
        and (ours.st_mode, ours.st_uid - base, ours.st_gid - base)
        == (theirs.st_mode, theirs.st_uid, theirs.st_gid)
        and attributes(one, base) == attributes(other, 0)
    )
