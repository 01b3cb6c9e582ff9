"""The mount controls of a receipt: what the parked process has where, and that it is ours.

A mount is known by two things that no runtime can give to another: its line in ``mountinfo`` (kind,
options, size), and device and inode of its root as seen through ``/proc/PID/root``, which are compared
with those of the mount that the engine made (``Slot.presented``).
"""

# ruff: noqa: S108  -- these are paths inside a container

from __future__ import annotations

import base64
import os
import stat
from typing import TYPE_CHECKING

from sandboxd import canonical
from sandboxd.engine.bundle import MASKED, READ_ONLY, shm_size
from sandboxd.engine.presented import secrets_size
from sandboxd.kernel.mounts import MountEntry, parse_mountinfo
from sandboxd.models import Control
from sandboxd.policy.paths import SECRETS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from sandboxd.engine.base import Slot
    from sandboxd.receipt.parked import Parked

__all__ = ["absent_masks", "mount_controls", "presented_control", "stacked_control"]

OWN = {"/", "/proc", "/dev", "/dev/pts", "/dev/shm", "/tmp"}  # beside what the engine presents
DEVICES = {  # Documentation/admin-guide/devices.txt
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
}
DEV_DIRECTORIES = {"pts", "shm"}
MAX_TRUSTED = 8 * 2**20
"""Bytes of a bundle that are read: an image's, and one certificate."""
HIDDEN = {"invisible", "2"}  # hidepid= by name, and by number before Linux 5.8


def absent_masks() -> tuple[str, ...]:
    """Paths that are masked or read-only where the kernel has them, and that it does not have now."""
    return tuple(path for path in (*MASKED, *READ_ONLY) if not os.path.exists(path))  # noqa: PTH110


def mount_controls(slot: Slot, process: Parked) -> Iterator[Control]:
    """Every control that speaks of a mount or of a file in ``/dev``. Raises OSError."""
    entries = parse_mountinfo(process.read("mountinfo"))
    at = {entry.target: entry for entry in entries}
    absent = absent_masks()
    masks = [path for path in (*MASKED, *READ_ONLY) if path not in absent]
    devices = {f"/dev/{name}" for name in DEVICES}
    yield from _root(slot, at.get("/"))
    yield from _presented(slot, process)
    yield from _temporary(slot, at)
    yield from _trust(slot, process)
    if slot.secrets_fd is not None:
        yield from _secrets(slot, at.get(SECRETS))
    loose = [
        entry.target
        for entry in entries
        if not {"nosuid", "nodev"} <= entry.options
        and entry.target not in masks  # compared below with what may be there, which has neither
        and entry.target not in {"/dev", "/dev/pts", *devices}
    ]
    yield _all("nosuid_nodev", "every mount", loose, "mountinfo")
    lent = sorted(set(slot.presented) - {"/", "/workspace"})
    writable = [target for target in lent if target not in at or "ro" not in at[target].options]
    yield _all("mounts_read_only", "every mount that is lent", writable, "mountinfo")
    yield from _proc(process, at.get("/proc"))
    open_masks = [path for path in masks if not _is_closed(path, at, process)]
    yield _all("masked_paths", "masked or read-only", open_masks, "mountinfo")
    expected = OWN | devices | set(masks) | set(slot.presented)
    extra = [entry.target for entry in entries if entry.target not in expected]
    twice = [entry.target for entry in entries if at[entry.target] is not entry]
    yield _all("mounts", "nothing else", extra + twice, "mountinfo")
    yield _all("devices", " ".join(sorted(DEVICES)), _wrong_devices(process, slot.presented), "/dev")


def _all(name: str, asked: str, wrong: list[str], read_from: str) -> Control:
    """A control that holds when nothing is wrong; else it names what is."""
    in_force = ", ".join(sorted(wrong)) or asked
    return Control(name=name, asked=asked, in_force=in_force, read_from=read_from, enforced=not wrong)


def _equal(name: str, asked: str, in_force: str, read_from: str) -> Control:
    return Control(name=name, asked=asked, in_force=in_force, read_from=read_from, enforced=asked == in_force)


def _root(slot: Slot, entry: MountEntry | None) -> Iterator[Control]:
    shape = slot.shape
    mode = "read-only" if entry and "ro" in entry.options else "writable"
    yield _equal("root", "read-only" if shape.root.mode == "read-only" else "writable", mode, "mountinfo: /")
    if shape.root.mode == "overlay":
        asked = f"overlay of {_pages(shape.root.size)} bytes, {shape.root.inodes} inodes"
        found = "no overlay"
        if entry and entry.kind == "overlay" and slot.upper_fd is not None:
            upper = os.fstatvfs(slot.upper_fd)
            found = f"overlay of {upper.f_blocks * upper.f_frsize} bytes, {upper.f_files} inodes"
        yield _equal("root_overlay", asked, found, "statfs of the upper layer")


def _presented(slot: Slot, process: Parked) -> Iterator[Control]:
    for target, wanted in sorted(slot.presented.items()):
        yield presented_control(target, wanted, process.stat_inside(target))


def _trust(slot: Slot, process: Parked) -> Iterator[Control]:
    """The bundles have the content that was written, and whose certificate stands last in them."""
    network, trusted = slot.shape.network, slot.trusted
    if network is None or not network.look_inside:
        return
    if trusted is None:
        yield _equal("trust", "the daemon's authority", "nobody", "the engine")
        return
    found = {}
    for place, digest in trusted.files.items():
        content = process.read_inside(place, MAX_TRUSTED) or b""
        other = "" if canonical.digest_bytes(content) == digest else " in another file"
        found[place] = _last_certificate(content) + other
    asked = dict.fromkeys(trusted.files, trusted.authority)
    yield _equal("trust", _by_place(asked), _by_place(found), "content of " + ", ".join(sorted(found)))


def _by_place(found: Mapping[str, str]) -> str:
    """``sha256:… at /a, /b``, of each who is trusted."""
    places = {who: [place for place in sorted(found) if found[place] == who] for who in found.values()}
    return "; ".join(f"{who} at {', '.join(at)}" for who, at in sorted(places.items()))


def _last_certificate(content: bytes) -> str:
    """``sha256:…`` of the last certificate of a bundle, as ``openssl x509 -fingerprint -sha256`` has it."""
    _, begun, rest = content.rpartition(b"-----BEGIN CERTIFICATE-----")
    body, ended, _ = rest.partition(b"-----END CERTIFICATE-----")
    try:
        return canonical.digest_bytes(base64.b64decode(body)) if begun and ended else "nobody"
    except ValueError:
        return "nobody"


def _temporary(slot: Slot, at: dict[str, MountEntry]) -> Iterator[Control]:
    limits = slot.shape.limits
    if slot.stacked is not None:
        yield stacked_control(slot, at.get("/workspace"))
    plain = ("workspace", "/workspace", limits.workspace_size, limits.workspace_inodes)
    for name, target, size, inodes in (
        *((plain,) if slot.stacked is None else ()),
        ("tmp", "/tmp", limits.tmp_size, limits.tmp_inodes),
        ("shm", "/dev/shm", shm_size(slot.shape), limits.tmp_inodes),
    ):
        asked = f"tmpfs of {_pages(size)} bytes, {inodes} inodes"
        yield _equal(name, asked, _tmpfs(at.get(target)), f"mountinfo: {target}")


def stacked_control(slot: Slot, entry: MountEntry | None) -> Control:
    """What is at the workspace of a call in a session; that it is the one we made is another control.

    The kernel may make an overlay that only can be read, without a word but the ``ro`` of its file system.
    """
    if slot.stacked is None:
        raise ValueError("the slot has no session's files")
    limits, upper = slot.shape.limits, os.fstatvfs(slot.stacked.upper_fd)
    below = f"{slot.stacked.layers} layers" + (" and the caller's directory" * slot.stacked.checkout)
    said = "overlay, {} bytes and {} inodes above {}, {}, nosuid, nodev"
    asked = said.format(_pages(limits.workspace_size), limits.workspace_inodes, below, "writable")
    found = "no overlay"
    if entry is not None and entry.kind == "overlay" and entry.root == "/":
        writable = "rw" in entry.options and "rw" in entry.super_options
        found = said.format(
            upper.f_blocks * upper.f_frsize,
            upper.f_files,
            below,
            "writable" if writable else "READ-ONLY",
        )
        if not {"nosuid", "nodev"} <= entry.options:
            found = "overlay, neither nosuid nor nodev"
    return _equal("workspace", asked, found, "mountinfo: /workspace; statfs of the upper layer")


def presented_control(target: str, wanted: tuple[int, int], found: os.stat_result | None) -> Control:
    """Whether what is at a place in the container is what was put there."""
    shown = "nothing" if found is None else f"{found.st_dev:x}:{found.st_ino}"
    return _equal(f"mount {target}", f"{wanted[0]:x}:{wanted[1]}", shown, f"device and inode of {target}")


def _secrets(slot: Slot, entry: MountEntry | None) -> Iterator[Control]:
    size, inodes = secrets_size(slot.shape)
    options = ("ro", "nosuid", "nodev", "noexec")
    asked = f"tmpfs of {_pages(size)} bytes, {inodes} inodes, {' '.join(options)}"
    found = " ".join(option for option in options if entry is not None and option in entry.options)
    yield _equal("secrets", asked, f"{_tmpfs(entry)}, {found}", f"mountinfo: {SECRETS}")
    kept = entry is not None and "noswap" in entry.super_options
    yield Control(
        name="secrets_swap",
        asked="never swapped out, where the kernel can promise it",
        in_force="noswap" if kept else "no promise before Linux 6.4",
        read_from=f"mountinfo: {SECRETS}",
    )


def _tmpfs(entry: MountEntry | None) -> str:
    if entry is None or entry.kind != "tmpfs" or entry.root != "/":
        return "no tmpfs"
    size = entry.super_options.get("size", "0k")
    scale = {"k": 2**10, "m": 2**20, "g": 2**30}.get(size[-1:], 1)
    number = int(size[:-1]) * scale if size[-1:] in "kmg" else int(size)
    return f"tmpfs of {number} bytes, {entry.super_options.get('nr_inodes', 'unlimited')} inodes"


def _pages(size: int) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    return -(-size // page) * page


def _proc(process: Parked, entry: MountEntry | None) -> Iterator[Control]:
    asked = "of the container's own processes, others' hidden"
    found = process.stat_inside("/proc")
    hidden = entry is not None and entry.super_options.get("hidepid") in HIDDEN
    if entry is None or entry.kind != "proc" or entry.root != "/" or found is None:
        in_force = "no proc file system"
    elif found.st_dev == os.stat("/proc").st_dev:  # noqa: PTH116  (a proc mount is one PID namespace's)
        in_force = "of the host"
    else:
        in_force = asked if hidden else "others' processes are shown"
    yield _equal("proc", asked, in_force, "mountinfo: /proc; device of /proc")


def _is_closed(path: str, at: dict[str, MountEntry], process: Parked) -> bool:
    """A read-only path shows itself, ``ro``; a masked one the null device, or an empty directory, ``ro``."""
    entry = at.get(path)
    if entry is None:
        return False
    if path in READ_ONLY:
        return "ro" in entry.options and entry.kind == "proc" and entry.root == path.removeprefix("/proc")
    found = process.stat_inside(path)
    if found is None or not stat.S_ISDIR(found.st_mode):
        return found is not None and _is_device(found, DEVICES["null"])
    return "ro" in entry.options and entry.kind == "tmpfs" and not process.list_inside(path)


def _is_device(found: os.stat_result, number: tuple[int, int]) -> bool:
    return stat.S_ISCHR(found.st_mode) and (os.major(found.st_rdev), os.minor(found.st_rdev)) == number


def _wrong_devices(process: Parked, presented: Collection[str]) -> list[str]:
    """Names in ``/dev`` that are a device of another number, or anything but links and known directories."""
    wrong = []
    for name in process.list_inside("/dev"):
        found = process.stat_inside(f"/dev/{name}")
        known = found is not None and (
            _is_device(found, DEVICES[name])
            if name in DEVICES
            else stat.S_ISLNK(found.st_mode)
            or (stat.S_ISDIR(found.st_mode) and name in DEV_DIRECTORIES)
            or f"/dev/{name}" in presented  # their identities are controls of their own
        )
        if not known:
            wrong.append(name)
    missing = set(DEVICES) - set(process.list_inside("/dev"))
    return wrong + sorted(missing)
