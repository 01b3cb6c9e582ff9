"""Mounts by descriptor: the new mount API (``fsopen(2)``, ``open_tree(2)``, ``mount_setattr(2)``).

The daemon makes every mount of a container in a mount namespace of its own, so none of them is ever
visible to the host, and all of them go with the daemon, however it ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "MountEntry",
    "attach",
    "clone_directory",
    "clone_tree",
    "detach",
    "hide_hybrid_cgroup2",
    "new_mount",
    "new_overlay",
    "own_devices",
    "parse_mountinfo",
    "private_namespace",
    "remount",
    "set_attributes",
    "set_attributes_at",
]

CLONE_NEWNS = 0x00020000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_REC, MS_SLAVE = 2, 4, 8, 32, 0x4000, 0x80000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH = 0x100, 0x1000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_IDMAP, MOUNT_ATTR_NOSYMFOLLOW = 0x00100000, 0x00200000
# The numbers of the system calls added since Linux 5.0 are the same on every architecture.
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 428, 429, 430, 431, 432
SYS_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(what: str, number: int, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def private_namespace() -> None:
    """Give the calling process a mount namespace of its own, into which the host's later mounts flow.

    Must be called before the process has other threads. Raises OSError.
    """
    if _libc.unshare(CLONE_NEWNS) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)}")
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_SLAVE), None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount --make-rslave /: {os.strerror(code)}")


def hide_hybrid_cgroup2() -> None:
    """On a hybrid cgroup host take the cgroup2 mount off this namespace, since crun refuses hybrid hosts.

    The host's mount is untouched. Only for a process in a mount namespace of its own. Raises OSError.
    """
    entries = parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    if any(entry.kind == "cgroup" for entry in entries):
        for entry in entries:
            if entry.kind == "cgroup2":
                detach(Path(entry.target))


def own_devices(directory: Path, names: Sequence[str]) -> None:
    """Put nodes of our own, made in ``directory``, in the place of those of ``/dev`` in this namespace.

    What the nodes of the host show and keep (who opens them and when, by inotify(7); their times) is then
    not shared with whoever is lent one. Only for a process in a mount namespace of its own. Raises OSError.
    """
    directory.mkdir(mode=0o711)
    _mount(new_mount("tmpfs", {"mode": "0711", "size": "64k"}, executable=False, devices=True), directory)
    for name in names:
        found = Path("/dev", name).stat()
        node = directory / name
        os.mknod(node, stat.S_IFCHR, found.st_rdev)
        node.chmod(0o666)
        _mount(clone_tree(node), Path("/dev", name))


def _mount(mount: int, target: Path) -> None:
    try:
        attach(mount, target)
    finally:
        os.close(mount)


def new_mount(
    kind: str, options: Mapping[str, str | None], *, executable: bool = True, devices: bool = False
) -> int:
    """A detached mount of a new file system, ``nosuid`` and, but for ``devices``, ``nodev``.

    An option that is a word alone has None. Returns its descriptor. Raises OSError.
    """
    context = _call(f"fsopen {kind}", SYS_FSOPEN, kind.encode(), FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            _call(
                f"fsconfig {key}={value}",
                SYS_FSCONFIG,
                context,
                FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING,
                key.encode(),
                None if value is None else value.encode(),
                0,
            )
        _call(f"fsconfig {kind}", SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        attributes = MOUNT_ATTR_NOSUID | (0 if devices else MOUNT_ATTR_NODEV)
        attributes |= 0 if executable else MOUNT_ATTR_NOEXEC
        return _call(f"fsmount {kind}", SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def new_overlay(
    lowers: Sequence[str], options: Mapping[str, str], place: Path, *, one_by_one: bool = True
) -> int:
    """A detached overlay of layers, the uppermost first, ``nosuid,nodev``; returns its descriptor.

    ``place`` is a directory of a mount namespace of our own, used for a moment where the kernel does not take
    layers one by one (``lowerdir+``, Linux 6.8): a text of all of them has room for as many as a page holds.
    Raises OSError.
    """
    if one_by_one:
        try:
            return _overlay_one_by_one(lowers, options)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    text = ",".join([f"lowerdir={':'.join(lowers)}", *(f"{key}={value}" for key, value in options.items())])
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV)
    if _libc.mount(b"overlay", os.fsencode(place), b"overlay", flags, text.encode()) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount overlay: {os.strerror(code)}")
    try:
        return clone_tree(place)
    finally:
        detach(place)


def _overlay_one_by_one(lowers: Sequence[str], options: Mapping[str, str]) -> int:
    context = _call("fsopen overlay", SYS_FSOPEN, b"overlay", FSOPEN_CLOEXEC)
    try:
        for key, value in [*(("lowerdir+", lower) for lower in lowers), *options.items()]:
            arguments = (context, FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
            _call(f"fsconfig {key}", SYS_FSCONFIG, *arguments)
        _call("fsconfig overlay", SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        return _call("fsmount overlay", SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def clone_tree(path: Path) -> int:
    """A detached copy of the mount at ``path``; returns its descriptor. Raises OSError."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
    return _call(f"open_tree {path}", SYS_OPEN_TREE, -100, os.fsencode(path), flags)


def clone_directory(directory: int) -> int:
    """A detached mount that has an open directory as its root, and none of the mounts below it.

    Its mount has to be in the mount namespace of the calling thread. Raises OSError (EINVAL: it is not).
    """
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH
    return _call("open_tree", SYS_OPEN_TREE, directory, b"", flags)


def set_attributes(mount: int, *, read_only: bool, userns: int | None, follow_links: bool = True) -> None:
    """Make a detached mount ``nosuid,nodev``, read-only if asked, and id-mapped by a user namespace.

    Without ``follow_links`` no symbolic link on it is followed (Linux 5.14).
    Linux 5.12 (``mount_setattr``), 5.19 for layers of overlayfs. Raises OSError.
    """
    attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    if read_only:
        attributes |= MOUNT_ATTR_RDONLY
    if not follow_links:
        attributes |= MOUNT_ATTR_NOSYMFOLLOW
    if userns is not None:
        attributes |= MOUNT_ATTR_IDMAP
    packed = struct.pack("=QQQQ", attributes, 0, 0, userns or 0)
    _call("mount_setattr", SYS_MOUNT_SETATTR, mount, b"", AT_EMPTY_PATH, packed, len(packed))


def set_attributes_at(target: str, *, read_only: bool) -> None:
    """Make what is mounted at a path ``nosuid,nodev``, and read-only if asked. Raises OSError."""
    attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if read_only else 0)
    packed = struct.pack("=QQQQ", attributes, 0, 0, 0)
    path = os.fsencode(target)
    what = f"mount_setattr {target}"
    _call(what, SYS_MOUNT_SETATTR, -100, path, AT_SYMLINK_NOFOLLOW, packed, len(packed))


def remount(target: str, options: str, *, executable: bool = False, devices: bool = False) -> None:
    """Set options of the file system that is mounted at a path, which becomes ``nosuid``. Raises OSError."""
    flags = MS_REMOUNT | MS_NOSUID | (0 if executable else MS_NOEXEC) | (0 if devices else MS_NODEV)
    if _libc.mount(b"none", os.fsencode(target), None, ctypes.c_ulong(flags), options.encode()) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"remount {target}: {os.strerror(code)}")


def attach(mount: int, target: Path) -> None:
    """Attach a detached mount at a path. Raises OSError."""
    _call(
        f"move_mount {target}", SYS_MOVE_MOUNT, mount, b"", -100, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH
    )


def detach(target: Path) -> None:
    """Take the topmost mount off a path, lazily. Raises OSError (EINVAL: nothing is mounted there)."""
    if _libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"umount {target}: {os.strerror(code)}")


@dataclass(frozen=True)
class MountEntry:
    """One line of ``/proc/PID/mountinfo``, proc_pid_mountinfo(5)."""

    device: str
    root: str
    target: str
    options: frozenset[str]
    kind: str
    source: str
    super_options: Mapping[str, str]


def _unescape(field: str) -> str:
    if "\\" not in field:
        return field
    return field.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")


def parse_mountinfo(text: str) -> list[MountEntry]:
    """The mounts of a ``mountinfo`` file, in its order: a later one at the same target hides an earlier."""
    entries = []
    for line in text.splitlines():
        _, _, device, rest = line.split(" ", 3)
        entries.append(MountEntry(device, *_parse_mount(rest)))
    return entries


@lru_cache(maxsize=2048)  # but for its numbers, a line is that of the next container again
def _parse_mount(rest: str) -> tuple[str, str, frozenset[str], str, str, Mapping[str, str]]:
    left, _, right = rest.partition(" - ")
    root, target, options, *_ = left.split(" ")
    kind, source, super_options = right.split(" ", 2)
    pairs = (option.partition("=") for option in super_options.split(","))
    return (
        _unescape(root),
        _unescape(target),
        frozenset(options.split(",")),
        kind,
        _unescape(source),
        MappingProxyType({key: value for key, _, value in pairs}),
    )
