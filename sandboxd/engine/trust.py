"""The daemon's authority in a container, whichever engine made it: where a rule looks into HTTP.

Theory of operation.  PID 1 is up, and nothing but our own code is in the container. An image's bundle of
authorities is looked for as its programs would find it: from the container's root (openat2(2),
``RESOLVE_IN_ROOT``), so that no link of an image leads out of it. A file counts if it is a regular one of the
image's own that anybody may read: what an operator lends, ``/proc`` and all else that is mounted is not the
image's, and no link makes the daemon read it out. What the file holds and the authority's certificate are
written to a tmpfs of this container alone (locks, leases and watches are on inodes, and would reach into
another), and mounted read-only on that file, and at ``TRUSTED``.
"""

from __future__ import annotations

import ctypes
import os
import stat
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from sandboxd import canonical, errors, units
from sandboxd.engine.base import Trusted
from sandboxd.kernel import files, mounts
from sandboxd.kernel.inside import in_mount_namespace
from sandboxd.policy import paths
from sandboxd.policy.trust import BUNDLES, TRUSTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd.images import Image
    from sandboxd.plan import Shape

__all__ = ["Trust", "trusted_by"]

MAX_BUNDLE = 4 * 2**20
"""Bytes of an image's; those of distributions have a quarter of a mebibyte."""
IN_ROOT = 0x10 | files.RESOLVE_NO_MAGICLINKS
"""``RESOLVE_IN_ROOT`` of openat2(2)."""

_libc = ctypes.CDLL(None, use_errno=True)


class Trust:
    """Whom containers are made to trust. ``certificate`` is PEM, ``fingerprint`` that of its DER."""

    def __init__(self, directory: Path, certificate: str, fingerprint: str) -> None:
        """``directory`` is one of the daemon's own mount namespace."""
        self._directory = directory
        self._certificate = certificate.encode()
        self._fingerprint = fingerprint

    def give(self, init_pid: int, image: Image, owner: int) -> tuple[Trusted, dict[str, tuple[int, int]]]:
        """Mount it in the container of PID 1; returns what was, and device and inode by place.

        ``owner`` is the container's root as the host numbers it. Blocks. Raises OSError, and
        ControlNotEnforced for an image whose bundle is too large to be one.
        """
        found = _bundles(init_pid, {"/", *(bind.target for bind in image.binds)})
        first = next(iter(found.values()), b"")
        contents = {
            place: bundle + (b"" if bundle.endswith(b"\n") or not bundle else b"\n") + self._certificate
            for place, bundle in {TRUSTED: first, **found}.items()
        }
        with ExitStack() as stack:
            made = self._made(contents, stack)
            namespace = os.open(f"/proc/{init_pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, namespace)
            in_mount_namespace(namespace, lambda: _attach(made, owner))
            identities = {place: os.fstat(mount) for place, mount in made.items()}
        digests = {place: canonical.digest_bytes(content) for place, content in contents.items()}
        return Trusted(self._fingerprint, digests), {
            place: (one.st_dev, one.st_ino) for place, one in identities.items()
        }

    def _made(self, contents: Mapping[str, bytes], stack: ExitStack) -> dict[str, int]:
        """A detached mount of a file for each of them; what is the same is one file."""
        names = {
            content: f"ca{number}.pem" for number, content in enumerate(dict.fromkeys(contents.values()))
        }
        size = sum(-(-len(content) // 4096) + 1 for content in names) * 4096
        directory = Path(mkdtemp(dir=self._directory))
        try:
            tmpfs = mounts.new_mount("tmpfs", {"mode": "0711", "size": str(size), "nr_inodes": "16"})
            try:
                mounts.attach(tmpfs, directory)  # of what is at no path, older kernels clone nothing
            finally:
                os.close(tmpfs)
            try:
                for content, name in names.items():
                    (directory / name).write_bytes(content)
                    (directory / name).chmod(0o444)
                made = {}
                for place, content in contents.items():
                    made[place] = mounts.clone_tree(directory / names[content])
                    stack.callback(os.close, made[place])
                    mounts.set_attributes(made[place], read_only=True, userns=None)
            finally:
                mounts.detach(directory)
        finally:
            directory.rmdir()
        return made


def trusted_by(
    shape: Shape, trust: Trust | None, *, init_pid: int, image: Image, owner: int
) -> tuple[Trusted | None, dict[str, tuple[int, int]]]:
    """What ``Trust.give`` returns for a shape that looks into HTTP; else nothing. Raises as that does."""
    if shape.network is None or not shape.network.look_inside:
        return None, {}
    if trust is None:
        raise errors.ControlNotEnforced("there is no authority that a container could trust", control="trust")
    return trust.give(init_pid, image, owner)


def _bundles(init_pid: int, of_image: set[str]) -> dict[str, bytes]:
    """The content of the image's bundles by their real paths; ``of_image``: the mounts that are its own."""
    entries = mounts.parse_mountinfo(Path(f"/proc/{init_pid}/mountinfo").read_text(errors="surrogateescape"))
    others = [entry.target for entry in entries if entry.target not in of_image]
    found: dict[str, bytes] = {}
    root = os.open(f"/proc/{init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in BUNDLES:
            with suppress(OSError):  # whatever is there is no bundle to the image's programs either
                handle = files.openat2(root, path.encode(), os.O_PATH, resolve=IN_ROOT)
                try:
                    _take(handle, path, others, found)
                finally:
                    os.close(handle)
    finally:
        os.close(root)
    return found


def _take(handle: int, path: str, others: Sequence[str], found: dict[str, bytes]) -> None:
    status = os.fstat(handle)
    real = os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115  (in another mount namespace)
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & stat.S_IROTH or real in found:
        return
    if not real.isprintable() or any(paths.within(real, other) for other in others):
        return
    if status.st_size > MAX_BUNDLE:
        raise errors.ControlNotEnforced(
            f"the image has {units.format_size(status.st_size)} at {path}, where a bundle of authorities has "
            f"{units.format_size(MAX_BUNDLE)} at most: no rule that looks into HTTP can be used with it",
            control="trust",
        )
    with open(f"/proc/self/fd/{handle}", "rb") as file:  # noqa: PTH123
        found[real] = file.read(MAX_BUNDLE)


def _attach(made: Mapping[str, int], owner: int) -> None:
    """In the container's mount namespace, by a thread that ends with this."""
    # /dev is a file system of its user namespace, which has no number for the host's root: a file in it is
    # its own root's
    _libc.setfsgid(owner)
    _libc.setfsuid(owner)
    os.close(os.open(TRUSTED, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444))
    for place, mount in made.items():
        mounts.attach(mount, Path(place))
