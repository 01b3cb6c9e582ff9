"""Access to files with another's rights, by the calling thread alone and for the time of a ``with`` block.

The kernel judges access by a thread's fsuid, fsgid and supplementary groups (credentials(7)). An fsuid that
is not 0 takes the capabilities over files away too, until it is 0 again. The C library's setgroups changes
all threads, so the system call is made here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Rights"]

SETGROUPS = {"x86_64": 116, "aarch64": 159}  # arch/x86/entry/syscalls/syscall_64.tbl, asm-generic/unistd.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.setfsuid.argtypes = _libc.setfsgid.argtypes = [ctypes.c_uint32]
_NOBODY = 0xFFFFFFFF  # no id: changes nothing, and what is in force is returned


@dataclass(frozen=True)
class Rights:
    """Whose rights, as ids of the host; ``groups`` are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let this thread have them, and no other right over files. Raises OSError, with its own rights."""
        uid, gid, groups = _current(_libc.setfsuid), _current(_libc.setfsgid), os.getgroups()
        try:
            _set_groups(self.groups)
            _set(_libc.setfsgid, self.gid)
            _set(_libc.setfsuid, self.uid)
            yield
        finally:
            _set(_libc.setfsuid, uid)
            _set(_libc.setfsgid, gid)
            _set_groups(groups)


def _current(call: ctypes._NamedFuncPointer) -> int:
    return int(call(_NOBODY)) & _NOBODY


def _set(call: ctypes._NamedFuncPointer, value: int) -> None:
    call(value)  # it says what was in force before, and not whether it worked
    if _current(call) != value:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _set_groups(groups: tuple[int, ...] | list[int]) -> None:
    number = SETGROUPS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"no numbers of system calls for {platform.machine()}")
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _libc.syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), array) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
