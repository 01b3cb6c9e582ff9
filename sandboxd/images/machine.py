"""Which architecture the programs of a tree are for, read from their ELF headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd.images.rootfs import Rootfs

__all__ = ["tree_architecture"]

_USUAL = (b"bin/sh", b"usr/bin/env", b"bin/busybox", b"usr/bin/python3", b"usr/local/bin/python3")
_DIRECTORIES = (b"bin", b"usr/bin", b"usr/local/bin", b"sbin", b"app", b"")
_MACHINES = {
    (62, 2): "amd64",
    (183, 2): "arm64",
    (3, 1): "386",
    (40, 1): "arm",
    (21, 2): "ppc64le",
    (22, 2): "s390x",
    (243, 2): "riscv64",
    (62, 1): "x32",
}
"""``e_machine`` and class of elf(5), in Go's naming as OCI images have it."""


def tree_architecture(rootfs: Rootfs) -> str | None:
    """The architecture of the first program that is found where programs are; None without one."""
    for path in _USUAL:
        if found := _architecture(rootfs, path):
            return found
    for directory in _DIRECTORIES:
        for name in rootfs.names(directory)[:500]:
            if found := _architecture(rootfs, directory + b"/" + name):
                return found
    return None


def _architecture(rootfs: Rootfs, path: bytes) -> str | None:
    header = rootfs.read(path, 20)
    if header is None or len(header) < 20 or not header.startswith(b"\x7fELF"):
        return None
    machine = int.from_bytes(header[18:20], "big" if header[5] == 2 else "little")
    return _MACHINES.get((machine, header[4]), f"an unknown machine ({machine})")
