"""A caller's own directory as the lowest layer of a session: nothing is copied, and nothing of it is
written.

Theory of operation.  The caller opens the directory and passes the descriptor; no path of a caller's is
opened here. The descriptor says that the caller can read that directory, and nothing of what is in it,
while the daemon's root could read all of it. So it is shown through a mount that maps the caller's uid,
and nobody else's, to the tool's: what is the caller's is the tool's, and what is anybody else's belongs
to nobody, where the kernel grants what the mode grants to others, to the daemon's root as well (an id
that is not mapped is beyond CAP_DAC_OVERRIDE, ``capable_wrt_inode_uidgid``). The mount has the directory
as its root and no mount below it, is read-only, ``nosuid``, ``nodev`` and follows no link.

A mode or an access list can also grant to others what it denies to the caller or to a group of the caller's
(0604, ``user:caller:---``). So whoever reads for the caller is the caller to the kernel, with its groups
(``Rights``): the daemon's thread when it reads a view, and the maker of an overlay, by whose credentials
overlayfs looks at a layer after it has looked with the tool's (Documentation/filesystems/overlayfs.rst,
"Permission model").

Made in the mount namespace of the caller, since the kernel clones a mount there only, it is kept at a
place of the daemon's own. The directory may change while sessions stand on it: what a tool sees then is
not defined, but nothing else is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sandboxd import errors
from sandboxd.kernel import mounts
from sandboxd.kernel.inside import in_mount_namespace
from sandboxd.kernel.rights import Rights
from sandboxd.kernel.userns import RANGE, map_namespace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sandboxd.kernel.userns import Extent

__all__ = ["Checkout", "Owner", "check_directory"]

O_PATH = os.O_PATH
MAX_DEPTH = 2048
"""Directories above one that is passed; PATH_MAX has room for no more."""
MOST_NAMESPACES = 4
"""User namespaces that are kept of one directory; each is made again when it is needed."""
MOST_EXTENTS, MOST_TEXT = 336, 4000
"""Of a map of ids, and bytes of its text: what user_namespaces(7) has room for, less a few."""


@dataclass(frozen=True)
class Owner:
    """Who passed a directory: the process, as the kernel tells it."""

    uid: int
    gid: int
    pid: int
    groups: frozenset[int] = frozenset()
    """The supplementary ones."""


def check_directory(directory: int, kept: Sequence[Path]) -> os.stat_result:
    """Whether a descriptor may become a session's lowest layer; returns what it is.

    ``kept`` are paths of the daemon's own: neither they, nor what is in them, nor what they are in, is lent.
    Raises InvalidRequest, HostFailed.
    """
    found = os.fstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise errors.InvalidRequest("what was passed is no directory", field="directory")
    if fcntl.fcntl(directory, fcntl.F_GETFL) & O_PATH:
        raise errors.InvalidRequest(
            "the directory was opened with O_PATH, which does not show that you can read it; open it with "
            "O_RDONLY | O_DIRECTORY",
            field="directory",
        )
    try:
        root = Path("/").stat()
        if (found.st_dev, found.st_ino) == (root.st_dev, root.st_ino):
            raise errors.InvalidRequest(
                "/ is not lent to a session; pass a directory in it", field="directory"
            )
        above = _above(directory)
        for path in kept:
            _check_kept(path, (found.st_dev, found.st_ino), above)
    except OSError as error:
        raise errors.HostFailed(
            f"the directory that was passed cannot be looked at: {error.strerror}"
        ) from error
    return found


def _check_kept(path: Path, passed: tuple[int, int], above: set[tuple[int, int]]) -> None:
    for number, one in enumerate([path, *path.parents]):
        try:
            status = one.stat()
        except FileNotFoundError:
            continue
        identity = status.st_dev, status.st_ino
        if identity == passed:
            raise errors.InvalidRequest(
                f"the directory is or has {path}, which is the daemon's own; pass one that does not",
                field="directory",
            )
        if number == 0 and identity in above:
            raise errors.InvalidRequest(
                f"the directory is in {path}, which is the daemon's own", field="directory"
            )


def _above(directory: int) -> set[tuple[int, int]]:
    """Device and inode of every directory above one, as far as its mount namespace goes."""
    found: set[tuple[int, int]] = set()
    here = os.open(".", O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        for _ in range(MAX_DEPTH):
            above = os.open("..", O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = above
            status = os.fstat(here)
            if (status.st_dev, status.st_ino) in found:
                return found
            found.add((status.st_dev, status.st_ino))
    finally:
        os.close(here)
    raise errors.InvalidRequest("the directory is too deep in others", field="directory")


@dataclass
class Checkout:
    """A directory that is lent to sessions, kept at ``place``. A context manager; ``close`` ends the loan."""

    place: Path
    launcher: Path
    owner: Owner
    identity: tuple[int, int]
    """Device and inode of the directory."""
    _namespaces: OrderedDict[tuple[int, int, int], int] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, directory: int, owner: Owner, *, place: Path, launcher: Path, kept: Sequence[Path]) -> Self:
        """Lend a directory that a caller has passed; the descriptor stays the caller's to close.

        ``place`` does not exist yet, in a directory of a mount namespace of our own. Blocks. Raises
        InvalidRequest, HostFailed.
        """
        found = check_directory(directory, kept)
        try:
            mount = _cloned(directory, owner.pid)
        except OSError as error:
            raise errors.InvalidRequest(
                "the directory cannot be lent: it is on no mount of the process that passed it",
                field="directory",
            ) from error
        try:
            mounts.set_attributes(mount, read_only=True, userns=None, follow_links=False)
            _attach(mount, place)
        except OSError as error:
            raise errors.HostFailed(f"the directory cannot be lent: {error.strerror}") from error
        finally:
            os.close(mount)
        return cls(place, launcher, owner, (found.st_dev, found.st_ino))

    def again(self, place: Path) -> Checkout:
        """The same directory for another session, kept at a place of its own. Blocks. Raises HostFailed."""
        try:
            mount = mounts.clone_tree(self.place)
            try:
                _attach(mount, place)
            finally:
                os.close(mount)
        except OSError as error:
            raise errors.HostFailed(f"the directory cannot be lent: {error.strerror}") from error
        return Checkout(place, self.launcher, self.owner, self.identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory; sessions that are at work in it keep what they have."""
        with self._lock:
            for namespace in self._namespaces.values():
                os.close(namespace)
            self._namespaces.clear()
        mounts.detach(self.place)
        self.place.rmdir()

    def mapped(self, uid: int, gid: int, *, slot: int) -> int:
        """The directory, detached; what is its owner's belongs to these ids of a container. Yours to close.

        ``slot`` is the host id of the container's root, who has the namespace of the map too; with 0 it is
        shown as a layer is, with the container's own ids. Read it with ``rights`` of the same. Raises
        HostFailed; InvalidRequest where the file system knows no maps, or the caller has too many groups.
        """
        with self._lock:
            return self._mapped(uid, gid, slot)

    def rights(self, uid: int, gid: int, *, slot: int) -> Rights:
        """What the kernel grants the caller, in the ids that ``mapped`` shows."""
        moved = _moved(self.owner, gid)
        groups = (moved.get(group, group) for group in self.owner.groups)
        return Rights(slot + uid, slot + gid, tuple(sorted(slot + group for group in groups)))

    def _mapped(self, uid: int, gid: int, slot: int) -> int:
        try:
            namespace = self._namespace(uid, gid, slot)
            mount = mounts.clone_tree(self.place)
        except (OSError, subprocess.SubprocessError) as error:
            raise errors.HostFailed(f"the directory cannot be lent: {error}") from error
        try:
            mounts.set_attributes(mount, read_only=True, userns=namespace, follow_links=False)
        except OSError as error:
            os.close(mount)
            if error.errno == errno.EINVAL:
                raise errors.InvalidRequest(
                    "the directory is on a file system that the kernel cannot map ids of, such as an "
                    "overlay, NFS or FUSE; upload its files instead (--upload)",
                    field="directory",
                ) from error
            raise errors.HostFailed(f"the directory cannot be lent: {error}") from error
        return mount

    def _namespace(self, uid: int, gid: int, slot: int) -> int:
        """Good until the lock is let go of: only some are kept."""
        key = uid, gid, slot
        if key not in self._namespaces:
            uids, gids = [(self.owner.uid, slot + uid, 1)], _groups(self.owner, gid, slot)
            self._namespaces[key] = map_namespace(self.launcher, slot, uids, gids)
            while len(self._namespaces) > MOST_NAMESPACES:
                os.close(self._namespaces.popitem(last=False)[1])
        self._namespaces.move_to_end(key)
        return self._namespaces[key]


def _moved(owner: Owner, tool: int) -> dict[int, int]:
    """The groups that are shown under another number: the caller's is the tool's, and that is the caller's.

    What has no room in the range so takes the highest numbers that are no group of the caller's.
    """
    moved = {owner.gid: tool}
    above = [group for group in sorted(owner.groups - {owner.gid}) if group >= RANGE]
    if owner.gid < RANGE:
        moved[tool] = owner.gid
    else:
        above.insert(0, tool)
    taken = owner.groups | {owner.gid, tool}
    free = (number for number in range(RANGE - 1, -1, -1) if number not in taken)
    return moved | dict(zip(above, free, strict=False))


def _groups(owner: Owner, tool: int, slot: int) -> list[Extent]:
    """The map of groups: those that are moved, and others as groups of the slot that no process has.

    A file that has no group here cannot be written, nor read by the overlay, also by its owner. That there is
    a group opens nothing: what belongs to another user still has no owner. Raises InvalidRequest.
    """
    moved = _moved(owner, tool)
    found: list[Extent] = [(group, slot + number, 1) for group, number in moved.items()]
    found += [(start, slot + start, end - start) for start, end in _gaps({*moved, *moved.values()})]
    text = sum(len(f"{start} {2**32 - 1} {count}\n") for start, _, count in found)
    if len(found) > MOST_EXTENTS or text > MOST_TEXT:
        raise errors.InvalidRequest(
            f"you are in too many groups above {RANGE - 1} to lend a directory: the kernel has no room for a "
            "map of them; leave some, or upload the files (--upload)",
            field="directory",
        )
    return found


def _gaps(taken: Iterable[int]) -> list[tuple[int, int]]:
    """The runs of numbers in the range that are not taken, each with its end."""
    found, start = [], 0
    for one in (*sorted(number for number in taken if number < RANGE), RANGE):
        if one > start:
            found.append((start, one))
        start = one + 1
    return found


def _attach(mount: int, place: Path) -> None:
    """Attach a mount where there is nothing yet. Raises OSError; then there is nothing."""
    place.mkdir(mode=0o700)
    try:
        mounts.attach(mount, place)
    except BaseException:
        place.rmdir()
        raise


def _cloned(directory: int, pid: int) -> int:
    try:
        return mounts.clone_directory(directory)
    except OSError as error:
        if error.errno != errno.EINVAL or not pid:
            raise
    # A pid that is another's by now does no harm: the mount is in that namespace, or it is not.
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return in_mount_namespace(namespace, lambda: mounts.clone_directory(directory))
    finally:
        os.close(namespace)
