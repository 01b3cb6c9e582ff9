"""What a program says first on a connection: read before anything is passed on, and held to the name."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from sandboxd.egress import hello
from sandboxd.egress.streams import Broken

if TYPE_CHECKING:
    import socket

__all__ = ["first_said", "second_said"]

HELLO_SECONDS = 10.0
FIRST_READ = 4096


async def first_said(
    client: socket.socket, name: str | None, silent: float = math.inf
) -> tuple[bytes, bytes, hello.Hello | None]:
    """What a client that connected to a name says first: of TLS, its ClientHello, which has to name the same;
    the rest; and that ClientHello.

    ``silent``: for how many seconds it may say nothing. Raises HelloMalformed, Broken.
    """
    data, reader = b"", hello.HelloReader()
    begun = anyio.current_time()
    with anyio.move_on_after(HELLO_SECONDS) as scope:
        while True:
            try:
                read = client.recv(FIRST_READ)
            except BlockingIOError:
                if not data:
                    scope.deadline = begun + silent
                await anyio.wait_readable(client)
                continue
            if not data:
                scope.deadline = anyio.current_time() + HELLO_SECONDS
            data += read
            tls = hello.is_tls(data) if data else False
            if name is None or not read or tls is False:
                return data, b"", None
            if tls and (found := reader.feed(read)) is not None:
                _check(found, name)
                return data[: len(data) - len(reader.rest)], reader.rest, found
    if not data:
        why = f"the program said nothing for {silent:.0f} seconds, where HTTP is spoken"
        raise Broken(why)
    raise hello.HelloMalformed("the ClientHello did not come")


async def second_said(client: socket.socket, first: hello.Hello, data: bytes) -> bytes:
    """What the client says next, until no second ClientHello can follow: that has to name the same.

    ``data``: what it has said already.
    """
    reader = hello.SecondReader()
    last, found = reader.feed(data)
    while not last:
        await anyio.wait_readable(client)
        with suppress(BlockingIOError):
            read = client.recv(FIRST_READ)
            data += read
            if not read:
                break
            last, found = reader.feed(read)
    if found is not None and found.server_name != first.server_name:
        raise hello.HelloMalformed(
            f"a second ClientHello names {found.server_name or 'no server'}, "
            f"and the connection is to {first.server_name}"
        )
    return data


def _check(found: hello.Hello, name: str) -> None:
    if found.server_name == name:
        return
    if found.encrypted:
        raise hello.HelloMalformed(
            f"the ClientHello is encrypted for {found.server_name}; {name} is to be asked for in the open"
        )
    said = "no server" if found.server_name is None else found.server_name
    raise hello.HelloMalformed(f"the ClientHello names {said}, and the connection is to {name}")
