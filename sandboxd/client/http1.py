"""A client's side of HTTP/1.1 (RFC 9112) on a connected socket, for one exchange.

``http.client`` would do, but to read a few headers it loads ``email`` and ``ssl``: more than half of all
that ``run-in-sandbox`` would import, at each start. What this API needs of the protocol is small: one
request, sent whole or in chunks, and one answer with a length or in chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Cut", "Malformed", "Response", "read_head", "send"]

CHUNK = 256 * 1024
MAX_LINE = 64 * 1024
MAX_HEAD = 256 * 1024
MAX_DIGITS = 15  # of a length: no answer is longer than 2**53
FRAMING = frozenset({"content-length", "transfer-encoding"})
HEX = frozenset("0123456789abcdefABCDEF")


class Malformed(ValueError):
    """Raised for what is no HTTP/1.1 answer."""


class Cut(ConnectionError):
    """Raised when the peer closes before the end of its answer."""


def send(
    sock: socket.socket,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes | Iterable[bytes] | None,
) -> None:
    """Send a request; a body of pieces is sent in chunks, and ``headers`` have to say so.

    Raises ValueError for what would end a line, OSError.
    """
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    if " " in target or any(sign in line for line in lines for sign in "\r\n\0"):
        raise ValueError("a request that would not be one line each")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    if body is None or isinstance(body, bytes):
        sock.sendall(head + (body or b""))
        return
    sock.sendall(head)
    for piece in body:
        if piece:  # an empty chunk would end the body
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
    sock.sendall(b"0\r\n\r\n")


def read_head(sock: socket.socket) -> bytes:
    """A head, and not a byte of what follows it. Raises Cut, Malformed, and what the socket raises."""
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            raise Cut("the connection ended")
        head += byte
        if len(head) > MAX_HEAD:
            raise Malformed("an endless head")
    return bytes(head)


class Response:
    """One answer. Every method raises Malformed, Cut, and what the socket raises."""

    def __init__(self, sock: socket.socket, begun: bytes = b"") -> None:
        """Read the head, of which ``begun`` was read; informational answers before it are passed over."""
        self._sock = sock
        self._buffer = begun
        self._at = 0
        self.status, self.headers = self._head()
        while 100 <= self.status < 200:
            self.status, self.headers = self._head()

    def body(self) -> Iterator[bytes]:
        """The body as it arrives. Malformed also where its end could not be told from a lost connection."""
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if self.status in {204, 304}:
            return
        if coding is not None:
            if coding.lower() != "chunked":
                raise Malformed(f"an answer in transfer coding {coding[:40]!r}")
            yield from self._chunks()
        elif length is None:
            raise Malformed("an answer without framing, which cannot be told from a cut one")
        elif length.isascii() and length.isdigit() and len(length) <= MAX_DIGITS:
            yield from self._counted(int(length))
        else:
            raise Malformed(f"an answer of length {length[:40]!r}")

    def _chunks(self) -> Iterator[bytes]:
        while size := self._chunk_size():
            yield from self._counted(size)
            if self._line():
                raise Malformed("a chunk that is longer than it says")
        left = MAX_HEAD
        while trailer := self._line():
            left -= len(trailer)
            if left < 0:
                raise Malformed("an endless trailer")

    def _chunk_size(self) -> int:
        digits = self._line().partition(b";")[0].strip().decode("latin-1")
        if not 0 < len(digits) <= MAX_DIGITS or not HEX.issuperset(digits):
            raise Malformed("a chunk without its size")
        return int(digits, 16)

    def _counted(self, left: int) -> Iterator[bytes]:
        while left:
            if self._at == len(self._buffer):
                self._fill()
            data = self._buffer[self._at : self._at + left]
            self._at += len(data)
            left -= len(data)
            yield data

    def _head(self) -> tuple[int, dict[str, str]]:
        try:
            version, _, rest = self._line().partition(b" ")
        except Cut:
            if not self._buffer[self._at :].startswith(b"HTTP/1."[: len(self._buffer) - self._at]):
                raise Malformed("an answer that is not HTTP") from None
            raise
        code = rest.partition(b" ")[0]
        if version not in {b"HTTP/1.1", b"HTTP/1.0"} or not (len(code) == 3 and code.isdigit()):
            raise Malformed("an answer that is not HTTP")
        headers: dict[str, str] = {}
        left = MAX_HEAD
        while line := self._line():
            left -= len(line)
            name, colon, value = line.decode("latin-1").partition(":")
            name = name.lower()
            # a name with a space at an end is a folded line or worse; two lengths are a trap
            if left < 0 or not colon or name != name.strip() or (name in headers and name in FRAMING):
                raise Malformed("an answer with a header that is none")
            headers[name] = value.strip()
        return int(code), headers

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n", self._at)) < 0:
            if len(self._buffer) - self._at > MAX_LINE:
                raise Malformed("an endless line")
            self._fill()
        line = self._buffer[self._at : end]
        self._at = end + 2
        return line

    def _fill(self) -> None:
        data = self._sock.recv(CHUNK)
        if not data:
            raise Cut("the connection ended")
        self._buffer = self._buffer[self._at :] + data
        self._at = 0
