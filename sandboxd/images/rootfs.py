"""A root file system under construction, reached by a descriptor and never by a path of this host.

Every path is resolved by ``openat2(2)`` with ``RESOLVE_IN_ROOT``: a symlink or ``..`` in the tree is
resolved as it would be inside the container, and cannot name anything outside of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from typing import TYPE_CHECKING, Self

from sandboxd.errors import HostUnsupported, ImageInvalid
from sandboxd.kernel.files import RESOLVE_NO_MAGICLINKS, openat2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["MOUNT_POINTS", "Rootfs", "remove", "typed"]

MOUNT_POINTS = {"proc": 0o755, "sys": 0o755, "dev": 0o755, "tmp": 0o1777, "run": 0o755, "workspace": 0o755}
"""Where the engine mounts something: each is a real, empty directory in every image."""
MAX_PATH = 3000
MAX_DEPTH = 256
"""Bounds on a path after its symlinks are resolved: no later walk meets ``ENAMETOOLONG``."""

_IN_ROOT = 0x10 | RESOLVE_NO_MAGICLINKS
"""``RESOLVE_IN_ROOT`` of openat2(2)."""
_LIST = os.O_RDONLY | os.O_DIRECTORY


class Rootfs:
    """The tree at ``path``, which must be a directory that only we can reach."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._root = _real(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def _open(self, path: bytes, flags: int) -> int:
        try:
            return openat2(self.fd, path or b".", flags, 0, _IN_ROOT)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                raise HostUnsupported(
                    "this kernel has no openat2; sandboxd needs Linux 5.6 or later"
                ) from None
            raise

    @contextlib.contextmanager
    def directory(self, path: bytes, *, make: bool = False) -> Iterator[tuple[int, bytes]]:
        """A descriptor of the directory and its real path from the root (``b""`` for the root).

        With ``make``, what is missing is made, owned by 0:0 with mode 0755. Raises ImageInvalid where
        a part of the path is no directory, is missing, or leads too deep.
        """
        self.check(path, b"")
        with typed(path):
            try:
                descriptor = self._open(path, _LIST)
            except FileNotFoundError:
                if not make:
                    raise
                descriptor = self._make(path)
        try:
            real = _real(descriptor)[len(self._root) :].strip(b"/")
            yield descriptor, real
        finally:
            os.close(descriptor)

    def _make(self, path: bytes) -> int:
        """Make the missing parts of a path, from the top; not by recursion, which has its own depth."""
        parts = path.split(b"/")
        above = self._open(b"", _LIST)
        for number, name in enumerate(parts):
            try:
                try:
                    descriptor = self._open(b"/".join(parts[: number + 1]), _LIST)
                except FileNotFoundError:
                    self.check(_real(above)[len(self._root) :].strip(b"/"), name)
                    os.mkdir(name, dir_fd=above)
                    os.chmod(name, 0o755, dir_fd=above)  # whatever our umask is
                    descriptor = self._open(b"/".join(parts[: number + 1]), _LIST)
            finally:
                os.close(above)
            above = descriptor
        return above

    @staticmethod
    def check(parent: bytes, name: bytes) -> bytes:
        """The real path of ``name`` in ``parent``. Raises ImageInvalid where it is too long or deep."""
        real = parent + b"/" + name if parent else name
        if len(real) > MAX_PATH or len(name) > 255 or real.count(b"/") >= MAX_DEPTH:
            raise ImageInvalid(f"the image has a path of more than {MAX_PATH} bytes or {MAX_DEPTH} levels")
        return real

    def read(self, path: bytes, limit: int) -> bytes | None:
        """The first bytes of a regular file, links followed inside the tree; None if it is none."""
        try:
            descriptor = self._open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            return os.read(descriptor, limit) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
        finally:
            os.close(descriptor)

    def names(self, path: bytes) -> list[bytes]:
        """The sorted names in a directory; none if it is no directory."""
        try:
            descriptor = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return []
        try:
            return sorted(os.fsencode(entry.name) for entry in os.scandir(descriptor))
        finally:
            os.close(descriptor)

    def write(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Put a file of root's there in place of whatever was."""
        parent, _, name = os.fsencode(path).strip(b"/").rpartition(b"/")
        with self.directory(parent, make=True) as (above, _real), typed(name):
            remove(above, name)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, mode, dir_fd=above)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)
                file.write(content)

    def remove(self, path: str) -> None:
        """Remove a file or a tree, if it is there."""
        parent, _, name = os.fsencode(path).strip(b"/").rpartition(b"/")
        with self.directory(parent) as (above, _real), typed(name):
            remove(above, name)

    def normalise(self) -> None:
        """Make the root and the mount points what the engine expects: real, empty, root's."""
        for name, mode in MOUNT_POINTS.items():
            encoded = name.encode()
            with typed(encoded):
                remove(self.fd, encoded)
                os.mkdir(encoded, dir_fd=self.fd)
                os.chown(encoded, 0, 0, dir_fd=self.fd)
                os.chmod(encoded, mode, dir_fd=self.fd)
        with self.directory(b"") as (root, _), typed(b"/"):
            os.fchown(root, 0, 0)
            os.fchmod(root, 0o755)

    def provide(self, files: dict[str, bytes]) -> None:
        """Write those of ``files`` that the image does not have."""
        for path, content in files.items():
            parent, _, name = os.fsencode(path).strip(b"/").rpartition(b"/")
            if name not in self.names(parent):
                # A parent that is a dangling link or a file is how the image was made.
                with contextlib.suppress(ImageInvalid):
                    self.write(path, content)


def remove(directory: int, name: bytes) -> None:
    """Remove a file or a tree, following nothing; no error if it does not exist."""
    try:
        kind = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(kind):
        shutil.rmtree(name, dir_fd=directory)
    else:
        os.unlink(name, dir_fd=directory)


def _real(descriptor: int) -> bytes:
    return os.readlink(b"/proc/self/fd/%d" % descriptor)  # noqa: PTH115  a Path cannot hold these bytes


def _invalid(path: bytes, error: OSError) -> ImageInvalid:
    return ImageInvalid(f"{os.fsdecode(path)!r} cannot be made in the image: {error.strerror}")


@contextlib.contextmanager
def typed(path: bytes) -> Iterator[None]:
    """Name the entry that the kernel refused; a full disk is the host's fault and passes through."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPERM, errno.EROFS}:
            raise
        raise _invalid(path, error) from None
