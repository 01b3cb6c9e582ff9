"""Whom a TLS client asks for: the ClientHello (RFC 8446, section 4.1.2), read without answering it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAX_HELLO", "Hello", "HelloMalformed", "HelloReader", "SecondReader", "alert", "is_tls"]

MAX_HELLO = 32 * 1024  # bytes with what carries them; those with keys against quantum computers have 2 KiB
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, CLIENT_HELLO = 20, 21, 22, 1
RECORDS = range(20, 24)
SERVER_NAME, PROTOCOLS, ENCRYPTED_CLIENT_HELLO = 0, 16, 0xFE0D
HEADER, MAX_RECORD = 5, 2**14
UNRECOGNIZED_NAME = 112


class HelloMalformed(ValueError):
    """Raised when bytes that begin as TLS are no ClientHello."""


@dataclass(frozen=True)
class Hello:
    """What of it matters here."""

    server_name: str | None
    encrypted: bool
    """Whether it has the extension of Encrypted Client Hello, in earnest or as grease."""
    protocols: tuple[str, ...] = ()
    """That the client offers (ALPN, RFC 7301); those that are no ASCII are left out."""


class _Bytes:
    """Reads from the front. Raises HelloMalformed at the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise HelloMalformed("a length reaches beyond the end")
        found = self._data[self._at : end]
        self._at = end
        return found

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> _Bytes:
        """What a length of ``size`` bytes is followed by."""
        return _Bytes(self.take(self.number(size)))


class HelloReader:
    """Reads a ClientHello as its bytes come, each of them once."""

    def __init__(self) -> None:
        self._record = b""
        self._message = bytearray()
        self._read = 0
        self.rest = b""
        """What came behind it."""

    def feed(self, data: bytes) -> Hello | None:
        """More of what the client sent; None until the ClientHello is there in full.

        Raises HelloMalformed, also where it is longer than ``MAX_HELLO``.
        """
        self._read += len(data)
        pending = self._record + data
        at = 0
        while len(pending) - at >= HEADER:
            length = int.from_bytes(pending[at + 3 : at + HEADER])
            if pending[at] != HANDSHAKE or pending[at + 1] != 3 or not 0 < length <= MAX_RECORD:
                raise HelloMalformed("it is no handshake record")
            end = at + HEADER + length
            if end > len(pending):
                break
            self._message += pending[at + HEADER : end]
            at = end
            if (found := self._whole()) is not None:
                self.rest = pending[at:]
                return found
        self._record = pending[at:]
        if self._read > MAX_HELLO:
            raise HelloMalformed("it is too long")
        return None

    def _whole(self) -> Hello | None:
        message = self._message
        if message[0] != CLIENT_HELLO:
            raise HelloMalformed("it is no ClientHello")
        end = 4 + int.from_bytes(message[1:4])
        if len(message) < 4:
            return None
        if end > MAX_HELLO:
            raise HelloMalformed("it is too long")
        if len(message) < end:
            return None
        if len(message) > end:  # by nobody's rules, and another name could be in it
            raise HelloMalformed("another message follows it in its record")
        return _parse(_Bytes(bytes(message[4:end])))


class SecondReader:
    """Reads what a client sends after its ClientHello, as far as a second one can be there.

    It is sent where the server asks for other keys (RFC 8446, section 4.1.4), and some servers go by it.
    """

    def __init__(self) -> None:
        self._pending = b""
        self._hello: HelloReader | None = None

    def feed(self, data: bytes) -> tuple[bool, Hello | None]:
        """More of it: whether none can follow any more, and the one that there is. Raises HelloMalformed."""
        self._pending += data
        while self._hello is None:
            pending = self._pending
            if pending and pending[0] not in (CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE):
                return True, None  # it is encrypted, or nothing of TLS
            if len(pending) <= HEADER:
                return False, None
            length = int.from_bytes(pending[3:HEADER])
            if not 0 < length <= MAX_RECORD:
                raise HelloMalformed("a record after it has no size that there is")
            if pending[0] == HANDSHAKE:
                if not _may_begin_hello(pending[HEADER : HEADER + length]):
                    return True, None
                self._hello = HelloReader()
            elif len(pending) < HEADER + length:
                return False, None
            else:
                self._pending = pending[HEADER + length :]
        found = self._hello.feed(self._pending)
        self._pending = b""
        return found is not None, found


def _may_begin_hello(body: bytes) -> bool:
    """Of a record's beginning; it may also be of TLS 1.2, the client's keys, or encrypted."""
    return body[0] == CLIENT_HELLO and body[1:2] <= b"\2" and body[4:5] in (b"", b"\3")


def _parse(body: _Bytes) -> Hello:
    body.take(2 + 32)  # version, random
    for size in (1, 2, 1):  # session id, cipher suites, compression methods
        body.vector(size)
    name, encrypted = None, False
    protocols: tuple[str, ...] = ()
    extensions = body.vector(2) if body else _Bytes(b"")
    seen = set()
    while extensions:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind in seen:
            raise HelloMalformed("an extension comes twice")
        seen.add(kind)
        if kind == SERVER_NAME:
            name = _server_name(content)
        elif kind == PROTOCOLS:
            protocols = _protocols(content)
        encrypted = encrypted or kind == ENCRYPTED_CLIENT_HELLO
    return Hello(name, encrypted, protocols)


def _protocols(content: _Bytes) -> tuple[str, ...]:
    listed, found = content.vector(2), []
    while listed:
        name = listed.vector(1).rest()
        if name.isascii():
            found.append(name.decode())
    return tuple(found)


def _server_name(content: _Bytes) -> str:
    names = content.vector(2)
    kind, name = names.number(1), names.vector(2)
    if kind or names:
        raise HelloMalformed("it names other than one host")
    try:
        return name.rest().decode("ascii").lower().removesuffix(".")
    except UnicodeDecodeError:
        raise HelloMalformed("the host's name is not ASCII") from None


def is_tls(start: bytes) -> bool | None:
    """Whether a server may take these bytes, at least one, for TLS; None: there are too few to tell.

    So it may if they are any record, since some servers pass over an alert that comes first, or the
    ClientHello of SSL 2 (RFC 5246, appendix E.2).
    """
    if start[0] & 0x80:
        return start[2:4] == b"\1\3" if len(start) >= 4 else None
    return start[0] in RECORDS


def alert(description: int) -> bytes:
    """A fatal alert, as a server sends it before anything else."""
    return bytes((21, 3, 3, 0, 2, 2, description))
