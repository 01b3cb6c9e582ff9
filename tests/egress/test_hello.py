"""Reading a ClientHello: real ones, pieces of them, and everything else."""

from __future__ import annotations

import contextlib
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.egress.hello import MAX_HELLO, Hello, HelloMalformed, HelloReader, SecondReader, is_tls


def read_hello(data: bytes) -> Hello | None:
    """All at once."""
    return HelloReader().feed(data)


def client_hello(name: str | None) -> bytes:
    """What this machine's OpenSSL says first."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def in_records(hello: bytes, size: int) -> bytes:
    """The same message in records of at most ``size`` bytes."""
    body = hello[5:]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(hello[:3] + len(piece).to_bytes(2) + piece for piece in pieces)


HELLO = client_hello("www.example.test")


def with_extension(kind: int, content: bytes) -> bytes:
    """A small ClientHello with one extension."""
    extension = kind.to_bytes(2) + len(content).to_bytes(2) + content
    body = bytes(34) + b"\0" + b"\0\2\x13\x01" + b"\1\0" + len(extension).to_bytes(2) + extension
    message = b"\1" + len(body).to_bytes(3) + body
    return b"\x16\3\1" + len(message).to_bytes(2) + message


def test_the_name_is_found() -> None:
    found = read_hello(HELLO)
    assert found is not None
    assert (found.server_name, found.encrypted) == ("www.example.test", False)
    found = read_hello(client_hello(None))
    assert found is not None
    assert found.server_name is None


@pytest.mark.parametrize("size", [1, 2, 5, 100, 511])
def test_in_many_records(size: int) -> None:
    found = read_hello(in_records(HELLO, size))
    assert found is not None
    assert found.server_name == "www.example.test"


@pytest.mark.parametrize("size", [1, 7, 100])
def test_pieces_are_waited_for(size: int) -> None:
    reader = HelloReader()
    sent = in_records(HELLO, 13)
    *first, last = [sent[at : at + size] for at in range(0, len(sent), size)]
    assert [piece for piece in first if reader.feed(piece) is not None] == []
    assert reader.feed(last) == read_hello(HELLO)


def test_what_follows_it_does_not_matter() -> None:
    assert read_hello(HELLO + b"\x14\3\3\0\1\1" + b"early data") == read_hello(HELLO)


def test_encrypted_client_hello_is_seen() -> None:
    found = read_hello(with_extension(0xFE0D, b"\0\0\1\0\1\0"))
    assert found is not None
    assert found.encrypted


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\3\1\0\0",  # an empty record
        b"\x16\2\0\0\5hello",
        b"\x16\3\1\x40\1",  # longer than a record may be
        b"\x16\3\1\0\4\2\0\0\0",  # a ServerHello
        b"\x16\3\1\0\4\1\xff\xff\xff",
        b"\x16\3\1\0\4\1\0\0\0",
        b"\x16\3\1\0\1\1\x17\3\1\0\1\0",  # another kind of record amid the message
        with_extension(0, b"\0\6\1\0\3abc"),  # a name of another kind
        with_extension(0, b"\0\x09\0\0\1a\0\0\2bc"),  # two names
        with_extension(0, b"\0\5\0\0\2\xff\xfe"),
        with_extension(0, b"\0\5\0\0\3ab"),  # a length beyond its end
    ],
)
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(HelloMalformed):
        read_hello(data)


@pytest.mark.parametrize("record", [b"\x16\3\1\0\1\1", b"\x16\3\1\x40\0" + b"\1" * 2**14])
def test_one_without_end_is_given_up(record: bytes) -> None:
    reader = HelloReader()
    with pytest.raises(HelloMalformed, match="too long"):
        _ = [reader.feed(record) for _ in range(MAX_HELLO)]


@given(st.binary(max_size=300))
def test_anything_is_read_or_refused(data: bytes) -> None:
    for start in (b"", b"\x16\3\1", HELLO[:40], HELLO[:11]):
        with contextlib.suppress(HelloMalformed):
            read_hello(start + data)


@given(st.integers(0, len(HELLO) - 1), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(at: int, value: int) -> None:
    with contextlib.suppress(HelloMalformed):
        read_hello(HELLO[:at] + bytes((value,)) + HELLO[at + 1 :])


WARNING = b"\x15\3\3\0\2\1\x64"  # an alert that some servers pass over
SSL2 = b"\x80\x2e\1\3\3\0\5\0\0\0\x20"


@pytest.mark.parametrize("start", [HELLO, WARNING + HELLO, b"\x14\3\3\0\1\1" + HELLO, b"\x17\3\3\0\0", SSL2])
def test_what_a_server_may_take_for_tls(start: bytes) -> None:
    assert is_tls(start)
    if start != HELLO:
        with pytest.raises(HelloMalformed):
            read_hello(start)


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1", b"\0\0\0\x08", b"\x80\x01\0\0", b"\xc3\0\0\0"])
def test_what_no_server_takes_for_tls(start: bytes) -> None:
    assert is_tls(start) is False


def test_too_few_bytes_to_tell() -> None:
    assert [is_tls(SSL2[:size]) for size in range(1, 5)] == [None, None, None, True]


# what follows

OTHER = client_hello("other.example.test")
CCS = b"\x14\3\3\0\1\1"
WARNING = b"\x15\3\3\0\2\1\x5a"
KEYS = b"\x16\3\3\0\6\x10\0\0\2ab"
FINISHED = b"\x16\3\3\0\x28" + bytes(40)  # of TLS 1.2, after a session was resumed
ENCRYPTED = b"\x17\3\3\0\x05hello"


def second(data: bytes, size: int) -> tuple[bool, str | None]:
    """What is found behind a ClientHello, in pieces of this size."""
    reader = SecondReader()
    for at in range(0, len(data), size):
        last, found = reader.feed(data[at : at + size])
        if last:
            return True, None if found is None else found.server_name
    return False, None


@pytest.mark.parametrize("size", [1, 3, 100, 1 << 16])
@pytest.mark.parametrize("before", [b"", CCS, WARNING, CCS + WARNING])
def test_a_second_one_is_found(before: bytes, size: int) -> None:
    for records in (1, 10, 1000):
        assert second(before + in_records(OTHER, records), size) == (True, "other.example.test")


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("data", [KEYS, CCS + FINISHED, CCS + ENCRYPTED, ENCRYPTED, b"plain", FINISHED])
def test_what_else_follows_is_the_last_that_is_looked_at(data: bytes, size: int) -> None:
    assert second(data, size) == (True, None)


@pytest.mark.parametrize("data", [b"", b"\x16", CCS[:3], CCS, CCS + OTHER[:5], OTHER[:-1]])
def test_more_is_waited_for(data: bytes) -> None:
    assert second(data, 100) == (False, None)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\3\3\0\0" + OTHER,  # some servers pass over an empty record
        b"\x14\3\3\0\0" + OTHER,
        b"\x15\3\3\xff\xff" + OTHER,
        OTHER[:5] + b"\1\2\0\0\3" + OTHER[10:],
    ],
)
def test_what_hides_one_is_refused(data: bytes) -> None:
    with pytest.raises(HelloMalformed):
        second(data, 100)


def test_two_in_one_record_are_refused() -> None:
    body = HELLO[5:] + OTHER[5:]
    with pytest.raises(HelloMalformed, match="follows it in its record"):
        read_hello(b"\x16\3\1" + len(body).to_bytes(2) + body)


@given(st.binary(max_size=200))
def test_anything_that_follows_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(HelloMalformed):
        second(data, 7)
