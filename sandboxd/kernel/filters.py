"""Reading back the seccomp filter of another process, ptrace(2): ``PTRACE_SECCOMP_GET_FILTER``.

The process is seized and interrupted for some tens of microseconds and goes on where it was; it sees
nothing of it. One that may be anybody's is read by a thread which then ends: the kernel lets go of a process
that cannot be detached from, because it does not stop, only when its tracer ends, and until then it could not
be reaped. Not every host can: the kernel needs ``CONFIG_CHECKPOINT_RESTORE``, and the reader
``CAP_SYS_ADMIN``, ``CAP_SYS_PTRACE`` and no seccomp filter of its own.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time

__all__ = ["read_filter"]

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_SECCOMP_GET_FILTER = 17, 0x4206, 0x4207, 0x420C
WALL = 0x40000000  # __WALL: also a process that is no child of ours
INSTRUCTION = 8  # bytes of a struct sock_filter
# A sleeping process stops as soon as it is scheduled, which on a crowded host can take a while; a frozen one,
# or one that waits in vfork(2), never. One of ours that is given up stays traced, and cannot be reaped.
STOP_SECONDS, HOSTILE_STOP_SECONDS = 20.0, 2.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, pid: int, address: int | None, data: object) -> int:
    result: int = _libc.ptrace(request, pid, address, data)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace: {os.strerror(code)}")
    return result


def read_filter(pid: int, *, hostile: bool) -> bytes:
    """The newest filter of a process, as a ``struct sock_filter[]``. Blocks for some tens of microseconds.

    ``hostile``: it may do anything to avoid it, and this may block for ``HOSTILE_STOP_SECONDS``.

    Raises OSError: EPERM, EACCES, EINVAL, EIO or ENOSYS where this host or this process cannot do it
    (EPERM also while somebody else traces it), ENOENT when there is no filter, ESRCH when there is no
    process, ETIMEDOUT when it does not stop.
    """
    found: list[bytes | OSError] = []
    if hostile:
        tracer = threading.Thread(target=lambda: found.append(_read(pid, HOSTILE_STOP_SECONDS)))
        tracer.start()
        tracer.join()
    else:
        found.append(_read(pid, STOP_SECONDS))
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


def _read(pid: int, patience: float) -> bytes | OSError:
    try:
        _ptrace(PTRACE_SEIZE, pid, None, None)
        _ptrace(PTRACE_INTERRUPT, pid, None, None)
        _until_stopped(pid, patience)
        length = _ptrace(PTRACE_SECCOMP_GET_FILTER, pid, 0, None)
        program = ctypes.create_string_buffer(length * INSTRUCTION)
        _ptrace(PTRACE_SECCOMP_GET_FILTER, pid, 0, program)
        _ptrace(PTRACE_DETACH, pid, None, None)
    except OSError as error:
        return error
    return program.raw


def _until_stopped(pid: int, patience: float) -> None:
    limit = time.monotonic() + patience
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | WALL)
        if found and os.WIFSTOPPED(status):
            return
        if found:
            raise ProcessLookupError(f"process {pid} ended")
        if time.monotonic() > limit:
            raise TimeoutError(110, f"process {pid} does not stop")
        time.sleep(0.00002)
