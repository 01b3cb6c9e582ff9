"""System call tables: names and numbers per architecture, from libseccomp and from the kernel's sources.

libseccomp is asked through ``pyseccomp`` and is the only foreign thing here. Its table ends where its
release does; since Linux 5.1 new calls have one number on every architecture
(``scripts/syscall.tbl``), so those that came later are named here.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache

from sandboxd.errors import HostUnsupported

try:
    import pyseccomp
except RuntimeError as error:  # it looks for the shared library when it is imported
    raise HostUnsupported("libseccomp.so.2 is not installed; Debian: apt-get install libseccomp2") from error

__all__ = ["ARCHES", "UNFILTERED", "X32_BIT", "Arch", "arch_of", "foreign_name", "machine_with", "native"]

X32_BIT = 0x40000000
LAST = 1023  # far above any number in use; tables are dense

LATER = {
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
    "file_getattr": 468,
    "file_setattr": 469,
    "listns": 470,
}
LATER_X86_64 = {"uretprobe": 335, "uprobe": 336}
UNFILTERED = {
    "uretprobe": "since Linux 6.14; made from anywhere but the kernel's trampoline, it ends its caller",
    "uprobe": "since Linux 6.18; made from anywhere but the kernel's trampoline, it fails with ENXIO",
}
"""Calls that the kernel itself never shows to a filter (``__secure_computing``), whatever that says."""


@dataclass(frozen=True)
class Arch:
    """One architecture: its ``uname -m``, its ``AUDIT_ARCH`` value (linux/audit.h), its numbers."""

    machine: str
    audit: int
    numbers: dict[str, int]
    names: dict[int, str]

    def __hash__(self) -> int:
        return self.audit


def _table(audit: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for number in range(LAST + 1):
        try:
            found[pyseccomp.resolve_syscall(audit, number).decode()] = number
        except ValueError:  # a hole in the table
            continue
    return found


@cache
def _arch(machine: str, audit: int) -> Arch:
    numbers = _table(audit)
    taken = set(numbers.values())
    later = LATER | (LATER_X86_64 if machine == "x86_64" else {})
    numbers |= {name: number for name, number in later.items() if number not in taken and name not in numbers}
    return Arch(machine, audit, numbers, {number: name for name, number in numbers.items()})


ARCHES = {"x86_64": int(pyseccomp.Arch.X86_64), "aarch64": int(pyseccomp.Arch.AARCH64)}
"""The architectures that a filter can be made for, with their AUDIT_ARCH values."""


def arch_of(machine: str) -> Arch:
    """The architecture by its ``uname -m``. Raises ValueError for one that no filter can be made for."""
    try:
        return _arch(machine, ARCHES[machine])
    except KeyError:
        raise ValueError(f"no system call filter for {machine!r}; there is {', '.join(ARCHES)}") from None


def native() -> Arch:
    """The architecture that this process runs on. Raises HostUnsupported for one without a filter."""
    try:
        return arch_of(platform.machine())
    except ValueError as error:
        raise HostUnsupported(f"{error}, where sandboxd runs") from None


def machine_with(name: str) -> str:
    """This machine, or another one where only that has the call: arm64 has none of the oldest (``vfork``).

    So an example of a policy holds everywhere or nowhere. Raises HostUnsupported as ``native``.
    """
    here = native()
    others = (machine for machine in ARCHES if name in arch_of(machine).numbers)
    return here.machine if name in here.numbers else next(others, here.machine)


def foreign_name(audit: int, number: int) -> tuple[str, str]:
    """The ABI (``i386``, ``arm``, ``x32`` or a hex value) and the call's name or ``#number`` in it."""
    abis = {int(pyseccomp.Arch.X86): "i386", int(pyseccomp.Arch.ARM): "arm"}
    if audit == ARCHES["x86_64"] and number & X32_BIT:
        abi, table = "x32", int(pyseccomp.Arch.X32)
    else:
        abi, table = abis.get(audit, f"{audit:#x}"), audit
    try:
        return abi, pyseccomp.resolve_syscall(table, number).decode()
    except ValueError:
        return abi, f"#{number & ~X32_BIT if abi == 'x32' else number}"
