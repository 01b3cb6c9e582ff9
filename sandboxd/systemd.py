"""What a service tells its manager: readiness.

Source: sd_notify(3). It needs no libsystemd; the protocol is frozen there. Sockets that the manager opened
ahead are the listener's (``api/listener.py``).
"""

from __future__ import annotations

import contextlib
import os
import socket

__all__ = ["notify"]


def notify(state: str) -> bool:
    """Send newline-separated assignments such as ``READY=1`` to the service manager.

    Returns False when nobody asked for it (no ``NOTIFY_SOCKET``) or nobody takes it: a daemon that cannot
    say that it is ready is ready nevertheless, so this raises nothing but ValueError for a NUL.
    """
    if "\0" in state:
        raise ValueError("a state must not contain a NUL character")
    address = os.environ.get("NOTIFY_SOCKET", "")
    if len(address) < 2 or address[0] not in "/@":  # AF_VSOCK forms are for virtual machines, not services
        return False
    name = f"\0{address[1:]}" if address[0] == "@" else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)  # a manager that does not read must not hold us up
        channel.sendto(state.encode(), name)
        return True
    return False
