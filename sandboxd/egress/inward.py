"""Connections of callers to servers in their calls' containers, each served until either side ends.

Theory of operation.  The daemon has decided that the caller may have the connection, has made one into the
container, and hands over both with what the caller sent so far. What the tool says is read here alone. One
request is made of what a caller asks, and one answer of what a server says (``exchange``): the caller's
connection ends with it, so that nothing that either says later can be taken for something else. A tunnel, and
an upgrade that both sides agreed to, are bytes both ways.

When the call has ended, everything in its container is dead: what its servers said last is still delivered,
for as long as ``GRACE``.
"""

from __future__ import annotations

import os
import socket
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from sandboxd.egress.budget import Budget
from sandboxd.egress.exchange import Exchange, Gone, Invalid
from sandboxd.egress.messages import MAX_FAULT
from sandboxd.egress.relay import Pump, cut, hung_up, resets
from sandboxd.egress.streams import first_of, write
from sandboxd.excerpt import excerpt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.abc import TaskGroup

    from sandboxd.egress.messages import Enter

__all__ = ["Inward"]

GRACE = 1.0  # seconds that a connection has after its call's end
LOOK_AGAIN = 1.0  # seconds between two looks at whether the caller is gone
STALLED = 10  # of them, after which what a caller said that is gone is not waited for
MAX_FAULTS = 10
MAX_WHY = 1024
UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
ENDED = "the call ended before the connection did"


@dataclass(eq=False)
class _Connection:
    """One of them, and how it stands."""

    enter: Enter
    caller: socket.socket
    tool: socket.socket
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ending: anyio.Event = field(default_factory=anyio.Event)
    """Set when the call has ended."""
    received: int = 0
    """Bytes that the server got."""
    sent: int = 0


class Inward:
    """All of them that one process serves; ``say`` takes what the daemon is told."""

    DESCRIPTORS = 3

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._connections: set[_Connection] = set()
        self._faults = 0

    def begin(self, tasks: TaskGroup, enter: Enter, fds: Sequence[int]) -> None:
        """Serve a connection; the descriptors are this one's to close."""
        caller, tool, head = fds
        with os.fdopen(head, "rb") as file:
            first = os.pread(head, os.fstat(file.fileno()).st_size, 0)
        connection = _Connection(enter, socket.socket(fileno=caller), socket.socket(fileno=tool))
        for sock in (connection.caller, connection.tool):
            sock.setblocking(False)
        tasks.start_soon(self._serve, connection, first)

    def cut(self, id: str) -> None:  # noqa: A002
        """End the connections of a call that has ended."""
        for connection in self._connections:
            if connection.enter.id == id:
                connection.ending.set()
                connection.scope.deadline = anyio.current_time() + GRACE

    async def _serve(self, connection: _Connection, first: bytes) -> None:
        self._connections.add(connection)
        why = ENDED
        resets(connection.tool, reset=True)  # until all was said
        try:
            with connection.scope:
                why = await self._relay(connection, first)
        except Exception:  # noqa: BLE001  (one connection's, and no reason to end the others)
            why = "the process that served the connection made a mistake"
            self._faults += 1
            if self._faults <= MAX_FAULTS:
                self._say("fault", why=traceback.format_exc()[-MAX_FAULT:], id=connection.enter.id)
        finally:
            self._connections.discard(connection)
            if why:
                cut(connection.tool)
            else:
                resets(connection.tool, reset=False)
                connection.tool.close()
            connection.caller.close()
            enter = connection.enter
            self._say(
                "inward",
                id=enter.id,
                number=enter.number,
                why=excerpt(why, MAX_WHY),
                bytes_in=connection.received,
                bytes_out=connection.sent,
            )

    async def _relay(self, connection: _Connection, first: bytes) -> str:
        """Serve it to its end; returns why that was none, or an empty text."""
        why = ""
        try:
            if connection.enter.prefix:
                upgraded = await self._exchange(connection, first)
            else:
                await write(connection.caller, UPGRADED)
                upgraded = first, b""
            if upgraded is not None:
                await self._tunnel(connection, *upgraded)
        except* Gone:
            why = "the caller went away before it had its answer"
        except* Invalid as group:
            why = str(first_of(group))
        except* OSError as group:
            why = ENDED if connection.ending.is_set() else f"the connection was reset: {first_of(group)}"
        return why

    async def _exchange(self, connection: _Connection, first: bytes) -> tuple[bytes, bytes] | None:
        """One request and its answer. What both sides had begun to say after an upgrade, if it was one."""
        exchange = Exchange(connection.caller, connection.tool, connection.enter, first)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_watch, connection.caller, lambda: True)
                upgraded = await exchange.run()
                tasks.cancel_scope.cancel()
        finally:
            connection.received, connection.sent = exchange.received, exchange.sent
        return upgraded

    async def _tunnel(self, connection: _Connection, there: bytes, back: bytes) -> None:
        """Bytes both ways, beginning with those, until both sides have ended theirs. Raises OSError."""
        caller, tool = connection.caller, connection.tool
        inwards, outwards = Pump(caller, tool, "in", Budget({})), Pump(tool, caller, "out", Budget({}))
        before = connection.received, connection.sent
        idle = _Idle(inwards)
        told = anyio.Event()  # all that the tool had to say

        async def towards_the_tool() -> None:
            await inwards.send(there)
            await inwards.run()
            idle.ended = True
            if not hung_up(caller):
                await told.wait()
            tasks.cancel_scope.cancel()

        async def towards_the_caller() -> None:
            await outwards.send(back)
            await outwards.run()
            told.set()
            await connection.ending.wait()
            tasks.cancel_scope.cancel()  # there is nobody left inside who could be told anything

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(towards_the_tool)
                tasks.start_soon(towards_the_caller)
                tasks.start_soon(_watch, caller, idle)
        except* Gone:
            pass  # whoever opens a tunnel ends it when it likes
        finally:
            connection.received = before[0] + inwards.moved
            connection.sent = before[1] + outwards.moved


class _Idle:
    """Whether there is nothing to wait for of a caller that is gone: what it said last is delivered first."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self._moved, self._looks = -1, 0
        self.ended = False

    def __call__(self) -> bool:
        self._looks = self._looks + 1 if self._pump.moved == self._moved else 0
        self._moved = self._pump.moved
        return self.ended or self._looks >= STALLED


async def _watch(caller: socket.socket, idle: Callable[[], bool]) -> None:
    """Raise Gone when the caller is gone and nothing of it is on its way."""
    while not (hung_up(caller) and idle()):  # noqa: ASYNC110  (no event tells, where nothing is read)
        await anyio.sleep(LOOK_AGAIN)
    raise Gone
