"""What a container sees of the host's disk: image, lent paths, workspace, overlay, mounted for one slot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.engine.bundle import INIT_PATH, Bind, BundlePaths
from sandboxd.init import INIT
from sandboxd.kernel import mounts

if TYPE_CHECKING:
    from contextlib import ExitStack

    from sandboxd.images import HostBind, Image
    from sandboxd.kernel.userns import IdRange
    from sandboxd.plan import Mount, Shape

__all__ = ["SlotMounts"]


class SlotMounts:
    """Makes the mounts of one slot in the daemon's namespace; the stack takes them off again."""

    def __init__(self, directory: Path, shape: Shape, image: Image, ids: IdRange, stack: ExitStack) -> None:
        self._directory = directory
        self._shape = shape
        self._image = image
        self._ids = ids
        self._stack = stack
        self.presented: dict[str, tuple[int, int]] = {}
        self.upper_fd: int | None = None

    def make(self) -> tuple[BundlePaths, int]:
        """The bundle's paths, and the workspace's root as a descriptor that outlives the container."""
        lent: list[HostBind | Mount] = [*self._image.binds, *self._shape.mounts]
        binds = [
            self._present(Path(bind.source), bind.target, f"bind{number}") for number, bind in enumerate(lent)
        ]
        workspace = self._workspace()
        rootfs = self._root()
        self._note("/", rootfs)
        self._note("/workspace", self._directory / "workspace")
        self._note(INIT_PATH, INIT)
        for bind in binds:
            self._note(bind.target, bind.source)
        return BundlePaths(rootfs, self._directory / "workspace", INIT, tuple(binds)), workspace

    def _note(self, target: str, source: Path) -> None:
        found = source.stat()
        self.presented[target] = found.st_dev, found.st_ino

    def _attach(self, mount: int, name: str, *, directory: bool = True) -> Path:
        target = self._directory / name
        if directory:
            target.mkdir(mode=0o700)
        else:
            target.touch(mode=0o600)
        try:
            mounts.attach(mount, target)
        finally:
            os.close(mount)
        self._stack.callback(mounts.detach, target)
        return target

    def _clone(self, path: Path) -> int:
        mount = mounts.clone_tree(path)
        try:
            mounts.set_attributes(mount, read_only=True, userns=self._ids.namespace)
        except BaseException:
            os.close(mount)
            raise
        return mount

    def _present(self, source: Path, target: str, name: str) -> Bind:
        path = self._attach(self._clone(source), name, directory=source.is_dir())
        return Bind(path, target, read_only=True)

    def _workspace(self) -> int:
        owner, limits = self._shape.process, self._shape.limits
        base = self._ids.base
        mount = mounts.new_mount(
            "tmpfs",
            {
                "size": str(limits.workspace_size),
                "nr_inodes": str(limits.workspace_inodes),
                "mode": "0755",
                "uid": str(base + owner.uid),
                "gid": str(base + owner.gid),
            },
        )
        root = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        self._stack.callback(os.close, root)
        self._attach(mount, "workspace")
        return root

    def _root(self) -> Path:
        rootfs = self._image.rootfs
        if rootfs is None:
            raise errors.EngineFailed(f"image {self._image.name} has no root file system")
        lower = self._attach(self._clone(rootfs), "image")
        missing = [mount.target for mount in self._shape.mounts if not _is_there(rootfs, mount)]
        if self._shape.root.mode == "read-only" and not missing:
            return lower
        return self._overlay(lower)

    def _overlay(self, lower: Path) -> Path:
        """An overlay that is thrown away: for a writable root, or for mount points that the image lacks."""
        root = self._shape.root
        upper = self._attach(
            mounts.new_mount(
                "tmpfs", {"size": str(root.size), "nr_inodes": str(root.inodes), "mode": "0755"}
            ),
            "upper",
        )
        self.upper_fd = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stack.callback(os.close, self.upper_fd)
        base = self._ids.base
        for part in ("upper", "work"):
            (upper / part).mkdir(mode=0o755)
            os.chown(upper / part, base, base)
        options = {"lowerdir": str(lower), "upperdir": str(upper / "upper"), "workdir": str(upper / "work")}
        return self._attach(mounts.new_mount("overlay", options), "rootfs")


def _is_there(rootfs: Path, mount: Mount) -> bool:
    """Whether the image has the mount point, as a directory or file that is reached through no link."""
    at = rootfs
    for part in Path(mount.target).parts[1:]:
        at = at / part
        if at.is_symlink() or not at.exists():
            return False
    return at.is_dir() == Path(mount.source).is_dir()
