"""Whole messages, with descriptors, between the daemon and the process of its engine."""

from __future__ import annotations

import os
import pickle
import socket
from typing import TYPE_CHECKING, Any

from sandboxd import errors
from sandboxd.kernel import descriptors

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_SHAPES", "Channel", "failure", "raised"]

MAX_FDS = 32
MAX_SHAPES = 256  # that either end remembers
BUFFER = 8 << 20  # bytes that wait for the other end; the largest shape is that of a policy file of 1 MiB


class Channel:
    """One end of a socketpair. Both ends are our own code in one release, so messages are pickled."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sender = descriptors.Sender(sock)
        sock.setblocking(False)
        descriptors.let_wait(sock, BUFFER)

    def fileno(self) -> int:
        """The descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """The other end reads the end of the stream."""
        self._sock.close()

    async def send(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send a message whole. Raises OSError when nobody is at the other end."""
        await self._sender.send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL), fds)

    def receive(self) -> tuple[Any, list[int]] | None:
        """The next message; None at the end of the stream. Raises BlockingIOError where there is none yet.

        Where this process has no descriptors left, a message comes with none of its own.
        """
        size = self._sock.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
        if not size:
            return None
        data, fds, flags = descriptors.receive(self._sock, size, MAX_FDS)
        if flags & socket.MSG_CTRUNC:
            while fds:
                os.close(fds.pop())
        return pickle.loads(data), fds  # noqa: S301  (of our own process)


def failure(error: BaseException) -> tuple[Any, ...]:
    """An error of our tree, or of the host, as ``raised`` takes it."""
    if isinstance(error, errors.SandboxdError):
        return type(error), str(error), error.details
    if isinstance(error, OSError):
        return errors.HostFailed, f"the host refused a part of a container: {error}", {}
    return errors.EngineFailed, f"a fault of the engine: {error!r}", {}


def raised(kind: type[errors.SandboxdError], message: str, details: dict[str, Any]) -> errors.SandboxdError:
    """The error that ``failure`` took apart."""
    return kind(message, **details)
