"""Bytes from one socket to another, without a look at them; many by splice(2) through a pipe."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import anyio

if TYPE_CHECKING:
    from sandboxd.egress.budget import Budget

__all__ = ["Cut", "Pump", "cut", "deliver", "hung_up", "resets"]

CHUNK = 1 << 20
COPIED = 1 << 16  # bytes of one read that goes without a pipe
LOOK_AGAIN = 0.005  # seconds between two looks whether all has arrived: no event tells
FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Cut(Exception):
    """Raised when a connection has used its share."""

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


def resets(sock: socket.socket, *, reset: bool) -> None:
    """Whether the other end sees a reset when this is closed, by the end of this process too.

    So it is until all was said: an end that comes early is not to look like one.
    """
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))


def cut(sock: socket.socket) -> None:
    """Close so that the other end sees a reset."""
    resets(sock, reset=True)
    sock.close()


def hung_up(sock: socket.socket) -> bool:
    """Whether the other end has closed its socket, and not only said that it sends no more (poll(2))."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def arrived(sock: socket.socket) -> bool:
    """Whether the other end's kernel has all that was sent (struct tcp_info, linux/tcp.h)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    unacked = struct.unpack_from("I", info, 24)[0]
    unsent = struct.unpack_from("I", info, 144)[0] if len(info) >= 148 else 0  # not of kernels before 4.6
    return not (unacked or unsent)


async def deliver(sock: socket.socket) -> None:
    """Wait until all that was sent has arrived; what comes back is for nobody. Raises OSError.

    A socket that is closed with something unread is reset, and what was still on its way is lost.
    """
    while not arrived(sock):
        with suppress(BlockingIOError):
            while sock.recv(COPIED):
                pass
        await anyio.sleep(LOOK_AGAIN)


class Pump:
    """One direction of a connection."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, way: Literal["in", "out"], budget: Budget
    ) -> None:
        self._source = source
        self._sink = sink
        self._way: Literal["in", "out"] = way
        self._budget = budget
        self.moved = 0

    async def send(self, data: bytes) -> None:
        """Bytes that were read already. Raises OSError, Cut."""
        left = memoryview(data)
        while left:
            most = await self._budget.take(self._way, len(left))
            sent = 0
            try:
                sent = self._sink.send(left[:most])
            except BlockingIOError:
                await anyio.wait_writable(self._sink)
            finally:
                self._budget.give_back(self._way, most - sent)
            self.moved += sent
            left = left[sent:]

    async def run(self) -> None:
        """Until the source ends, which the sink is told. Raises OSError, Cut."""
        while data := await self._receive():
            await self.send(data)
            if len(data) == COPIED:  # there is more, and a pipe pays
                await self._splice()
                break
        with suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)

    async def _receive(self) -> bytes:
        while True:
            try:
                return self._source.recv(COPIED)
            except BlockingIOError:
                await anyio.wait_readable(self._source)

    async def _splice(self) -> None:
        there, here = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # what all pipes of a user may hold is bounded
                fcntl.fcntl(here, fcntl.F_SETPIPE_SZ, CHUNK)
            while count := await self._fill(here):
                await self._drain(there, count)
        finally:
            os.close(there)
            os.close(here)

    async def _fill(self, pipe: int) -> int:
        """Some bytes; 0 at the end."""
        while True:
            try:
                most = await self._budget.take(self._way, CHUNK)
            except Cut:
                await anyio.wait_readable(self._source)
                if self._source.recv(1, socket.MSG_PEEK):
                    raise
                return 0  # it ends where its share does
            moved = 0
            try:
                moved = os.splice(self._source.fileno(), pipe, most, flags=FLAGS)
            except BlockingIOError:
                pass
            else:
                self.moved += moved
                return moved
            finally:
                self._budget.give_back(self._way, most - moved)
            await anyio.wait_readable(self._source)

    async def _drain(self, pipe: int, count: int) -> None:
        while count:
            try:
                count -= os.splice(pipe, self._sink.fileno(), count, flags=FLAGS)
            except BlockingIOError:
                await anyio.wait_writable(self._sink)
