"""Work in another namespace, such as a container's, by a thread that has joined it and ends with the work.

setns(2) takes a mount namespace only of a thread that shares its root and working directory with no other
(``unshare(CLONE_FS)``), and that cannot be undone.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_mount_namespace", "in_network_namespace", "in_new_network_namespace"]

CLONE_FS, CLONE_NEWNS, CLONE_NEWNET = 0x200, 0x00020000, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def in_mount_namespace(namespace: int, work: Callable[[], T]) -> T:
    """What ``work`` returns in a namespace, a descriptor. Raises OSError, and what ``work`` raises."""

    def join() -> int:
        return int(_libc.unshare(CLONE_FS) or _libc.setns(namespace, CLONE_NEWNS))

    return _inside("mount", join, work)


def in_network_namespace(namespace: int, work: Callable[[], T]) -> T:
    """The same in a network namespace: sockets that are made there stay there, whoever has them."""
    return _inside("network", lambda: _libc.setns(namespace, CLONE_NEWNET), work)


def in_new_network_namespace(work: Callable[[], T]) -> T:
    """The same in one that is made for the work."""
    return _inside("network", lambda: _libc.unshare(CLONE_NEWNET), work)


def _inside(name: str, join: Callable[[], int], work: Callable[[], T]) -> T:
    found: list[T] = []
    raised: list[BaseException] = []

    def join_and_work() -> None:
        try:
            if join() < 0:
                code = ctypes.get_errno()
                raise OSError(code, f"the container's {name} namespace: {os.strerror(code)}")
            found.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again below, in the thread that asked)
            raised.append(error)

    thread = threading.Thread(target=join_and_work, name="inside a container", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]
