"""HTTP/1.1 over a Unix socket with anyio and h11: the asynchronous half of the transport.

The same exchanges, limits and errors as ``transport``; h11 is the parser, so nothing of HTTP is ours.
"""

from __future__ import annotations

import errno
import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import anyio
import h11
from anyio.abc import SocketStream, UNIXSocketStream

from sandboxd.client import location, wire
from sandboxd.client.http1 import CHUNK
from sandboxd.client.transport import MAX_PROBLEM

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Sequence

    from sandboxd import errors

__all__ = ["AsyncAnswer", "exchange", "switch"]

MAX_HEADER = 64 * 1024
HEAD = len(b"HTTP/")
RETRY = 0.01  # seconds between two attempts on a full backlog


async def connect(paths: Sequence[str], timeout: float) -> SocketStream:  # noqa: ASYNC109 - per candidate
    """A connected stream to the first candidate that accepts. Raises Unavailable.

    ``anyio.connect_unix`` spins on a full backlog and leaves its socket open when it is cancelled there,
    so the socket is ours; connecting a Unix socket never blocks, it fails with EAGAIN (connect(2)).
    """
    tried: list[tuple[str, OSError | None]] = []
    for path in paths:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            with anyio.fail_after(timeout):
                while not _connected(sock, path):  # noqa: ASYNC110 - the kernel tells nobody
                    await anyio.sleep(RETRY)
            return await UNIXSocketStream.from_socket(sock)
        except TimeoutError:
            sock.close()
            tried.append((path, OSError(errno.ETIMEDOUT, "timed out")))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            sock.close()
            tried.append((path, error if isinstance(error, OSError) else None))
        except BaseException:
            sock.close()
            raise
    raise location.unavailable(tried)


def _connected(sock: socket.socket, path: str) -> bool:
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


@contextmanager
def mapped(timeout: float | None, what: str) -> Iterator[None]:
    """Map what anyio and h11 raise to Unavailable."""
    try:
        yield
    except TimeoutError:
        raise wire.timed_out(timeout) from None
    except (anyio.BrokenResourceError, anyio.ClosedResourceError, ConnectionError):
        raise wire.lost(what) from None
    except h11.ProtocolError as error:
        raise wire.protocol_error(f"{error} {what}") from None


class AsyncAnswer:
    """One answer whose body has not been read yet; closing it closes the connection."""

    def __init__(self, stream: SocketStream, parser: h11.Connection, timeout: float | None) -> None:
        self._stream = stream
        self._parser = parser
        self._timeout = timeout
        self._eof = False
        self._head = b""
        self.status = 0
        self.content_type = ""
        self.location = ""
        self.omitted = 0
        self._framed = False

    def set_timeout(self, timeout: float | None) -> None:
        """Bound each further read to so many seconds; None waits for ever."""
        self._timeout = timeout

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            try:
                event = self._parser.next_event()
            except h11.RemoteProtocolError:
                # At the end of the stream h11 complains of every message that was cut: that is a lost
                # connection, unless what came was no HTTP to begin with.
                foreign = not self.status and not b"HTTP/".startswith(self._head)
                if self._eof and not foreign:
                    raise anyio.BrokenResourceError from None
                raise
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            try:
                with anyio.fail_after(self._timeout):
                    data = await self._stream.receive(CHUNK)
            except anyio.EndOfStream:
                data = b""
                self._eof = True
            if len(self._head) < HEAD:
                self._head += data[: HEAD - len(self._head)]
            self._parser.receive_data(data)

    async def begin(self) -> None:
        """Read the head of the answer."""
        with mapped(self._timeout, "before an answer"):
            while True:
                event = await self._next()
                if isinstance(event, h11.Response):
                    break
                if not isinstance(event, h11.InformationalResponse):
                    raise anyio.BrokenResourceError
        headers = {name.lower(): value for name, value in event.headers}
        self.status = event.status_code
        self.content_type = headers.get(b"content-type", b"").decode("latin-1")
        self.location = headers.get(b"location", b"").decode("latin-1")
        self.omitted = wire.count(headers.get(b"sandboxd-omitted", b"").decode("latin-1"))
        framed = b"content-length" in headers or b"transfer-encoding" in headers
        self._framed = framed or event.status_code in {204, 304}  # which have no body, RFC 9112, section 6.3

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Raises Unavailable if it ends before its framing says so."""
        with mapped(self._timeout, "in the middle of an answer"):
            if not self._framed:
                raise h11.RemoteProtocolError("an answer without framing cannot be told from a cut one")
            while True:
                event = await self._next()
                if isinstance(event, h11.Data):
                    yield bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    return
                else:
                    raise anyio.BrokenResourceError

    async def read(self, limit: int = wire.MAX_DOCUMENT) -> bytes:
        """The whole body. Raises Unavailable if it is longer than ``limit`` bytes."""
        parts: list[bytes] = []
        size = 0
        async for data in self.chunks():
            size += len(data)
            if size > limit:
                raise wire.protocol_error(f"an answer of more than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """The lines of an ndjson body as they arrive."""
        lines = wire.Lines()
        async for data in self.chunks():
            for line in lines.feed(data):
                yield line
        lines.finish()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()


async def exchange(
    paths: Sequence[str],
    asked: wire.Exchange,
    *,
    connect_timeout: float,
    timeout: float | None,  # noqa: ASYNC109 - bounds each read and write, not the exchange
    chunks: AsyncIterable[bytes] | None = None,
) -> AsyncAnswer:
    """Send a request and return its answer, if it is a 2xx one; raise what a problem stands for."""
    async with _connection(paths, connect_timeout) as (stream, parser):
        answer = AsyncAnswer(stream, parser, None if asked.waits else timeout)
        await _send(stream, parser, asked, chunks, timeout)
        await answer.begin()
        if not 200 <= answer.status < 300:
            raise await _refusal(answer)
        return answer


@asynccontextmanager
async def _connection(
    paths: Sequence[str],
    timeout: float,  # noqa: ASYNC109 - per candidate
) -> AsyncGenerator[tuple[SocketStream, h11.Connection], None]:
    """A connection, which is closed where the block fails; else it is whoever's who has its answer."""
    stream = await connect(paths, timeout)
    try:
        yield stream, h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER)
    except BaseException:
        # A cancelled task cannot wait for a graceful close; aclose closes first and waits afterwards.
        with anyio.CancelScope(shield=True):
            await stream.aclose()
        raise


async def _refusal(answer: AsyncAnswer) -> errors.SandboxdError:
    """What an answer that is no 2xx one stands for."""
    return wire.error_of(answer.status, answer.content_type, await answer.read(MAX_PROBLEM))


async def switch(
    paths: Sequence[str],
    asked: wire.Exchange,
    *,
    connect_timeout: float,
    timeout: float | None,  # noqa: ASYNC109 - bounds each read and write before the answer
) -> SocketStream:
    """Send a request to switch protocols; the stream, at the first byte after status 101."""
    async with _connection(paths, connect_timeout) as (stream, parser):
        answer = AsyncAnswer(stream, parser, timeout)
        await _send(stream, parser, asked, None, timeout)
        head = await _read_head(stream, timeout)
        if head.split(b" ", 2)[1:2] != [b"101"]:
            parser.receive_data(head)
            await answer.begin()
            raise await _refusal(answer)
        return stream


async def _read_head(stream: SocketStream, timeout: float | None) -> bytes:  # noqa: ASYNC109 - of each read
    """A head, and not a byte of what follows it."""
    head = bytearray()
    with mapped(timeout, "before an answer"):
        while not head.endswith(b"\r\n\r\n"):
            if len(head) > MAX_HEADER:
                raise h11.RemoteProtocolError("an endless head")
            try:
                with anyio.fail_after(timeout):
                    head += await stream.receive(1)
            except anyio.EndOfStream:
                raise anyio.BrokenResourceError from None
    return bytes(head)


async def _send(
    stream: SocketStream,
    parser: h11.Connection,
    asked: wire.Exchange,
    chunks: AsyncIterable[bytes] | None,
    timeout: float | None,  # noqa: ASYNC109 - bounds each write
) -> None:
    headers = asked.all_headers()
    if chunks is not None:
        headers |= {"Content-Type": "application/octet-stream", "Transfer-Encoding": "chunked"}

    async def send(event: h11.Event) -> None:
        data = parser.send(event)
        if data:
            with anyio.fail_after(timeout):
                await stream.send(data)

    try:
        await send(h11.Request(method=asked.method, target=asked.target, headers=list(headers.items())))
        if asked.body:
            await send(h11.Data(data=asked.body))
        if chunks is not None:
            async for piece in chunks:
                if piece:
                    await send(h11.Data(data=piece))
        await send(h11.EndOfMessage())
    except anyio.BrokenResourceError:
        # The daemon may refuse a body before it has read it: its answer is already in our buffer.
        return
    except TimeoutError:
        raise wire.timed_out(timeout) from None
