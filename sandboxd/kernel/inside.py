"""Work in another mount namespace, such as a container's, by a thread that has joined it.

setns(2) takes a mount namespace only of a thread that shares its root and working directory with no other
(``unshare(CLONE_FS)``), and neither can be undone, so the thread ends with the work.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_mount_namespace"]

CLONE_FS, CLONE_NEWNS = 0x200, 0x00020000
_libc = ctypes.CDLL(None, use_errno=True)


def in_mount_namespace(namespace: int, work: Callable[[], None]) -> None:
    """Call ``work`` in the namespace, given as a descriptor. Raises OSError, and what ``work`` raises."""
    raised: list[BaseException] = []

    def join_and_work() -> None:
        try:
            if _libc.unshare(CLONE_FS) < 0 or _libc.setns(namespace, CLONE_NEWNS) < 0:
                code = ctypes.get_errno()
                raise OSError(code, f"the container's mount namespace: {os.strerror(code)}")
            work()
        except BaseException as error:  # noqa: BLE001  (raised again below, in the thread that asked)
            raised.append(error)

    thread = threading.Thread(target=join_and_work, name="inside a container", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
