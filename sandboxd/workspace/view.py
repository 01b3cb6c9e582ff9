"""What a stack of layers shows: the files that overlayfs would, read without mounting anything.

Theory of operation.  A layer is a directory in the format of an overlay's upper one: a character device
0:0 (a whiteout) hides a name of the layers below, a directory with ``trusted.overlay.opaque`` hides what
they have in it, and so does a file the directory that they have by its name
(Documentation/filesystems/overlayfs.rst). What a directory shows is therefore decided by the layers that
have it and may be seen through, its *members*, the uppermost first; each step of a lookup asks the
members alone, so that it costs what the depth of the path and the number of layers say, however many
files there are. The root is every layer's, whatever it is marked as.

Layers are the work of tools. All is opened as ``kernel.files`` has it, beneath a layer's root and through
no link, and only regular files are opened for reading. Nothing here keeps descriptors but those of the
roots, and no function calls itself.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from sandboxd import errors, units
from sandboxd.kernel import files
from sandboxd.workspace.effort import ENDLESS
from sandboxd.workspace.tree import join, open_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sandboxd.digests import Digests
    from sandboxd.kernel.rights import Rights
    from sandboxd.workspace.effort import Effort

__all__ = ["MAX_NAMES", "OPAQUE", "Entry", "Kind", "Lent", "View", "is_opaque", "is_whiteout"]

OPAQUE = "trusted.overlay.opaque"
MAX_NAMES = 100_000
"""Names that one directory may have over all layers; more are refused, since they are sorted in memory."""
MAX_PENDING = 4 * MAX_NAMES
"""Entries of a walk that wait at once, of all directories on the way; more are refused as well."""
_CHUNK = 1 << 20
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_LOOKED_AT = os.O_PATH | os.O_NOFOLLOW

Kind = Literal["file", "directory", "symlink", "fifo", "socket", "device"]
_KINDS: dict[int, Kind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One file that a stack shows. ``path`` is from the root, which is empty; ``mode`` has no type in it.

    ``members`` are the layers, by number from the uppermost, that make it: one, or more for a directory.
    ``inode`` is device and inode: what is the same there is the same file.
    """

    path: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    links: int
    inode: tuple[int, int]
    members: tuple[int, ...]

    @property
    def name(self) -> bytes:
        """The last part of the path."""
        return self.path.rpartition(b"/")[2]

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == "directory"


def is_whiteout(status: os.stat_result) -> bool:
    """Whether an entry of a layer says that there is none of its name."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(directory: int) -> bool:
    """Whether a directory of a layer hides what lower ones have in it; any descriptor of it will do."""
    try:
        return os.getxattr(f"/proc/self/fd/{directory}", OPAQUE) == b"y"
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
            return False
        raise


def entry_of(path: bytes, status: os.stat_result, members: tuple[int, ...]) -> Entry:
    """The entry of what is at a path."""
    return Entry(
        path=path,
        kind=_KINDS.get(stat.S_IFMT(status.st_mode), "device"),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if stat.S_ISREG(status.st_mode) else 0,
        mtime_ns=status.st_mtime_ns,
        links=status.st_nlink,
        inode=(status.st_dev, status.st_ino),
        members=members,
    )


@contextmanager
def _mapped(path: bytes) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        shown = ascii(os.fsdecode(path[:200]))
        if error.errno == errno.EACCES:  # in a directory that a caller lends, which has others' files too
            raise errors.NotPermitted(f"{shown} of a session is not its caller's to read") from error
        raise errors.HostFailed(f"{shown} of a session cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Lent:
    """A caller's directory as a layer, read with the caller's rights; ``root`` stays yours to close."""

    root: int
    rights: Rights


class View:
    """A stack of layers, the uppermost first. A context manager that holds a descriptor of each layer.

    A layer is a path of our own, or a directory that is lent, as the lowest. The methods block on the disk,
    and raise HostFailed where that fails, NotPermitted where a directory that is lent has what its caller
    may not read, and RequestTimeout where it is more than the ``effort`` that is made. Threads may share it.
    """

    def __init__(
        self, layers: Sequence[Path | Lent], effort: Effort = ENDLESS, digests: Digests | None = None
    ) -> None:
        """``digests`` are of files in layers of our own, which do not change."""
        self.layers = tuple(layers)
        self.effort = effort
        self._digests = digests
        self._as = [one.rights.held if isinstance(one, Lent) else nullcontext for one in self.layers]
        self._roots: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for layer in self.layers:
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                try:
                    path, beside = (".", layer.root) if isinstance(layer, Lent) else (layer, None)
                    root = os.open(path, flags, dir_fd=beside)
                except OSError as error:
                    name = "" if isinstance(layer, Lent) else f" {layer.name}"
                    raise errors.HostFailed(
                        f"layer{name} of a session is not there: {error.strerror}"
                    ) from error
                stack.callback(os.close, root)
                self._roots.append(root)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._roots.clear()
        self._stack.close()

    def root(self) -> Entry:
        """The root; of a stack of no layers, an empty directory of nobody's."""
        if not self._roots:
            return Entry(b"", "directory", 0o755, 0, 0, 0, 0, 1, (0, 0), ())
        with _mapped(b""):
            return entry_of(b"", os.fstat(self._roots[0]), tuple(range(len(self._roots))))

    def find(self, path: bytes) -> Entry | None:
        """What is at a path, links not followed; None where nothing is, or where no directory leads there.

        ``path`` is empty for the root. Raises InvalidRequest for one that no file can have.
        """
        entry: Entry | None = self.root()
        for name in files.split_path(path) if path else ():
            if entry is None or not entry.is_directory:
                return None
            entry = self.child(entry, name)
        return entry

    def child(self, directory: Entry, name: bytes) -> Entry | None:
        """What a directory of this view has by a name, or None."""
        self.effort.step()
        path = join(directory.path, name)
        found: os.stat_result | None = None
        members: list[int] = []
        with _mapped(path):
            for number in directory.members:
                try:
                    with self._as[number]():
                        fd = open_at(self._roots[number], path, _LOOKED_AT)
                except OSError as error:
                    # The directory was in this layer; in one that changes under us it need not be any more.
                    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                        continue
                    raise
                try:
                    status = os.fstat(fd)
                    is_directory = stat.S_ISDIR(status.st_mode)
                    if is_whiteout(status) or (found is not None and not is_directory):
                        break
                    found = found or status
                    members.append(number)
                    if not is_directory or is_opaque(fd):
                        break
                finally:
                    os.close(fd)
        return entry_of(path, found, tuple(members)) if found is not None else None

    def children(self, directory: Entry) -> list[Entry]:
        """What a directory of this view has, in the order of the bytes of their names.

        Raises TooLarge over ``MAX_NAMES``.
        """
        found: dict[bytes, tuple[os.stat_result, list[int]] | None] = {}
        closed: set[bytes] = set()
        for number in directory.members:
            with _mapped(directory.path), self._as[number]():
                fd = open_at(self._roots[number], directory.path, _LISTED)
                try:
                    self._look(fd, number, found, closed)
                finally:
                    os.close(fd)
        shown = [
            entry_of(join(directory.path, name), one[0], tuple(one[1]))
            for name, one in found.items()
            if one is not None
        ]
        shown.sort(key=lambda entry: entry.path)
        return shown

    def _look(
        self,
        fd: int,
        number: int,
        found: dict[bytes, tuple[os.stat_result, list[int]] | None],
        closed: set[bytes],
    ) -> None:
        """Add what a directory of one layer has: a name in ``closed`` is decided by the layers above."""
        for name in names_of(fd):
            self.effort.step()
            if name in closed:
                continue
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            above = found.get(name)
            is_directory = stat.S_ISDIR(status.st_mode)
            if is_whiteout(status):
                found.setdefault(name, None)
            elif above is None:
                found[name] = (status, [number])
            elif is_directory:
                above[1].append(number)
            if not is_directory or _is_opaque_in(fd, name):
                closed.add(name)
            if len(found) > MAX_NAMES:
                most = units.format_count(MAX_NAMES)
                raise errors.TooLarge(
                    f"a directory of the session has more than {most} names", limit=MAX_NAMES
                )

    def walk(
        self, start: Entry | None = None, *, into: Callable[[Entry], bool] | None = None
    ) -> Iterator[Entry]:
        """All that is beneath a directory of this view, or the root: a directory before what it has.

        Directories that ``into`` says no to are not looked into. Raises TooLarge over ``MAX_PENDING``.
        """
        pending = list(reversed(self.children(start or self.root())))
        while pending:
            entry = pending.pop()
            yield entry
            if entry.is_directory and (into is None or into(entry)):
                pending.extend(reversed(self.children(entry)))
                check_pending(len(pending))

    def target(self, entry: Entry) -> bytes:
        """Where a symbolic link of this view points to."""
        with _mapped(entry.path), self._as[entry.members[0]]():
            fd = open_at(self._roots[entry.members[0]], entry.path, _LOOKED_AT)
            try:
                return os.readlink(b"", dir_fd=fd)
            finally:
                os.close(fd)

    @contextmanager
    def opened(self, entry: Entry) -> Iterator[int]:
        """A descriptor for reading a regular file of this view. Raises StateConflict for what is none."""
        if entry.kind != "file":
            raise errors.StateConflict(f"{os.fsdecode(entry.path)!a} is no file but a {entry.kind}")
        with _mapped(entry.path), self._as[entry.members[0]]():
            root, _, name = entry.path.rpartition(b"/")
            above = open_at(self._roots[entry.members[0]], root, os.O_PATH | os.O_DIRECTORY)
            try:
                fd, _status = files.open_regular(above, name)
            finally:
                os.close(above)
        try:
            yield fd
        finally:
            os.close(fd)

    def content(self, entry: Entry, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes of a regular file from ``start`` on, in chunks: ``length``, or all of ``entry.size``.

        Raises StateConflict for what is no file.
        """
        with self.opened(entry) as fd:
            yield from self._chunks(fd, entry, start, entry.size - start if length is None else length)

    def _chunks(self, fd: int, entry: Entry, at: int, left: int) -> Iterator[bytes]:
        while left:
            self.effort.step()
            with _mapped(entry.path):
                chunk = os.pread(fd, min(left, _CHUNK), at)
            if not chunk:
                raise errors.HostFailed(f"{os.fsdecode(entry.path)!a} of a session has lost its end")
            at, left = at + len(chunk), left - len(chunk)
            yield chunk

    def digest(self, entry: Entry, *, most: int | None = None) -> str:
        """The SHA-256 of a regular file, ``sha256:…``. Raises as ``content``; TooLarge over ``most``."""
        if most is not None and entry.size > most:
            shown = ascii(os.fsdecode(entry.path))
            raise errors.TooLarge(f"{shown} is larger than {units.format_size(most)}", limit=most)

        def read() -> str:
            digest = hashlib.sha256()
            for chunk in self._chunks(fd, entry, 0, entry.size):
                digest.update(chunk)
            return f"sha256:{digest.hexdigest()}"

        with self.opened(entry) as fd:
            if self._digests is None or isinstance(self.layers[entry.members[0]], Lent):
                return read()
            with _mapped(entry.path):
                return self._digests.of(fd, entry.size, read)

    def names(self, directory: Entry, layers: Sequence[int]) -> set[bytes]:
        """The names that some of a directory's members have in it, whiteouts too. Raises TooLarge."""
        found: set[bytes] = set()
        for number in layers:
            with _mapped(directory.path), self._as[number]():
                fd = open_at(self._roots[number], directory.path, _LISTED)
                try:
                    found.update(names_of(fd))
                finally:
                    os.close(fd)
        return found


def check_pending(count: int) -> None:
    """Raises TooLarge over ``MAX_PENDING``."""
    if count > MAX_PENDING:
        raise errors.TooLarge(
            f"the session has more than {units.format_count(MAX_PENDING)} files beside each other",
            limit=MAX_PENDING,
        )


def names_of(directory: int) -> list[bytes]:
    """The names in an open directory. Raises TooLarge over ``MAX_NAMES``."""
    found: list[bytes] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if len(found) >= MAX_NAMES:
                most = units.format_count(MAX_NAMES)
                raise errors.TooLarge(
                    f"a directory of the session has more than {most} names", limit=MAX_NAMES
                )
            found.append(os.fsencode(entry.name))
    return found


def _is_opaque_in(directory: int, name: bytes) -> bool:
    """The same of a directory by its name in another."""
    try:
        path = b"/proc/self/fd/%d/%s" % (directory, name)
        return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT}:
            return False
        raise
