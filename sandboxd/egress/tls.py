"""TLS over a stream of bytes.

Towards a container it is pyOpenSSL's, since ``ssl`` takes a certificate from files alone, and there are none
here. Towards a server it is that of ``ssl``, which compares names.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import anyio
from OpenSSL import SSL

from sandboxd.egress.leaves import ProtocolRefused
from sandboxd.egress.streams import READ, Broken

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.egress.streams import Stream

__all__ = ["ClientTls", "ServerTls"]

HANDSHAKE_SECONDS = 10.0
T = TypeVar("T")


class _Ended(Broken):
    """Raised where the other end closes its connection without a word."""


class _Tls(ABC):
    """What both ends of TLS have in common: bytes that come and go through memory."""

    who: str
    """At the other end."""
    wants: type[Exception]
    """Raised where more has to come first."""
    closed: type[Exception]
    """Raised where the other end has said that nothing more comes."""
    errors: type[Exception]
    """Of everything that goes wrong, the two above among it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._writing = anyio.Lock(fast_acquire=True)  # what both ways write is not to be mixed

    # what differs

    @abstractmethod
    def _came(self, data: bytes) -> None: ...

    @abstractmethod
    def _to_send(self) -> bytes: ...

    @abstractmethod
    def _read(self) -> bytes: ...

    @abstractmethod
    def _write(self, data: memoryview) -> int: ...

    @abstractmethod
    def _shut(self) -> None: ...

    @abstractmethod
    def _said(self, error: Exception) -> str: ...

    # what does not

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        try:
            return await self._until_done(self._read)
        except self.closed:
            return b""

    def at_hand(self) -> bytes | None:
        """Bytes that are there already; none at the end; None: nothing is there."""
        data = self._stream.at_hand()
        if data == b"":
            return b""
        if data is not None:
            self._came(data)
        try:
            return self._read()
        except self.wants:
            return None
        except self.errors:
            return b""

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        left = memoryview(data)
        while left:
            try:
                sent = self._write(left[:READ])
            except self.errors as error:  # after an alert, of either side
                raise Broken(self._said(error)) from error
            left = left[sent:]
            await self._flush()

    async def finish(self) -> None:
        """Say that nothing more comes."""
        with suppress(self.errors):
            self._shut()
        await self._flush()
        await self._stream.finish()

    async def gone(self) -> None:
        """Wait until the other end's connection has no more to say, or is gone; reads nothing."""
        await self._stream.gone()

    async def _shake(self, step: Callable[[], None]) -> None:
        with anyio.move_on_after(HANDSHAKE_SECONDS):
            await self._until_done(step)
            await self._flush()
            return
        raise Broken(f"{self.who} did not end its TLS handshake")

    async def _until_done(self, step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except self.wants:
                await self._flush()
                data = await self._stream.receive()
                if not data:
                    raise _Ended(f"{self.who} ended its connection in the middle of TLS") from None
                self._came(data)
            except self.closed:
                raise
            except self.errors as error:
                await self._flush()  # the alert
                raise Broken(self._said(error)) from error

    async def _flush(self) -> None:
        async with self._writing:
            while data := self._to_send():
                await self._stream.send(data)


class ServerTls(_Tls):
    """TLS over a stream, as its server."""

    who = "the program"
    wants, closed, errors = SSL.WantReadError, SSL.ZeroReturnError, SSL.Error

    def __init__(self, stream: Stream, tls: SSL.Connection) -> None:
        """``tls`` is over memory."""
        super().__init__(stream)
        self._tls = tls

    async def handshake(self) -> None:
        """Raises Broken."""
        try:
            await self._shake(self._tls.do_handshake)
        except ProtocolRefused as error:
            await self._flush()  # the alert
            raise Broken(str(error)) from error

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        try:
            return await super().receive()
        except _Ended:  # many programs end so; HTTP tells where it is too early
            return b""

    def _came(self, data: bytes) -> None:
        self._tls.bio_write(data)

    def _to_send(self) -> bytes:
        try:
            return self._tls.bio_read(1 << 20)
        except SSL.WantReadError:
            return b""

    def _read(self) -> bytes:
        return self._tls.recv(READ)

    def _write(self, data: memoryview) -> int:
        return self._tls.send(bytes(data))

    def _shut(self) -> None:
        self._tls.shutdown()

    def _said(self, error: Exception) -> str:
        entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
        why = ", ".join(str(entry[-1]) for entry in entries) or "the connection ended"
        return f"TLS with the program: {why}"


class ClientTls(_Tls):
    """TLS over a stream, as a client of the server ``name``, which its certificate has to be for."""

    who = "the server"
    wants, closed, errors = ssl.SSLWantReadError, ssl.SSLZeroReturnError, ssl.SSLError

    def __init__(self, stream: Stream, context: ssl.SSLContext, name: str) -> None:
        super().__init__(stream)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=name)

    async def handshake(self) -> str | None:
        """The protocol that the server chose (ALPN). Raises Broken."""
        await self._shake(self._tls.do_handshake)
        return self._tls.selected_alpn_protocol()

    def _came(self, data: bytes) -> None:
        self._in.write(data)

    def _to_send(self) -> bytes:
        return self._out.read() if self._out.pending else b""

    def _read(self) -> bytes:
        return self._tls.read(READ)

    def _write(self, data: memoryview) -> int:
        return self._tls.write(data)

    def _shut(self) -> None:
        self._tls.unwrap()

    def _said(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the server's certificate: {error.verify_message}"
        return f"TLS with the server: {getattr(error, 'reason', None) or error}"
