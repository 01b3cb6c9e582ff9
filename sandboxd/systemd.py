"""What a service manager and its service tell each other: readiness, and sockets opened ahead.

Sources: sd_notify(3), sd_listen_fds(3). Neither needs libsystemd; both protocols are frozen there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from sandboxd import errors

__all__ = ["LISTEN_FDS_START", "listen_fds", "notify"]

LISTEN_FDS_START = 3
MAX_FDS = 64  # a unit of ours passes one; more than this is no unit of ours


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


def listen_fds() -> list[socket.socket]:
    """The listening stream sockets that the service manager passed, close-on-exec, in its order.

    Consumes the environment variables, so that no child takes them for its own and a second call returns
    nothing. Descriptors for another process (``LISTEN_PID``) are left alone; one that is not a listening
    Unix stream socket raises ConfigInvalid, since the unit is then not what its administrator thinks.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or not 0 < int(count) <= MAX_FDS:
        return []
    numbers = range(LISTEN_FDS_START, LISTEN_FDS_START + int(count))
    for fd in numbers:
        _check(fd)
    return [socket.socket(fileno=fd) for fd in numbers]


def _check(fd: int) -> None:
    try:
        os.set_inheritable(fd, False)
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as error:
        raise errors.ConfigInvalid(
            f"the service manager passed descriptor {fd}, which is not open"
        ) from error
    if is_socket:
        probe = socket.socket(fileno=fd)
        try:
            listens = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
            if probe.family == socket.AF_UNIX and probe.type == socket.SOCK_STREAM and listens:
                return
        finally:
            probe.detach()
    raise errors.ConfigInvalid(
        f"the service manager passed descriptor {fd}, which is no listening Unix stream socket"
    )
