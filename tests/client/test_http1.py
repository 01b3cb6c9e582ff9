"""The blocking client's HTTP/1.1: what is sent, byte for byte, and answers however they are cut."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.client import http1

if TYPE_CHECKING:
    from collections.abc import Iterable

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
COUNTED = b"HTTP/1.1 200 OK\r\nContent-Length: "


def read(*pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """The answer that a peer gives in these pieces before it closes."""
    ours, theirs = socket.socketpair()
    with ours:

        def give() -> None:
            with theirs:
                for piece in pieces:
                    theirs.sendall(piece)

        peer = threading.Thread(target=give)
        peer.start()
        try:
            answer = http1.Response(ours)
            return answer.status, answer.headers, b"".join(answer.body())
        finally:
            while ours.recv(65536):
                pass
            peer.join()


def sent(headers: dict[str, str], body: bytes | Iterable[bytes] | None) -> bytes:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            http1.send(ours, "POST", "/v1/x?y=%20", headers, body)
        return b"".join(iter(lambda: theirs.recv(65536), b""))


def test_a_request_is_sent_whole_or_in_chunks() -> None:
    head = b"POST /v1/x?y=%20 HTTP/1.1\r\nHost: sandboxd\r\n\r\n"
    assert sent({"Host": "sandboxd"}, None) == head
    assert sent({"Host": "sandboxd"}, b"body") == head + b"body"
    pieces = sent({"Host": "sandboxd"}, iter([b"abc", b"", b"d" * 20]))
    assert pieces == head + b"3\r\nabc\r\n14\r\n" + b"d" * 20 + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\0"])
def test_no_value_ends_a_line(value: str) -> None:
    with pytest.raises(ValueError, match="one line each"):
        sent({"Host": value}, None)


def test_headers_are_read_whatever_their_case_and_space() -> None:
    status, headers, body = read(b"HTTP/1.1 418 I'm\r\nCONTENT-length:2\r\nX-A: \t b c \r\n\r\nhirest")
    assert (status, headers["x-a"], body) == (418, "b c", b"hi")


def test_informational_answers_are_passed_over() -> None:
    found = read(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\nHTTP/1.1 204\r\n\r\n")
    assert found == (204, {}, b"")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.data())
def test_a_chunked_body_is_the_same_however_it_arrives(chunks: list[bytes], data: st.DataObject) -> None:
    text = CHUNKED + b"".join(b"%x;ext=1\r\n%b\r\n" % (len(one), one) for one in chunks)
    text += b"0\r\nTrailer: x\r\n\r\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(*pieces) == (200, {"transfer-encoding": "chunked"}, b"".join(chunks))


@pytest.mark.parametrize("cut", range(1, 40))
def test_what_is_cut_is_known_to_be(cut: int) -> None:
    whole = CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"
    with pytest.raises(http1.Cut):
        read(whole[:-cut])


def test_a_counted_body_that_is_cut_is_known_to_be() -> None:
    with pytest.raises(http1.Cut):
        read(COUNTED + b"5\r\n\r\nabcd")


@pytest.mark.parametrize(
    "text",
    [
        b"SSH-2.0\r\n",
        b"garbage",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 20x OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        COUNTED + b"0\r\n" + b"A: b\r\n" * 70_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 400_000,
        COUNTED + b"-1\r\n\r\n",
        COUNTED + b"+1\r\n\r\na",
        COUNTED + b"1_0\r\n\r\n",
        COUNTED + b"9" * 30 + b"\r\n\r\n",
        CHUNKED + b"-1\r\na",
        CHUNKED + b"0x1\r\na\r\n0\r\n\r\n",
        CHUNKED + b"\r\n",
        CHUNKED + b"f" * 20 + b"\r\n",
        CHUNKED + b"1\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"0\r\n" + b"A: b\r\n" * 70_000 + b"\r\n",
    ],
)
def test_what_is_no_answer_is_refused(text: bytes) -> None:
    with pytest.raises(http1.Malformed):
        read(text)


def test_the_command_loads_neither_ssl_nor_email() -> None:
    script = (
        "import sandboxd.cli.run, sys; print([m for m in ('ssl', 'email', 'shutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
