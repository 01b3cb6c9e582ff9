"""Bytes both ways over a socket. ``tls`` has the same over that."""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

import anyio
import anyio.lowlevel

from sandboxd.egress.relay import Cut

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from sandboxd.egress.budget import Budget

__all__ = ["READ", "Broken", "Counted", "Left", "Plain", "Stream", "first_of", "while_there", "write"]

READ = 1 << 16
T = TypeVar("T")


class Broken(OSError):
    """Raised where what comes is not what was agreed on, or ends in the middle of it."""


class Left(Broken):
    """Raised where the other end does not wait for what it asked for."""


class Stream(Protocol):
    """All of it raises OSError where the connection breaks."""

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        ...

    def at_hand(self) -> bytes | None:
        """The same, of what is there already; None: nothing is."""
        ...

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        ...

    async def finish(self) -> None:
        """Say that nothing more comes."""
        ...

    async def gone(self) -> None:
        """Wait until the other end has said that nothing more comes, or is gone; reads nothing."""
        ...


class Plain:
    """A connected socket that does not block; whoever made it closes it."""

    def __init__(self, sock: socket.socket, first: bytes = b"") -> None:
        """``first``: what was read of it already."""
        self._sock = sock
        self._first = first

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        if self._first:
            first, self._first = self._first, b""
            return first
        while True:
            try:
                data = self._sock.recv(READ)
            except BlockingIOError:
                await anyio.wait_readable(self._sock)
            else:
                await anyio.lowlevel.checkpoint()  # who always has something is not to hold up the others
                return data

    def at_hand(self) -> bytes | None:
        """Bytes that are there already; none at the end; None: nothing is there."""
        if self._first:
            first, self._first = self._first, b""
            return first
        try:
            return self._sock.recv(READ)
        except BlockingIOError:
            return None

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        await write(self._sock, data)

    async def finish(self) -> None:
        """Say that nothing more comes."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def gone(self) -> None:
        """Wait until the other end has said that nothing more comes, or is gone; reads nothing."""
        with select.epoll() as ends:  # a wait for bytes would be over with the first of them
            ends.register(self._sock, select.EPOLLRDHUP)
            await anyio.wait_readable(ends.fileno())


class Counted(Plain):
    """The container's end of a connection, whose bytes a budget counts. Raises Cut where it is used up."""

    def __init__(self, sock: socket.socket, first: bytes, budget: Budget) -> None:
        super().__init__(sock, first)
        self._budget = budget
        self.sent = self.received = 0
        """By the container."""

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        data = await super().receive()
        left = len(data)
        while left:
            taken = await self._budget.take("out", left)
            self.sent += taken
            left -= taken
        return data

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        left = memoryview(data)
        while left:
            taken = await self._budget.take("in", len(left))
            await super().send(left[:taken])
            self.received += taken
            left = left[taken:]


async def write(sock: socket.socket, data: bytes | memoryview) -> None:
    """Send all of it over a socket that does not block. Raises OSError."""
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left) :]
        except BlockingIOError:
            await anyio.wait_writable(sock)


async def while_there(stream: Stream, asked: Awaitable[T]) -> T:
    """Wait for something as long as the other end of a stream does. Raises Left, and what ``asked`` raises.

    One that says that it sends no more is taken to be gone: nothing tells it from one that has closed.
    """

    async def watch() -> None:
        await stream.gone()
        raise Left("the program went away before it was decided on")

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            found = await asked
            tasks.cancel_scope.cancel()
    except ExceptionGroup as group:
        raise first_of(group) from None
    return found


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of what tasks raised; of several, that a limit was reached."""
    found = [first_of(each) if isinstance(each, BaseExceptionGroup) else each for each in group.exceptions]
    return next((each for each in found if isinstance(each, Cut)), found[0])
