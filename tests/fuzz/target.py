"""``python target.py NAME [libFuzzer's options]``: hold a parser to raising what it says, no more."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import atheris
from h2.exceptions import ProtocolError

with atheris.instrument_imports(include=["sandboxd.egress", "h2", "hpack", "hyperframe"]):
    from sandboxd import reach
    from sandboxd.egress import budget, hello, http2end, http2pair, messages, refused, sigv4, site

if TYPE_CHECKING:
    from collections.abc import Iterable


def fuzz_hello(data: bytes) -> None:
    """In two pieces, wherever the first byte says."""
    reader = hello.HelloReader()
    at = data[0] if data else 0
    with contextlib.suppress(hello.HelloMalformed):
        if reader.feed(data[1 : at + 1]) is None:
            reader.feed(data[at + 1 :])


def fuzz_refused(data: bytes) -> None:
    """One read of the log."""
    list(refused.read_refused(data))


def fuzz_messages(data: bytes) -> None:
    """What a process of the network says to the daemon."""
    with contextlib.suppress(ValueError, RecursionError):
        messages.decode(data)


def fuzz_sigv4(data: bytes) -> None:
    """A target, and headers: each a line."""
    target, *lines = data.split(b"\n")
    headers = [line.partition(b":")[::2] for line in lines]
    keys = {"access_key": "AKID", "secret_key": "secret", "session_token": "token"}
    with contextlib.suppress(sigv4.SigningRefused):
        sigv4.resign("GET", target, headers, **keys, body_digest=sigv4.EMPTY)


def fuzz_http2(data: bytes) -> None:
    """Frames to a server, or to a client that has asked for something."""
    to_server, rest = bool(data[:1] < b"\x80"), data[1:]
    end = http2end.Frames(client_side=not to_server)
    if to_server:
        end.receive(memoryview(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
    else:
        end.send_headers(1, [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/")])
    with contextlib.suppress(ProtocolError):
        while len(rest) > 3:
            length, kind, flags = rest[0] % 64, rest[1] % 12, rest[2]
            stream, body, rest = kind not in (4, 6, 7), rest[3 : 3 + length], rest[3 + length :]
            sent = len(body).to_bytes(3) + bytes((kind, flags)) + int(stream).to_bytes(4) + body
            for event in end.receive(memoryview(sent)):
                fuzz_head(getattr(event, "headers", None) or ())


def fuzz_head(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """A head that h2 let through."""
    http2pair.answer_head(headers)
    with contextlib.suppress(site.Refused):
        http2pair.understood(headers, SITE)


async def nobody(exchange: site.Exchange, decision: reach.Decision) -> reach.Decision:
    """Answers no question, since none is asked."""
    raise AssertionError(exchange)


SITE = site.Site(
    "a",
    80,
    "http",
    reach=reach.Reach(reach.NetworkRules((), ())),
    budget=budget.Budget({}),
    ask=nobody,
    inject=lambda decision, request, digest: ([], ()),
    tell=lambda exchange, verdict, why: None,
)
TARGETS = {
    "hello": fuzz_hello, "refused": fuzz_refused, "messages": fuzz_messages, "sigv4": fuzz_sigv4,
    "http2": fuzz_http2,
}  # fmt: skip

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
