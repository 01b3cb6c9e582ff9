"""The host name of another UTS namespace: uname(2) by the calling thread, which joins it for that moment."""

from __future__ import annotations

import ctypes
import os

__all__ = ["hostname_of"]

CLONE_NEWUTS = 0x04000000

_libc = ctypes.CDLL(None, use_errno=True)


def hostname_of(namespace: int) -> str:
    """The name in the namespace of this descriptor, which is closed. Raises OSError."""
    try:
        own = os.open("/proc/thread-self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _join(namespace)
            try:
                return os.uname().nodename
            finally:
                _join(own)
        finally:
            os.close(own)
    finally:
        os.close(namespace)


def _join(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWUTS) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
