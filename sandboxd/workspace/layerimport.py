"""A layer of the OCI image specification (layer.md), made into one of overlayfs.

Theory of operation.  The archive is hostile, and so are the layers that it is put over. A name is split
and its parent opened beneath the new layer, through no link; whiteouts become devices 0:0 and opaque
directories get their mark. A layer decides what its directories look like, so one that the archive only
implies has the attributes that it has below. A whiteout of what is not there is left out, as overlayfs
would list it.

Where the archive has a file in a directory that is a link or a file below, it is refused: another program
would follow the link, and none here does. Devices are refused, extended attributes are left out.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sandboxd import errors, units
from sandboxd.images.tarstream import Budget, ImportLimits, TarStream
from sandboxd.kernel import files
from sandboxd.workspace.layertar import OPAQUE_MARK, WHITEOUT
from sandboxd.workspace.tree import join, open_at, remove_tree, shown, typed
from sandboxd.workspace.view import OPAQUE, is_whiteout

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.images.tarstream import ByteStream, Entry
    from sandboxd.workspace.view import Entry as FileEntry
    from sandboxd.workspace.view import View

__all__ = ["Imported", "import_layer"]

MAX_ID = 65_535
"""The highest id of a container."""
MAX_REMEMBERED = 64 << 20
_CHUNK = 1 << 18
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
FAILED = "cannot be made"
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True)
class Imported:
    """What an archive became: its entries, and bytes read of it."""

    entries: int
    size: int


def import_layer(
    stream: ByteStream,
    into: int,
    below: View,
    *,
    owner: tuple[int, int],
    own: bool = False,
    limits: ImportLimits | None = None,
) -> Imported:
    """Unpack a tar into an empty directory (a descriptor), as a layer over those of a view.

    ``owner`` has what neither the archive nor the view says of; with ``own`` all of the archive. Blocks. What
    was unpacked when it raises is the caller's to remove. Raises InvalidRequest for what is damaged, hostile
    or of another kind, TooLarge, HostFailed.
    """
    budget = Budget(limits or ImportLimits())
    try:
        unpacked = _Import(into, below, owner, budget)
        tar = TarStream(stream, budget, marked=True)
        for entry in tar:
            below.effort.step()
            unpacked.add(tar, replace(entry, uid=owner[0], gid=owner[1]) if own else entry)
        while stream.read(_CHUNK):  # to its end: a checksum of all may stand there
            pass
        unpacked.finish()
    except errors.ImageInvalid as error:
        kind = errors.TooLarge if "limit" in error.details else errors.InvalidRequest
        raise kind(str(error), **error.details) from error
    return Imported(budget.entries, budget.total)


class _Import:
    def __init__(self, into: int, below: View, owner: tuple[int, int], budget: Budget) -> None:
        self._into = into
        self._budget = budget
        self._below = below
        self._owner = owner
        self._remembered = 0
        self._whiteouts: set[bytes] = set()
        self._opaque: set[bytes] = set()
        with typed(b"", FAILED):
            self._describe(into, below.root() if below.layers else None)

    def add(self, tar: TarStream, entry: Entry) -> None:
        """Take one entry of the archive."""
        path = b"/".join(part for part in entry.path.split(b"/") if part not in {b"", b"."})
        if not path:
            return  # the root is ours
        parts = files.split_path(path)
        if any(part.startswith(WHITEOUT) for part in parts[:-1]):
            raise errors.InvalidRequest(f"{shown(path)} is in a directory named as a whiteout")
        if parts[-1].startswith(WHITEOUT):
            self._mark(b"/".join(parts[:-1]), parts[-1])
            return
        if max(entry.uid, entry.gid) > MAX_ID:
            raise errors.InvalidRequest(f"{shown(path)} has an id over {MAX_ID}, the last of a container")
        parent = self._directory(b"/".join(parts[:-1]))
        try:
            with typed(path, FAILED):
                self._place(tar, entry, parent, parts[-1], path)
        finally:
            os.close(parent)

    def finish(self) -> None:
        """Settle what depends on all entries: an opaque root, and whiteouts that nothing is below of."""
        if b"" in self._opaque:
            for one in self._below.children(self._below.root()):
                self._hide(one.path)
        if not self._opaque - {b""}:
            return
        for path in self._whiteouts:
            self._below.effort.step()
            above = path
            while above:
                above = above.rpartition(b"/")[0]
                if above and above in self._opaque:
                    self._drop_whiteout(path)
                    break

    def _drop_whiteout(self, path: bytes) -> None:
        above, _, name = path.rpartition(b"/")
        with typed(path, FAILED):
            try:
                parent = open_at(self._into, above, _LISTED)
            except OSError as error:
                if error.errno in _NOT_THERE:  # the archive replaced the directory
                    return
                raise
            try:
                status = _status(parent, name)
                if status is not None and is_whiteout(status):
                    os.unlink(name, dir_fd=parent)
            finally:
                os.close(parent)

    def _mark(self, above: bytes, name: bytes) -> None:
        if name == OPAQUE_MARK:
            if above:
                os.close(self._directory(above))
                self._make_opaque(above)
            else:
                self._opaque.add(b"")
            return
        if name.startswith(WHITEOUT * 2):
            return  # aufs's own books
        hidden = name[len(WHITEOUT) :]
        if hidden in {b"", b".", b".."}:
            raise errors.InvalidRequest(f"{shown(join(above, name))} is no whiteout")
        self._hide(join(above, hidden))

    def _hide(self, path: bytes) -> None:
        """Hide what the layers below have at a path, and nothing that the archive has."""
        if self._below.find(path) is None:
            return
        above, _, name = path.rpartition(b"/")
        parent = self._directory(above)
        try:
            with typed(path, FAILED):
                status = _status(parent, name)
                if status is None:
                    os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent)
                    self._remember(self._whiteouts, path)
                elif stat.S_ISDIR(status.st_mode):
                    self._make_opaque(path)
        finally:
            os.close(parent)

    def _remember(self, paths: set[bytes], path: bytes) -> None:
        """Keep a path until the end. Raises TooLarge where they are more than ``MAX_REMEMBERED`` bytes."""
        if path in paths:
            return
        self._remembered += len(path)
        if self._remembered > MAX_REMEMBERED:
            raise errors.TooLarge(
                "the paths of what the archive removes or replaces are longer than "
                f"{units.format_size(MAX_REMEMBERED)} together; import it in parts",
                limit=MAX_REMEMBERED,
            )
        paths.add(path)

    def _make_opaque(self, path: bytes) -> None:
        self._remember(self._opaque, path)
        with typed(path, FAILED):
            fd = open_at(self._into, path, _LISTED)
            try:
                os.setxattr(fd, OPAQUE, b"y")
            finally:
                os.close(fd)

    def _directory(self, path: bytes) -> int:
        """A directory of the layer, made as it is below where it is not there; the caller closes it."""
        try:
            return open_at(self._into, path, _LISTED)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise errors.HostFailed(f"{shown(path)} cannot be made: {error.strerror}") from error
        here, at = open_at(self._into, b"", _LISTED), b""
        found: FileEntry | None = self._below.root()
        try:
            for name in path.split(b"/"):
                at = join(at, name)
                found = None if found is None or at in self._opaque else self._below.child(found, name)
                with typed(at, FAILED):
                    self._step_into(here, name, at, found)
                    deeper = files.openat2(here, name, _LISTED)
                os.close(here)
                here = deeper
                if at in self._opaque:
                    found = None
        except BaseException:
            os.close(here)
            raise
        return here

    def _step_into(self, parent: int, name: bytes, path: bytes, found: FileEntry | None) -> None:
        status = _status(parent, name)
        if status is None:
            if found is not None and not found.is_directory:
                raise errors.InvalidRequest(
                    f"{shown(path)} would have to be a directory, and is a {found.kind} in the session"
                )
            self._new_directory(parent, name, found)
        elif is_whiteout(status):
            os.unlink(name, dir_fd=parent)
            self._new_directory(parent, name, None)
            self._make_opaque(path)
        elif not stat.S_ISDIR(status.st_mode):
            raise errors.InvalidRequest(
                f"{shown(path)} would have to be a directory, and is a {files.kind_of(status.st_mode)} "
                "in the archive"
            )

    def _new_directory(self, parent: int, name: bytes, found: FileEntry | None) -> None:
        self._budget.entry()  # a name of 4 KiB implies two thousand of them
        os.mkdir(name, 0o700, dir_fd=parent)
        fd = files.openat2(parent, name, _LISTED)
        try:
            self._describe(fd, found)
        finally:
            os.close(fd)

    def _describe(self, fd: int, found: FileEntry | None) -> None:
        """Give a directory the attributes that it has below."""
        os.fchown(fd, *((found.uid, found.gid) if found is not None else self._owner))
        os.fchmod(fd, found.mode if found is not None else 0o755)

    def _place(self, tar: TarStream, entry: Entry, parent: int, name: bytes, path: bytes) -> None:
        status = _status(parent, name)
        if entry.type == "directory":
            self._make_directory(entry, parent, name, path, status)
            return
        make: dict[str, Callable[[], None]] = {
            "file": lambda: _file(tar, entry, parent, name),
            "symlink": lambda: _symlink(entry, parent, name),
            "fifo": lambda: _fifo(entry, parent, name),
            "hardlink": lambda: self._link(entry, parent, name, path),
        }
        if entry.type not in make:
            raise errors.InvalidRequest(f"{shown(path)} is a device, which no session holds")
        if status is not None and entry.type != "hardlink":
            remove_tree(parent, name)
        make[entry.type]()

    def _make_directory(
        self, entry: Entry, parent: int, name: bytes, path: bytes, status: os.stat_result | None
    ) -> None:
        if status is None or not stat.S_ISDIR(status.st_mode):
            if status is not None:
                os.unlink(name, dir_fd=parent)
            os.mkdir(name, 0o700, dir_fd=parent)
            if status is not None:  # what was there, a whiteout or a file, hid what is below
                self._make_opaque(path)
        fd = files.openat2(parent, name, _LISTED)
        try:
            os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, entry.mode)
        finally:
            os.close(fd)

    def _link(self, entry: Entry, parent: int, name: bytes, path: bytes) -> None:
        aim = b"/".join(part for part in entry.target.split(b"/") if part not in {b"", b"."})
        files.split_path(aim)
        if aim == path:
            raise errors.InvalidRequest(f"{shown(path)} is a hard link to itself")
        try:
            source = open_at(self._into, aim, os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            raise errors.InvalidRequest(
                f"{shown(path)} is a hard link to {shown(aim)}, which the archive does not have"
            ) from error
        try:
            found = os.fstat(source)
            if stat.S_ISDIR(found.st_mode) or is_whiteout(found):
                raise errors.InvalidRequest(f"{shown(path)} is a hard link to {shown(aim)}, which is no file")
            remove_tree(parent, name)
            above, _, last = aim.rpartition(b"/")
            directory = open_at(self._into, above, _LISTED)
            try:
                os.link(last, name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(directory)
        finally:
            os.close(source)


def _file(tar: TarStream, entry: Entry, parent: int, name: bytes) -> None:
    fd = files.openat2(parent, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        for chunk in tar.content():
            if chunk.count(0) == len(chunk):
                os.lseek(fd, len(chunk), os.SEEK_CUR)  # a hole
                continue
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(fd, rest) :]
        os.ftruncate(fd, entry.size)
        os.fchown(fd, entry.uid, entry.gid)  # before the mode: it clears the set-id bits
        os.fchmod(fd, entry.mode)
        os.utime(fd, (entry.mtime, entry.mtime))
    finally:
        os.close(fd)


def _symlink(entry: Entry, parent: int, name: bytes) -> None:
    if not entry.target or len(entry.target) > files.MAX_PATH or b"\0" in entry.target:
        raise errors.InvalidRequest(f"{shown(name)} is a symbolic link to nothing that can be named")
    os.symlink(entry.target, name, dir_fd=parent)
    os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)


def _fifo(entry: Entry, parent: int, name: bytes) -> None:
    os.mkfifo(name, 0o600, dir_fd=parent)
    os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
    os.chmod(name, entry.mode, dir_fd=parent)


def _status(directory: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
