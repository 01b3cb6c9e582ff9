"""Admission: which accepted call starts next.

A call starts when its caller runs fewer than it may, a slot is free, and its memory fits the budget.
Callers take turns, in proportion to their weights: the caller whose started calls, divided by its
weight, are fewest goes next; within a caller calls start in order of acceptance. A call whose memory
does not fit yet holds the free memory back from everybody behind it, so that a large one starts too.
How many may wait is bounded, and nobody can take all the places (``room``).
"""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from sandboxd import errors, room

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["Scheduler", "Ticket"]

RETRY_AFTER = 1  # seconds; what a full queue tells its callers


@dataclass(eq=False)
class Ticket:
    """A call in the queue. ``memory`` in bytes."""

    memory: int
    granted: anyio.Event = field(default_factory=anyio.Event)


@dataclass
class _Share:
    """What the scheduler knows of one caller."""

    weight: int = 1
    concurrent: int | None = None
    running: int = 0
    turns: float = 0.0
    waiting: deque[Ticket] = field(default_factory=deque)


class Scheduler:
    """Grants tickets. All methods are for one event loop; none of them blocks."""

    def __init__(self, *, memory: int, slots: int, queue: int) -> None:
        """A budget in bytes and in containers, and how many calls may wait."""
        self.memory = memory
        self.slots = slots
        self._queue = queue
        self._shares: dict[int, _Share] = {}
        self.memory_used = 0
        self.running = 0
        self.queued = 0
        self.on_grant: Callable[[], None] = lambda: None
        """Called when calls got their turns: who uses what is left over makes room."""

    def check_room(self, uid: int) -> None:
        """Raise QueueFull when no further call of this caller may wait."""
        share = self._shares.get(uid)
        own = len(share.waiting) if share is not None else 0
        if not room.fits(own + 1, self._queue - self.queued - 1) and not self._idle():
            raise errors.QueueFull(
                f"{self.queued} calls wait already, {own} of them yours; try again later",
                retry_after=RETRY_AFTER,
                queued=self.queued,
                running=self.running,
            )

    def _idle(self) -> bool:
        return self.queued == 0 and self.running < self.slots

    @asynccontextmanager
    async def admitted(
        self, uid: int, memory: int, *, concurrent: int | None, weight: int
    ) -> AsyncIterator[None]:
        """Wait for a turn, and hold slot and memory for the time of the block."""
        share = self._shares.setdefault(uid, _Share())
        share.weight, share.concurrent = weight, concurrent
        if not share.running and not share.waiting:  # an idle caller saves up no turns
            share.turns = max([share.turns, *self._active_turns()])
        ticket = Ticket(memory)
        share.waiting.append(ticket)
        self.queued += 1
        self._grant()
        try:
            await ticket.granted.wait()
        except BaseException:
            if ticket.granted.is_set():
                self._release(share, ticket)
            else:
                share.waiting.remove(ticket)
                self.queued -= 1
            self._forget(uid, share)
            self._grant()
            raise
        try:
            yield
        finally:
            self._release(share, ticket)
            self._forget(uid, share)
            self._grant()

    def _active_turns(self) -> list[float]:
        active = [share.turns for share in self._shares.values() if share.running or share.waiting]
        return [min(active)] if active else []

    def _release(self, share: _Share, ticket: Ticket) -> None:
        share.running -= 1
        self.running -= 1
        self.memory_used -= ticket.memory

    def _forget(self, uid: int, share: _Share) -> None:
        if not share.running and not share.waiting:
            self._shares.pop(uid, None)

    def _grant(self) -> None:
        if self._grant_all():
            self.on_grant()

    def _grant_all(self) -> int:
        granted = 0
        while self.running < self.slots and (share := self._next()) is not None:
            ticket = share.waiting[0]
            if self.memory_used + ticket.memory > self.memory:
                break
            share.waiting.popleft()
            self.queued -= 1
            share.running += 1
            share.turns += 1 / share.weight
            self.running += 1
            self.memory_used += ticket.memory
            ticket.granted.set()
            granted += 1
        return granted

    def _next(self) -> _Share | None:
        ready = [
            share
            for share in self._shares.values()
            if share.waiting and (share.concurrent is None or share.running < share.concurrent)
        ]
        return min(ready, key=lambda share: share.turns, default=None)
