"""What no request of the Docker Engine's API can say, done in the container before the tool process exists.

Theory of operation.  PID 1 has connected and waits; nothing else is in the container. A thread joins its
mount namespace, takes away every mount that a container of ours does not have (``/sys``, ``/dev/mqueue``, the
files in ``/etc`` that the engine mounts, the door, placeholders of an image's volumes), puts the daemon's own
workspace in the place of a placeholder, makes what stays ``nosuid,nodev``, and has ``/proc`` hide the
processes of others. Paths are those of ``mountinfo``, in which no link is left. That it worked is not taken
for granted: every mount is read back for the receipt.
"""

# ruff: noqa: S108  -- these are paths inside a container

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.engine.bundle import INIT_PATH, MASKED, PTYS, READ_ONLY
from sandboxd.engine.docker.request import DOOR_PATH
from sandboxd.engine.host import DEVICES
from sandboxd.kernel import mounts
from sandboxd.kernel.inside import in_mount_namespace

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sandboxd.kernel.mounts import MountEntry

__all__ = ["finish", "root_of"]

NODES = {f"/dev/{name}" for name in DEVICES}  # mounts where root of a user namespace may make no node
WITH_DEVICES = {"/dev", "/dev/pts", *NODES, *MASKED, *READ_ONLY}
"""A masked path shows the null device; one that is read-only is of ``/proc``, whose options are its own."""
KEPT = {"/", "/proc", "/dev/shm", "/tmp", INIT_PATH, *WITH_DEVICES}
NO_PROGRAMS = "noexec"  # an option of a mount, and not of its file system
LEFT_EMPTY = ("/dev/mqueue", DOOR_PATH)


def finish(
    pid: int,
    lent: Collection[str],
    ours: Mapping[str, int],
    temporary: Collection[tuple[str, tuple[str, ...]]],
) -> None:
    """Finish the container of PID 1 ``pid``.

    ``lent`` are the targets of host paths, ``ours`` detached mounts by their targets, ``temporary`` what has
    a tmpfs whose options the engine did not take. Raises OSError, and ControlNotEnforced for an image that
    has something in the place of one of them.
    """
    entries = _entries(pid)
    at = {entry.target for entry in entries}
    for target in (*ours, *(target for target, _ in temporary)):
        if target not in at:
            raise errors.ControlNotEnforced(
                f"the image has something at {target} that is no directory", control=target.rpartition("/")[2]
            )
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        in_mount_namespace(namespace, lambda: _inside(entries, lent, ours, temporary))
    finally:
        os.close(namespace)


def _inside(
    entries: list[MountEntry],
    lent: Collection[str],
    ours: Mapping[str, int],
    temporary: Collection[tuple[str, tuple[str, ...]]],
) -> None:
    for entry in reversed(entries):  # a later one may lie on an earlier one
        if entry.target not in KEPT and entry.target not in lent:
            with suppress(FileNotFoundError):  # it went with the one that it lay below
                mounts.detach(Path(entry.target))
        elif entry.target not in WITH_DEVICES:
            mounts.set_attributes_at(entry.target, read_only=entry.target == "/" or entry.target in lent)
    for target, mount in ours.items():
        mounts.attach(mount, Path(target))
    for target, options in temporary:
        of_files = ",".join(option for option in options if option != NO_PROGRAMS)
        mounts.remount(target, of_files, executable=NO_PROGRAMS not in options)
    mounts.remount("/proc", "hidepid=2")
    mounts.remount("/dev", "mode=755,size=64k", devices=True)
    mounts.remount("/dev/pts", f"ptmxmode=0666,mode=0620,max={PTYS}", devices=True)
    for path in LEFT_EMPTY:
        with suppress(FileNotFoundError):
            os.rmdir(path)  # noqa: PTH106  (of a namespace that no other thread sees)


def root_of(pid: int, upper: str | None) -> None:
    """Check that the root is the overlay whose upper layer the engine names. Raises ControlNotEnforced.

    A storage driver that names none leaves its word as it is. Of many layers it mounts by shorter, relative
    paths, whose last parts are the layer's own name.
    """
    root = next((entry for entry in _entries(pid) if entry.target == "/"), None)
    found = "" if root is None or root.kind != "overlay" else root.super_options.get("upperdir", "")
    if upper is not None and not (found and upper.endswith(found)):
        raise errors.ControlNotEnforced(
            f"the container's root is {'an overlay of ' + found if found else 'no overlay'}, and the engine "
            f"names {upper}",
            control="root",
        )


def _entries(pid: int) -> list[MountEntry]:
    return mounts.parse_mountinfo(Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape"))
