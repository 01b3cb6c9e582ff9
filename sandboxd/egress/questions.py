"""What a container's rules leave to somebody to decide: asked of the daemon, and waited for.

Each question is a coroutine that waits, with what it is about: nothing else does. One that nobody waits for
any more is withdrawn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from sandboxd.egress.streams import Left

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.egress.told import Connection
    from sandboxd.reach import Decision

__all__ = ["MAX_OPEN", "Questions"]

MAX_OPEN = 64  # at once, of a container; what waits with them is memory
TOO_MANY = f"{MAX_OPEN} others wait for an answer already"


class _Waiting:
    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.allowed = False
        self.why = ""


class Questions:
    """Of one container; ``say`` takes what the daemon is told."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._waiting: dict[int, _Waiting] = {}
        self._last = 0
        self._closed = ""

    def close(self, why: str) -> None:
        """Nobody is asked any more, and nobody waits."""
        self._closed = why
        for waiting in self._waiting.values():
            waiting.answered.set()

    async def ask(self, about: Connection, decision: Decision) -> Decision:
        """What somebody says of what ``decision`` leaves open. Cancelled, it is withdrawn.

        Raises Left where they are closed.
        """
        if self._closed:
            raise Left(self._closed)
        if len(self._waiting) >= MAX_OPEN:
            return replace(decision, allowed=False, asks=False, why=TOO_MANY)
        self._last += 1
        number, waiting = self._last, _Waiting()
        self._waiting[number] = waiting
        self._say(
            "ask",
            number=number,
            protocol=about.protocol,
            name=about.name,
            address=about.address,
            port=about.port,
            method=about.method,
            path=about.path,
            rule=decision.where,
        )
        try:
            await waiting.answered.wait()
        finally:
            del self._waiting[number]
            if not waiting.answered.is_set() or self._closed:
                self._say("withdraw", number=number)
        if self._closed:
            raise Left(self._closed)
        return replace(decision, allowed=waiting.allowed, asks=False, why=waiting.why or decision.why)

    def answer(self, number: int, *, allowed: bool, why: str) -> None:
        """To one of them; nothing where it is not waited for any more."""
        if (waiting := self._waiting.get(number)) is not None:
            waiting.allowed, waiting.why = allowed, why
            waiting.answered.set()
