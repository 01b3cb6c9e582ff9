"""A connection whose bytes are passed on without a look at what is in them, but for whom it greets."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from sandboxd.egress import hello
from sandboxd.egress.greeting import first_said, second_said
from sandboxd.egress.relay import Cut, Pump, deliver, hung_up, resets

if TYPE_CHECKING:
    import socket

    from sandboxd.egress.budget import Budget

__all__ = ["GRACE", "Through"]

GRACE = 1.0  # seconds that what was said may take to arrive, where nobody is left to say more
ENDED = "the call ended before the connection did"


class Through:
    """From a program to a server that was asked for by ``name``, or not; both sockets stay the caller's."""

    def __init__(
        self, client: socket.socket, server: socket.socket, name: str | None, budget: Budget
    ) -> None:
        self._client = client
        self._server = server
        self._name = name
        self._budget = budget
        self._out = Pump(client, server, "out", budget)
        self._back = Pump(server, client, "in", budget)
        self._refusal: str | None = None
        self._said = False
        """The program has said that nothing more comes."""
        self._gone: OSError | None = None
        self._leaving = False
        self._scope = anyio.CancelScope()
        self.verdict, self.why = "allowed", ENDED

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that went out, and in."""
        return self._out.moved, self._back.moved

    def leave(self) -> None:
        """The call has ended: what its program said is delivered, and nobody is there for an answer."""
        self._leaving = True
        if self._said:
            self._scope.cancel()

    async def run(self) -> None:
        """Until both sides have ended. ``verdict`` and ``why`` say how it went; what comes is no error."""
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._there)
                    tasks.start_soon(self._answers)
            if self._refusal is None and (self._leaving or self._gone is not None):
                await self._deliver()
            self.why = "" if self._gone is None else f"the connection was reset: {self._gone}"
        except* Cut as group:
            limit = str(group.exceptions[0])
            self._budget.reached.add(limit)
            self.verdict, self.why = "limit", f"network.budget.{limit} is used up"
        except* OSError as group:
            if self._refusal is None:
                self.why = f"the connection was reset: {group.exceptions[0]}"
                await self._deliver()  # what a program said before it gave up is said
        finally:
            if self._refusal is not None:
                self.verdict, self.why = "denied", self._refusal
        if not self.why or self._refusal is not None:  # all was said, or the alert
            resets(self._client, reset=False)
        resets(self._server, reset=bool(self.why))

    async def _answers(self) -> None:
        try:
            await self._back.run()
        except OSError as error:
            if not hung_up(self._client):
                raise
            self._gone = error  # a program that is gone has said something, which still goes on

    async def _deliver(self) -> None:
        with suppress(OSError), anyio.move_on_after(GRACE):
            await deliver(self._server)

    async def _there(self) -> None:
        try:
            first, rest, found = await first_said(self._client, self._name)
            await self._out.send(first)
            if found is not None:
                await self._out.send(await second_said(self._client, found, rest))
        except hello.HelloMalformed as error:
            self._refusal = str(error)
            with suppress(OSError):
                self._client.send(hello.alert(hello.UNRECOGNIZED_NAME))
            self._scope.cancel()
            return
        await self._out.run()
        self._said = True
        if self._leaving:
            self._scope.cancel()
