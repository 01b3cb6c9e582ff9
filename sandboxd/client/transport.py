"""HTTP/1.1 over a Unix socket: the blocking half of the transport.

Foreign exceptions (``OSError``, those of ``http1``) end here: what leaves is an ``errors`` class. Nothing
but the standard library is imported, and little of it, since ``run-in-sandbox`` starts through here.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from typing import TYPE_CHECKING, Self

from sandboxd import errors
from sandboxd.client import http1, location, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Answer", "Body", "connect", "exchange", "switch"]

MAX_PROBLEM = 2**20


def connect(paths: Sequence[str], timeout: float) -> socket.socket:
    """A connected socket to the first candidate that accepts. Raises Unavailable.

    A blocking connect bounded by ``SO_SNDTIMEO`` waits for a full backlog; one on a socket with a
    Python timeout would fail at once with EAGAIN (unix(7), connect(2)).
    """
    tried: list[tuple[str, OSError | None]] = []
    for path in paths:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            fraction, whole = math.modf(max(timeout, 0.001))
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(fraction * 1e6))
            )
            sock.connect(path)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            sock.close()
            tried.append((path, error if isinstance(error, OSError) else None))
        else:
            return sock
    raise location.unavailable(tried)


@contextlib.contextmanager
def mapped(timeout: float | None, what: str) -> Iterator[None]:
    """Map what ``http1`` and sockets raise to Unavailable."""
    try:
        yield
    except TimeoutError:
        raise wire.timed_out(timeout) from None
    except ConnectionError:
        raise wire.lost(what) from None
    except http1.Malformed as error:
        raise wire.protocol_error(str(error)) from None
    except OSError as error:
        raise errors.Unavailable(f"the socket failed {what}: {error.strerror}", reason="host") from None


class Body:
    """What an answer brings, not read yet; closing it hangs up."""

    def __init__(self, location: str, omitted: int) -> None:
        self.location = location
        self.omitted = omitted

    def set_timeout(self, timeout: float | None) -> None:
        """Bound each further read to so many seconds; None waits for ever."""
        raise NotImplementedError

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives. Raises Unavailable if it ends before its framing says so."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connection."""
        raise NotImplementedError

    def read(self, limit: int = wire.MAX_DOCUMENT) -> bytes:
        """The whole body. Raises Unavailable if it is longer than ``limit`` bytes."""
        parts: list[bytes] = []
        size = 0
        for data in self.chunks():
            size += len(data)
            if size > limit:
                raise wire.protocol_error(f"an answer of more than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    def lines(self) -> Iterator[bytes]:
        """The lines of an ndjson body as they arrive."""
        lines = wire.Lines()
        for data in self.chunks():
            yield from lines.feed(data)
        lines.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Answer(Body):
    """One answer on a socket of its own."""

    def __init__(self, sock: socket.socket, response: http1.Response, timeout: float | None) -> None:
        headers = response.headers
        super().__init__(headers.get("location", ""), wire.count(headers.get("sandboxd-omitted", "")))
        self._sock = sock
        self._response = response
        self._timeout = timeout
        self.status = response.status
        self.content_type = headers.get("content-type", "")

    def set_timeout(self, timeout: float | None) -> None:
        """Bound each further read to so many seconds; None waits for ever."""
        self._timeout = timeout
        self._sock.settimeout(timeout)

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives. Raises Unavailable if it ends before its framing says so."""
        with mapped(self._timeout, "in the middle of an answer"):
            yield from self._response.body()

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


def exchange(
    paths: Sequence[str],
    asked: wire.Exchange,
    *,
    connect_timeout: float,
    timeout: float | None,
    chunks: Iterable[bytes] | None = None,
    connected: Callable[[socket.socket], None] | None = None,
) -> Answer:
    """Send a request and return its answer, if it is a 2xx one; raise what a problem stands for.

    ``timeout`` bounds each read and write in seconds; ``chunks`` is sent as a chunked body and read
    only as fast as the daemon takes it.
    """
    sock = connect(paths, connect_timeout)
    try:
        if connected is not None:
            connected(sock)
        sock.settimeout(timeout)
        _send(sock, asked, chunks, timeout)
        with mapped(timeout, "before an answer"):
            if asked.waits:
                sock.settimeout(None)
            response = http1.Response(sock)
        answer = Answer(sock, response, None if asked.waits else timeout)
    except BaseException:
        sock.close()
        raise
    if 200 <= answer.status < 300:
        return answer
    with answer:
        raise wire.error_of(answer.status, answer.content_type, answer.read(MAX_PROBLEM))


def switch(
    paths: Sequence[str], asked: wire.Exchange, *, connect_timeout: float, timeout: float | None
) -> socket.socket:
    """Send a request to switch protocols; the socket, at the first byte after status 101.

    ``timeout`` bounds the wait for the answer alone. Raises as ``exchange``.
    """
    sock = connect(paths, connect_timeout)
    try:
        sock.settimeout(timeout)
        _send(sock, asked, None, timeout)
        with mapped(timeout, "before an answer"):
            head = http1.read_head(sock)
            if head.split(b" ", 2)[1:2] == [b"101"]:
                sock.settimeout(None)
                return sock
            answer = Answer(sock, http1.Response(sock, head), timeout)
        problem = answer.read(MAX_PROBLEM)
    except BaseException:
        sock.close()
        raise
    sock.close()
    raise wire.error_of(answer.status, answer.content_type, problem)


def _send(
    sock: socket.socket, asked: wire.Exchange, chunks: Iterable[bytes] | None, timeout: float | None
) -> None:
    headers = asked.all_headers()
    if chunks is not None:
        headers |= {"Content-Type": "application/octet-stream", "Transfer-Encoding": "chunked"}
    try:
        http1.send(sock, asked.method, asked.target, headers, asked.body if chunks is None else chunks)
    except (BrokenPipeError, ConnectionResetError):
        # The daemon may refuse a body before it has read it: its answer is already in our buffer.
        return
    except TimeoutError:
        raise wire.timed_out(timeout) from None
