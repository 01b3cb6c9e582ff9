"""One layer of a workspace: what a call changed, in the format of overlayfs, and its digest.

Theory of operation.  A call writes to the upper layer of an overlay, a tmpfs. When it commits, all its
processes are dead, and ``take`` walks through that tree and gives what is in it to a sink: with the
container's own ids, without holes, and with nothing that a tool could have written for overlayfs to believe.
A sink is a directory on disk (``layerfiles``) or a few bytes (``layerpack``). Names, links and sizes are the
tool's, so nothing is opened by a path: the walk steps from directory to directory by single names that are no
links, and back by ``..``, with one descriptor whatever the depth.

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from sandboxd import errors
from sandboxd.workspace.tree import DIRECTORY, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "DIRECTORY",
    "FILE",
    "IDS",
    "OPAQUE",
    "Attributes",
    "Figures",
    "Looks",
    "Owner",
    "Sink",
    "directory_size",
    "dress",
    "extents",
    "flat",
    "framed",
    "has",
    "is_opaque",
    "is_same",
    "is_whiteout",
    "link_size",
    "mapped",
    "measure",
    "owned",
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

Attributes: TypeAlias = "list[tuple[str, bytes]]"
"""Extended attributes by their names, sorted."""


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


class Owner(NamedTuple):
    """Mode, ids within the container, and time of change in nanoseconds."""

    mode: int
    uid: int
    gid: int
    mtime: int


class Looks(NamedTuple):
    """A file but for its content: its size, owner and attributes, and how many names it has."""

    size: int
    owner: Owner
    attributes: Attributes
    names: int


class Sink(Protocol):
    """Where a walk puts what it meets: each entry in the directory that was entered last.

    What has an owner is given back as it was kept.
    """

    def enter(self, name: str) -> None:
        """Make a directory and go into it; not said of the first."""

    def leave(self, owner: Owner, attributes: Attributes, *, opaque: bool) -> Owner:
        """The directory is complete; go back to the one above, if there is one."""

    def whiteout(self, name: str) -> None:
        """There is none of this name."""

    def symlink(self, name: str, aim: str, owner: Owner) -> Owner:
        """A symbolic link."""

    def node(self, name: str, kind: int, owner: Owner) -> Owner:
        """A FIFO or socket, by its bits of the mode."""

    def begin(self, name: str, looks: Looks | None = None) -> None:
        """A file, whose runs and end follow; ``looks``: as it will be, where that is known already."""

    def run(self, data: bytes, offset: int) -> None:
        """Bytes of the file, after all that were before."""

    def end(self, size: int, attributes: Attributes, owner: Owner) -> Owner:
        """The file is complete; what no run gave is a hole."""

    def first(self, name: str, number: int) -> None:
        """The entry just made has other names."""

    def again(self, name: str, number: int) -> None:
        """Another name of that entry."""


def take(upper: int, sink: Sink, base: int) -> Figures:
    """Give what an upper layer (a descriptor) holds to ``sink``; nobody else may be at work in it.

    ``base`` is the host id of the container's root. Raises WorkspaceUnfit for what no layer can hold,
    HostFailed, OSError.
    """
    return _Walk(upper, sink, base).run()


def measure(layer: int, step: Callable[[], None] | None = None) -> Figures:
    """The figures of a layer as it stands; ``step`` is called now and then, and may raise.

    Raises HostFailed, WorkspaceUnfit.
    """
    with mapped(layer):
        return _Walk(layer, None, 0, step).run()


@contextmanager
def mapped(into: int) -> Iterator[None]:
    """OSError of a file system as WorkspaceUnfit or HostFailed; ``into`` is a descriptor there."""
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
    """One walk through a tree, in the order of names; ``sink`` None: it is only measured."""

    def __init__(
        self, source: int, sink: Sink | None, base: int, each: Callable[[], None] | None = None
    ) -> None:
        self._each = each
        self._root = source
        self._sink = sink
        self._base = base
        self._source = -1
        self._links: dict[int, int] = {}
        self._size = 0
        self._inodes = 0
        self._met = 0

    def run(self) -> Figures:
        self._source = os.open(".", DIRECTORY, dir_fd=self._root)
        try:
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
                self._source = step(self._source, "..")
        finally:
            os.close(self._source)

    def _frame(self, name: str) -> _Frame:
        names = sorted(os.listdir(self._source), key=_bytes, reverse=True)
        self._size += directory_size(names)
        return _Frame(name, os.fstat(self._source), names)

    def _entry(self, frame: _Frame, name: str) -> _Frame | None:
        """Take one entry of a directory; a directory is returned, to be taken next."""
        if self._each is not None:
            self._each()
        status = os.stat(name, dir_fd=self._source, follow_symlinks=False)
        self._inodes += 1
        self._met += 1
        if stat.S_ISDIR(status.st_mode):
            if self._sink is not None:
                self._sink.enter(name)
            self._source = step(self._source, name)
            return self._frame(name)
        frame.digest.update(self._leaf(name, status))
        return None

    def _leaf(self, name: str, status: os.stat_result) -> bytes:
        if is_whiteout(status):
            if self._sink is not None:
                self._sink.whiteout(name)
            return framed(b"whiteout", _bytes(name))
        # also where its other names are elsewhere, as in a layer that this one was merged into
        shared = status.st_nlink > 1
        if shared and (first := self._links.get(status.st_ino)):
            self._inodes -= 1
            if self._sink is not None:
                self._sink.again(name, first)
            return framed(b"link", _bytes(name), _number(first))
        kind, detail, attributes, kept = self._content(name, status)
        if shared:
            self._links[status.st_ino] = self._met
            if self._sink is not None:
                self._sink.first(name, self._met)
        return framed(kind, _bytes(name), owned(kept), detail, attributes)

    def _content(self, name: str, status: os.stat_result) -> tuple[bytes, bytes, bytes, Owner]:
        """Kind, digest or target, extended attributes, and the owner as it is kept."""
        mode, owner = status.st_mode, self._owner(status)
        if stat.S_ISREG(mode):
            return self._file(name, status)
        if stat.S_ISLNK(mode):
            aim = os.readlink(name, dir_fd=self._source)
            self._size += link_size(len(_bytes(aim)))
            kept = owner if self._sink is None else self._sink.symlink(name, aim, owner)
            return b"symlink", _bytes(aim), b"", kept
        kinds = {stat.S_IFIFO: b"fifo", stat.S_IFSOCK: b"socket"}
        if (kind := kinds.get(stat.S_IFMT(mode))) is None:
            raise errors.WorkspaceUnfit(f"the files cannot be kept: {name!a} is a device")
        kept = owner if self._sink is None else self._sink.node(name, stat.S_IFMT(mode), owner)
        return kind, b"", b"", kept

    def _file(self, name: str, status: os.stat_result) -> tuple[bytes, bytes, bytes, Owner]:
        source = os.open(name, FILE, dir_fd=self._source)
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode) or found.st_ino != status.st_ino:
                raise errors.HostFailed("a session's files changed while they were kept")
            attributes, kept = self._attributes(source), self._owner(found)
            if self._sink is not None:
                self._sink.begin(name, Looks(found.st_size, kept, attributes, found.st_nlink))
            digest = self._data(source, found.st_size)
            if self._sink is not None:
                kept = self._sink.end(found.st_size, attributes, kept)
            return b"file", digest, flat(attributes), kept
        finally:
            os.close(source)

    def _data(self, source: int, size: int) -> bytes:
        """Give on what is no hole, block by block; returns the digest of it."""
        digest, runs, end = hashlib.sha256(), bytearray(), -1
        for begin, until in extents(source, size):
            at = begin
            if self._sink is None:  # zeros that are there take room, and are not kept
                self._size += whole_blocks(until - at)
            while at < until:
                if self._each is not None:
                    self._each()
                data = os.pread(source, min(CHUNK, until - at), at)
                if not data:
                    break
                for offset, run in _nonzero(data):
                    where = at + offset
                    if self._sink is not None:
                        self._sink.run(run, where)
                        self._size += whole_blocks(len(run))
                    if where != end:
                        runs += struct.pack(">q", where)
                    end = where + len(run)
                    digest.update(run)
                at += len(data)
        digest.update(struct.pack(">qq", size, len(runs)) + runs)
        return digest.digest()

    def _attributes(self, source: int) -> Attributes:
        kept = has(source, self._base)
        self._size += whole_blocks(sum(2 * ROW + len(_bytes(name)) + len(value) for name, value in kept))
        return kept

    def _end_directory(self, frame: _Frame) -> bytes:
        opaque = is_opaque(self._source)
        attributes, kept = self._attributes(self._source), self._owner(frame.status)
        if self._sink is not None:
            kept = self._sink.leave(kept, attributes, opaque=opaque)
        kind = b"opaque" if opaque else b"directory"
        return framed(kind, _bytes(frame.name), owned(kept), frame.digest.digest(), flat(attributes))

    def _owner(self, status: os.stat_result) -> Owner:
        uid, gid = status.st_uid - self._base, status.st_gid - self._base
        if self._base and not (0 <= uid < IDS and 0 <= gid < IDS):
            raise errors.HostFailed("a session's files belong to somebody outside of the container")
        return Owner(stat.S_IMODE(status.st_mode), uid, gid, status.st_mtime_ns)


def has(source: int, base: int) -> Attributes:
    """The extended attributes of a file or directory that are kept. Raises OSError, WorkspaceUnfit."""
    kept = []
    for name in sorted(os.listxattr(source)):
        if name.startswith("user.") and not name.startswith("user.overlay."):
            value = os.getxattr(source, name)
        elif name in ACLS:
            value = _moved(os.getxattr(source, name), base)
        else:
            continue
        kept.append((name, value))
    return kept


def owned(owner: Owner) -> bytes:
    """What of a digest an owner is."""
    owned = struct.pack(">III", owner.mode, owner.uid, owner.gid)
    if -(1 << 63) <= owner.mtime < 1 << 63:
        return owned + _number(owner.mtime)
    # before 1677 or after 2262
    return owned + struct.pack(">qI", *divmod(owner.mtime, 10**9))


def flat(attributes: Attributes) -> bytes:
    """What of a digest extended attributes are."""
    return framed(*(part for name, value in attributes for part in (_bytes(name), value)))


def _bytes(name: str) -> bytes:
    return os.fsencode(name)


def _number(value: int) -> bytes:
    return struct.pack(">q", value)


def framed(*fields: bytes) -> bytes:
    """Fields one behind the other, so that no others look the same."""
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
