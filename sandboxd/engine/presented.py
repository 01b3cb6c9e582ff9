"""What a container sees of the host's disk: image, lent paths, workspace, overlay, as mounts of one slot.

They are detached: a descriptor each, at no path. A runtime that takes descriptors attaches them in the
container; for one that knows only paths they are attached in the daemon's mount namespace (``attached``).
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.engine.bundle import INIT_PATH, Bind, BundlePaths
from sandboxd.init import INIT
from sandboxd.kernel import mounts
from sandboxd.policy.paths import SECRETS
from sandboxd.secrets import MAX_VALUE

if TYPE_CHECKING:
    from contextlib import ExitStack

    from sandboxd.images import HostBind, Image
    from sandboxd.kernel.userns import IdRange
    from sandboxd.plan import Mount, Shape

__all__ = ["Presented", "SlotMounts", "new_secrets", "new_workspace", "secrets_size"]


@dataclass(frozen=True)
class Presented:
    """A detached mount and its place in the container."""

    target: str
    mount: int
    directory: bool
    executable: bool = True


class SlotMounts:
    """The mounts of one slot; the stack closes and detaches them. Making one raises OSError, EngineFailed."""

    def __init__(self, directory: Path, shape: Shape, image: Image, ids: IdRange, stack: ExitStack) -> None:
        self._directory = directory
        self._shape = shape
        self._image = image
        self._ids = ids
        self._stack = stack
        self.upper_fd: int | None = None
        self.secrets_fd: int | None = None
        workspace = self._workspace()
        self.workspace_fd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=workspace)
        """The workspace's root; outlives the container."""
        stack.callback(os.close, self.workspace_fd)
        lent: list[HostBind | Mount] = [*image.binds, *shape.mounts]
        self.all = (
            Presented("/", self._root(), directory=True),
            Presented(INIT_PATH, self._init(), directory=False),
            Presented("/workspace", workspace, directory=True),
            *(self._lent(Path(bind.source), bind.target) for bind in lent),
            *(self._secrets() if shape.granted("file") else ()),
        )
        """The root first, then in the order in which they are attached."""

    @property
    def identities(self) -> dict[str, tuple[int, int]]:
        """Device and inode of the root of each, by its place in the container."""
        found = {one.target: os.fstat(one.mount) for one in self.all}
        return {target: (one.st_dev, one.st_ino) for target, one in found.items()}

    def attached(self) -> BundlePaths:
        """The same as paths of the daemon's mount namespace, for an OCI bundle."""
        root, init, workspace, *lent = [
            self._attach(one.mount, f"mount{number}", directory=one.directory)
            for number, one in enumerate(self.all)
        ]
        binds = [
            Bind(path, one.target, read_only=True, executable=one.executable)
            for path, one in zip(lent, self.all[3:], strict=True)
        ]
        return BundlePaths(root, workspace, init, tuple(binds))

    def _attach(self, mount: int, name: str, *, directory: bool = True) -> Path:
        target = self._directory / name
        if directory:
            target.mkdir(mode=0o700)
        else:
            target.touch(mode=0o600)
        mounts.attach(mount, target)
        self._stack.callback(mounts.detach, target)
        return target

    def _kept(self, mount: int) -> int:
        self._stack.callback(os.close, mount)
        return mount

    def _clone(self, path: Path, *, mapped: bool = True) -> int:
        mount = self._kept(mounts.clone_tree(path))
        mounts.set_attributes(mount, read_only=True, userns=self._ids.namespace if mapped else None)
        return mount

    def _lent(self, source: Path, target: str) -> Presented:
        try:
            mount = self._clone(source)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A file system that cannot be mapped, as is the root of a container: what is the host's root's
            # is nobody's inside, and what only root may read stays so.
            mount = self._clone(source, mapped=False)
        return Presented(target, mount, directory=source.is_dir())

    def _init(self) -> int:
        return self._clone(INIT, mapped=False)

    def _workspace(self) -> int:
        return self._kept(new_workspace(self._shape, self._ids.base))

    def _secrets(self) -> tuple[Presented]:
        place = self._directory / "secrets"
        place.mkdir(mode=0o700)
        mount, self.secrets_fd = new_secrets(self._shape, self._ids.base, place)
        self._stack.callback(os.close, self.secrets_fd)
        return (Presented(SECRETS, self._kept(mount), directory=True, executable=False),)

    def _root(self) -> int:
        rootfs = self._image.rootfs
        if rootfs is None:
            raise errors.EngineFailed(f"image {self._image.name} has no root file system")
        try:
            lower = self._clone(rootfs)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise errors.HostFailed(
                f"{rootfs} is on a file system that the kernel cannot map ids of, such as an overlay; in a "
                "container, put the state directory on a volume"
            ) from error
        self._attach(lower, "image")  # a layer has to be in a mount namespace
        wanted = [(mount.target, Path(mount.source).is_dir()) for mount in self._shape.mounts]
        wanted += [(SECRETS, True)] if self._shape.granted("file") else []
        missing = [at for at, directory in wanted if not _is_there(rootfs, at, directory=directory)]
        if self._shape.root.mode == "read-only" and not missing:
            return self._image_alone(lower)
        return self._overlay(lower)

    def _image_alone(self, lower: int) -> int:
        """The image through an overlay that nothing is written to: the files are this slot's own.

        Locks, leases and watches are on inodes, and those of the image itself are the same in all its slots.
        """
        (self._directory / "empty").mkdir(mode=0o755)  # one layer alone is no overlay
        empty = self._kept(os.open(self._directory / "empty", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        mount = self._kept(mounts.new_mount("overlay", {"lowerdir": f"{_by(lower)}:{_by(empty)}"}))
        mounts.set_attributes(mount, read_only=True, userns=None)
        return mount

    def _overlay(self, lower: int) -> int:
        """An overlay that is thrown away: for a writable root, or for mount points that the image lacks."""
        root = self._shape.root
        tmpfs = mounts.new_mount(
            "tmpfs", {"size": str(root.size), "nr_inodes": str(root.inodes), "mode": "0755"}
        )
        upper = self._attach(self._kept(tmpfs), "upper")
        self.upper_fd = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stack.callback(os.close, self.upper_fd)
        base = self._ids.base
        for part in ("upper", "work"):
            (upper / part).mkdir(mode=0o755)
            os.chown(upper / part, base, base)
        above = _by(self.upper_fd)
        options = {"lowerdir": _by(lower), "upperdir": f"{above}/upper", "workdir": f"{above}/work"}
        return self._kept(mounts.new_mount("overlay", options))


def _by(fd: int) -> str:
    """A path of what a descriptor is, which tells a tool that reads its ``mountinfo`` nothing."""
    return f"/proc/self/fd/{fd}"


def new_workspace(shape: Shape, base: int) -> int:
    """A detached tmpfs of the policy's size, the tool's own; ``base`` is root on the host. Raises OSError."""
    owner, limits = shape.process, shape.limits
    return mounts.new_mount(
        "tmpfs",
        {
            "size": str(limits.workspace_size),
            "nr_inodes": str(limits.workspace_inodes),
            "mode": "0755",
            "uid": str(base + owner.uid),
            "gid": str(base + owner.gid),
        },
    )


def secrets_size(shape: Shape) -> tuple[int, int]:
    """Bytes and inodes of the tmpfs for the secrets that a shape has as files."""
    count = len(shape.granted("file"))
    return count * MAX_VALUE, count + 1


def new_secrets(shape: Shape, base: int, place: Path) -> tuple[int, int]:
    """A detached tmpfs that can only be read, and an ``O_PATH`` descriptor through which it is written.

    It is never swapped out, where the kernel can promise that (``noswap``, Linux 6.4). ``place`` is an empty
    directory in a mount namespace of our own, used for a moment. Both are the caller's to close. Raises
    OSError.
    """
    owner = shape.process
    size, inodes = secrets_size(shape)
    options: dict[str, str | None] = {
        "size": str(size),
        "nr_inodes": str(inodes),
        "mode": "0500",
        "uid": str(base + owner.uid),
        "gid": str(base + owner.gid),
    }
    try:
        mount = mounts.new_mount("tmpfs", options | {"noswap": None}, executable=False)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        mount = mounts.new_mount("tmpfs", options, executable=False)
    try:
        mounts.attach(mount, place)  # what is at no path cannot be copied
        try:
            shown = mounts.clone_tree(place)
            try:
                mounts.set_attributes(shown, read_only=True, userns=None)
                return shown, os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except BaseException:
                os.close(shown)
                raise
        finally:
            mounts.detach(place)
    finally:
        os.close(mount)


def _is_there(rootfs: Path, target: str, *, directory: bool) -> bool:
    """Whether the image has the mount point, as a directory or file that is reached through no link."""
    at = rootfs
    for part in Path(target).parts[1:]:
        at = at / part
        if at.is_symlink() or not at.exists():
            return False
    return at.is_dir() == directory
