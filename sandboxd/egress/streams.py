"""Bytes both ways: over a socket, and over TLS over that.

TLS towards a container is pyOpenSSL's, since ``ssl`` takes a certificate from files alone, and there are none
here. TLS towards a server is that of ``ssl``, which compares names.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

import anyio
from OpenSSL import SSL

from sandboxd.egress.leaves import ProtocolRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.egress.budget import Budget

__all__ = ["Broken", "ClientTls", "Counted", "Plain", "ServerTls", "Stream", "first_of"]

READ = 1 << 16
HANDSHAKE_SECONDS = 10.0
T = TypeVar("T")


class Broken(OSError):
    """Raised where what comes is not what was agreed on, or ends in the middle of it."""


class _Ended(Broken):
    """Raised where a program ends its connection without a word."""


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
        left = memoryview(data)
        while left:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                await anyio.wait_writable(self._sock)

    async def finish(self) -> None:
        """Say that nothing more comes."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)


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


class ServerTls:
    """TLS over a stream, as its server."""

    def __init__(self, stream: Stream, tls: SSL.Connection) -> None:
        """``tls`` is over memory."""
        self._stream = stream
        self._writing = anyio.Lock(fast_acquire=True)  # what both ways write is not to be mixed
        self._tls = tls

    async def handshake(self) -> None:
        """Raises Broken."""
        with anyio.move_on_after(HANDSHAKE_SECONDS):
            await self._until_done(self._tls.do_handshake)
            await self._flush()
            return
        raise Broken("the program did not end its TLS handshake")

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        try:
            return await self._until_done(lambda: self._tls.recv(READ))
        except (SSL.ZeroReturnError, _Ended):  # many programs end so; HTTP tells where it is too early
            return b""

    def at_hand(self) -> bytes | None:
        """Bytes that are there already; none at the end; None: nothing is there."""
        data = self._stream.at_hand()
        if data == b"":
            return b""
        if data is not None:
            self._tls.bio_write(data)
        try:
            return self._tls.recv(READ)
        except SSL.WantReadError:
            return None
        except SSL.Error:
            return b""

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        left = memoryview(data)
        while left:
            try:
                sent = self._tls.send(bytes(left[:READ]))
            except SSL.Error as error:  # after an alert, of either side
                raise Broken(f"TLS with the program: {_reason(error)}") from error
            left = left[sent:]
            await self._flush()

    async def finish(self) -> None:
        """Say that nothing more comes."""
        with suppress(SSL.Error):
            self._tls.shutdown()
        await self._flush()
        await self._stream.finish()

    async def _until_done(self, step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except SSL.WantReadError:
                await self._flush()
                data = await self._stream.receive()
                if not data:
                    raise _Ended("the program ended its connection in the middle of TLS") from None
                self._tls.bio_write(data)
            except SSL.ZeroReturnError:
                raise
            except ProtocolRefused as error:
                await self._flush()  # the alert
                raise Broken(str(error)) from error
            except SSL.Error as error:
                await self._flush()  # the alert
                raise Broken(f"TLS with the program: {_reason(error)}") from error

    async def _flush(self) -> None:
        async with self._writing:
            while True:
                try:
                    data = self._tls.bio_read(1 << 20)
                except SSL.WantReadError:
                    return
                await self._stream.send(data)


class ClientTls:
    """TLS over a stream, as a client of the server ``name``, which its certificate has to be for."""

    def __init__(self, stream: Stream, context: ssl.SSLContext, name: str) -> None:
        self._stream = stream
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._writing = anyio.Lock(fast_acquire=True)
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=name)

    async def handshake(self) -> str | None:
        """The protocol that the server chose (ALPN). Raises Broken."""
        with anyio.move_on_after(HANDSHAKE_SECONDS):
            await self._until_done(self._tls.do_handshake)
            await self._flush()
            return self._tls.selected_alpn_protocol()
        raise Broken("the server did not end its TLS handshake")

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        try:
            return await self._until_done(lambda: self._tls.read(READ))
        except ssl.SSLZeroReturnError:
            return b""

    def at_hand(self) -> bytes | None:
        """Bytes that are there already; none at the end; None: nothing is there."""
        data = self._stream.at_hand()
        if data == b"":
            return b""
        self._in.write(data or b"")
        try:
            return self._tls.read(READ)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError:
            return b""

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        left = memoryview(data)
        while left:
            sent = self._tls.write(left[:READ])
            left = left[sent:]
            await self._flush()

    async def finish(self) -> None:
        """Say that nothing more comes."""
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()
        await self._stream.finish()

    async def _until_done(self, step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._stream.receive()
                if not data:
                    raise Broken("the server ended its connection in the middle of TLS") from None
                self._in.write(data)
            except ssl.SSLZeroReturnError:
                raise
            except ssl.SSLCertVerificationError as error:
                raise Broken(f"the server's certificate: {error.verify_message}") from error
            except ssl.SSLError as error:
                raise Broken(f"TLS with the server: {error.reason or error}") from error

    async def _flush(self) -> None:
        async with self._writing:
            if self._out.pending:
                await self._stream.send(self._out.read())


def _reason(error: SSL.Error) -> str:
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return ", ".join(str(entry[-1]) for entry in entries) or "the connection ended"


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first that was raised of what tasks raised."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
