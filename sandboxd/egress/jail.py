"""What a process gives up before it reads a byte of anybody's.

It keeps the sockets that it is handed, and nothing else: another user, no capability, an empty file system,
and system calls that talk over sockets but make none, and connect none.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import tempfile
from pathlib import Path

__all__ = ["give_up"]

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
SECCOMP_MODE_FILTER = 2
LAST_CAPABILITY = 63
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUTS = 0x00020000, 0x08000000, 0x04000000


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def give_up(uid: int, descriptors: int, filter_program: bytes) -> None:
    """Become ``uid`` and little else. Raises OSError; must run in the process's only thread.

    ``descriptors``: how many it may have open. ``filter_program``: a ``struct sock_filter[]``.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    check(libc.unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS))
    empty = tempfile.mkdtemp(prefix="sandboxd-egress-")
    here = os.open(empty, os.O_PATH | os.O_DIRECTORY)
    Path(empty).rmdir()
    os.fchdir(here)
    os.chroot(".")  # a directory that is gone: there is nothing in it, and nothing can be made there
    os.close(here)
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    for limit, value in (
        (resource.RLIMIT_NOFILE, descriptors),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        most = resource.getrlimit(limit)[1]
        lowered = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (lowered, lowered))
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # a change of user takes it away
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    asked = _Filter(len(filter_program) // 8, filter_program)
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(asked), 0, 0))
