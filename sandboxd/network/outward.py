"""Connections that a process which serves containers asks for: it can make none itself.

It has checked them by the rules already, but it reads what is hostile, and may not be itself any more: so
what it asks for is checked once more, here, and only what some rule of the container may lead to is connected
to. Nothing that goes over it is read here. One that asks for anything else is ended.
"""

from __future__ import annotations

import base64
import errno
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

import anyio
from pydantic import BaseModel, ConfigDict, Field

from sandboxd.egress.messages import encode
from sandboxd.egress.outside import MAX_ASKED, MAX_QUERY, MAX_REPLY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.abc import TaskGroup

    from sandboxd.kernel.descriptors import Sender

__all__ = ["Outward"]

QUERY_SECONDS = 10.0
REPLIES = 16  # datagrams of a name server to one question; all but one are somebody else's guesses
MAX_NUMBER = 2**53


class _Connect(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=1, le=MAX_NUMBER)
    address: IPv4Address | IPv6Address
    port: int = Field(ge=1, le=65535)


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=1, le=MAX_NUMBER)
    server: str = Field(max_length=64)
    data: str = Field(max_length=2 * MAX_QUERY)


class Outward:
    """Of one process, which ``sender`` tells things. What it may not ask for raises ValueError."""

    def __init__(
        self,
        tasks: TaskGroup,
        sender: Sender,
        nameservers: Sequence[str],
        port: int,
    ) -> None:
        self._tasks = tasks
        self._sender = sender
        self._nameservers = nameservers
        self._port = port
        self._sending = 0
        self._queries: dict[int, anyio.CancelScope] = {}

    def connect(
        self, content: dict[str, Any], may: Callable[[IPv4Address | IPv6Address, int], bool] | None
    ) -> None:
        """Begin a connection; ``may``: whether the rules let it; None: it is to a name server."""
        asked = _Connect.model_validate(content)
        if isinstance(asked.address, IPv6Address) and asked.address.scope_id is not None:
            raise ValueError("an address with a scope")  # which would be any text
        if may is None:
            if asked.address not in map(ip_address, self._nameservers) or asked.port != self._port:
                raise ValueError(f"{asked.address} is no name server")
        elif not may(asked.address, asked.port):
            raise ValueError(f"no rule leads to {asked.address} at port {asked.port}")
        if self._sending >= 2 * MAX_ASKED:
            raise ValueError("it asks for too many connections at once")
        sock, told = _begun(asked)
        try:
            sent = self._sender.send_now(told, [] if sock is None else [sock.fileno()])
        except OSError:  # the process is gone
            sent = True
        if not sent:
            self._sending += 1
            self._tasks.start_soon(self._tell, sock, told)
        elif sock is not None:
            sock.close()

    async def _tell(self, sock: socket.socket | None, told: bytes) -> None:
        try:
            with suppress(OSError):  # the process is gone
                await self._sender.send(told, [] if sock is None else [sock.fileno()])
        finally:
            self._sending -= 1
            if sock is not None:
                sock.close()

    def query(self, content: dict[str, Any]) -> None:
        """Ask a name server, and pass on what it says."""
        asked = _Query.model_validate(content)
        data = base64.b64decode(asked.data, validate=True)
        if asked.server not in self._nameservers:
            raise ValueError(f"{asked.server[:64]} is no name server")
        if asked.number in self._queries or len(self._queries) >= 2 * MAX_ASKED or len(data) > MAX_QUERY:
            raise ValueError("a query that is too long, or one too many")
        scope = self._queries[asked.number] = anyio.CancelScope()
        self._tasks.start_soon(self._ask, asked, data, scope)

    def enough(self, number: int) -> None:
        """Nobody waits for what is said to that one any more."""
        if (scope := self._queries.get(number)) is not None:
            scope.cancel()

    def close(self) -> None:
        """The process is gone."""
        for scope in self._queries.values():
            scope.cancel()

    async def _ask(self, asked: _Query, data: bytes, scope: anyio.CancelScope) -> None:
        try:
            scope.deadline = anyio.current_time() + QUERY_SECONDS
            with scope, suppress(OSError):
                await self._pass_on(asked, data)
        finally:
            del self._queries[asked.number]

    async def _pass_on(self, asked: _Query, data: bytes) -> None:
        family = socket.AF_INET6 if ":" in asked.server else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect((asked.server, self._port))
                sock.send(data)
                for _ in range(REPLIES):
                    await anyio.wait_readable(sock)
                    reply = base64.b64encode(sock.recv(MAX_REPLY)).decode()
                    await self._sender.send(encode("reply", {"number": asked.number, "data": reply}), ())
            except OSError:
                await self._sender.send(encode("reply", {"number": asked.number, "data": None}), ())


def _begun(asked: _Connect) -> tuple[socket.socket | None, bytes]:
    """A connection on its way, if there is one, and what is told of it."""
    family = socket.AF_INET if asked.address.version == 4 else socket.AF_INET6
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:  # a host without that family, or without descriptors
        return None, encode("connected", {"number": asked.number, "code": error.errno})
    code = sock.connect_ex((str(asked.address), asked.port))
    if code in (0, errno.EINPROGRESS):
        return sock, encode("connected", {"number": asked.number, "code": 0})
    sock.close()
    return None, encode("connected", {"number": asked.number, "code": code})
