"""``python target.py NAME [libFuzzer's options]``: hold a parser to raising what it says, no more."""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["sandboxd.egress"]):
    from sandboxd.egress import hello, messages, refused, sigv4


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


TARGETS = {
    "hello": fuzz_hello, "refused": fuzz_refused, "messages": fuzz_messages, "sigv4": fuzz_sigv4,
}  # fmt: skip

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
