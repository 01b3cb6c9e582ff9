"""Messages with descriptors over a Unix socket."""

from __future__ import annotations

import array
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Sender", "let_wait", "receive"]

SO_SNDBUFFORCE = 32  # asm-generic/socket.h: beyond net.core.wmem_max, for who has CAP_NET_ADMIN


def let_wait(sock: socket.socket, size: int) -> None:
    """Let so many bytes wait for the other end, where this process may say so."""
    with suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, size)


class Sender:
    """Sends messages over a socket that does not block and keeps their bounds; tasks may share it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._full = anyio.Lock()

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message whole. Raises OSError when nobody is at the other end."""
        while not self.send_now(data, fds):
            async with self._full:  # one task alone may wait for a socket
                await anyio.wait_writable(self._sock)

    def send_now(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """The same, if there is room for it now. Raises OSError when nobody is at the other end."""
        try:
            socket.send_fds(self._sock, [data], list(fds))
        except BlockingIOError:
            return False
        return True


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
