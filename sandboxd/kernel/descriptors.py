"""Descriptors that come over a Unix socket."""

from __future__ import annotations

import array
import socket

__all__ = ["receive"]


def receive(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
    """At most ``size`` bytes and ``most`` descriptors, closed on exec; and the flags of recvmsg(2).

    ``socket.recv_fds`` takes flags and, up to Python 3.14, does not pass them on: what it receives, every
    program inherits that is started without closing it. Raises OSError.
    """
    fds = array.array("i")
    space = socket.CMSG_LEN(most * fds.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    return data, fds.tolist(), flags
