"""Admission: which accepted call starts next.

A call starts when its caller runs fewer than it may, a slot is free, its memory and CPUs fit the budgets, the
host is not pressed, and no other call of its series runs. Callers take turns, in proportion to their weights:
the caller whose started calls, divided by its weight, are fewest goes next; one that comes anew goes next at
once, however many calls of others wait. Within a caller higher priorities go first, and calls of one priority
in order of acceptance. A call that does not fit yet holds what is free back from everybody behind it, so that
a large one starts too. How many may wait is bounded, and nobody can take all the places (``room``).

What a series keeps between its calls (``keep``) holds its slot, memory and CPUs, and counts to its caller,
for as long as it is kept: a further call of the series runs on that, and waits for its turn in that alone.

Each step takes O(log n) of the calls that wait: what is ready is in heaps, of each caller's calls and of the
callers, and what was withdrawn stays there, marked, until it comes up or is the greater part.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import anyio

from sandboxd import places

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

__all__ = ["Hold", "Scheduler", "Ticket"]

LOOK_AGAIN = 0.5  # seconds until the host's pressure is looked at again
PACE = 0.2  # how much the newest interval between two ends counts


def _nothing() -> None:
    """Nobody waits to be told."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A call in the queue: ``memory`` in bytes, ``cpus`` in thousandths.

    Of those that have the same ``serial`` one runs at a time, in order of acceptance. ``on_grant`` is called
    once for each turn, from whatever gave it; ``order`` is the scheduler's, and kept by who comes again.
    """

    uid: int
    memory: int
    cpus: int = 0
    priority: int = 0
    serial: str | None = None
    concurrent: int | None = None
    weight: int = 1
    on_grant: Callable[[], None] = _nothing
    order: int = 0
    state: Literal["new", "blocked", "waiting", "running", "resting", "gone"] = "new"
    on: Hold | None = None
    """What its series keeps, where it runs on that."""

    @property
    def payer(self) -> int:
        """Whose share has what it holds."""
        return self.uid if self.on is None else self.on.uid

    @property
    def granted(self) -> bool:
        """Whether it holds a slot now."""
        return self.state == "running"


@dataclass(eq=False)
class Hold:
    """What a series keeps of the budgets between its calls."""

    uid: int
    serial: str
    memory: int
    cpus: int
    rider: Ticket | None
    """The call that runs on it."""


@dataclass(eq=False)
class _Share:
    """What the scheduler knows of one caller."""

    weight: int = 1
    concurrent: int | None = None
    running: int = 0
    waiting: int = 0
    """Calls in the queue, those included that wait for another of their series."""
    turns: float = 0.0
    ready: list[tuple[int, int, Ticket]] = field(default_factory=list)
    """By priority, then order; no two have both."""
    withdrawn: int = 0
    listed: bool = False

    def head(self) -> Ticket | None:
        """The call that goes next."""
        while self.ready and self.ready[0][2].state != "waiting":
            heapq.heappop(self.ready)
            self.withdrawn -= 1
        return self.ready[0][2] if self.ready else None

    def withdraw(self) -> None:
        """One of ``ready`` was marked."""
        self.withdrawn += 1
        if self.withdrawn * 2 > len(self.ready) > 16:
            self.ready = [entry for entry in self.ready if entry[2].state == "waiting"]
            heapq.heapify(self.ready)
            self.withdrawn = 0

    @property
    def may_start(self) -> bool:
        return self.concurrent is None or self.running < self.concurrent


@dataclass(eq=False)
class _Series:
    """Calls that run one at a time: the one whose turn it is, and those that wait for it, by order."""

    holder: Ticket
    waiting: list[tuple[int, Ticket]] = field(default_factory=list)


class Scheduler:
    """Grants tickets. All methods are for one event loop; none of them blocks."""

    def __init__(self, *, memory: int, slots: int, queue: int, cpus: int | None = None) -> None:
        """Budgets in bytes, containers and thousandths of a CPU (None: any), and how many calls may wait."""
        self.memory = memory
        self.slots = slots
        self.cpus = cpus
        self._queue = queue
        self._shares: dict[int, _Share] = {}
        self._callers: list[tuple[float, int, _Share]] = []
        self._series: dict[str, _Series] = {}
        self._holds: dict[str, Hold] = {}
        self._riding: list[Ticket] = []
        self._numbers = itertools.count(1)
        self._time = 0.0
        self._paused = 0
        self._timer: asyncio.TimerHandle | None = None
        self._pace = 1.0
        self._busy_since: float | None = None
        self.memory_used = 0
        self.cpus_used = 0
        self.running = 0
        self.queued = 0
        self.on_grant: Callable[[], None] = _nothing
        """Called when calls got their turns: who uses what is left over makes room."""
        self.on_starved: Callable[[], None] = _nothing
        """Called when a call cannot start beside what series keep between their calls."""
        self.pressed: Callable[[], bool] = lambda: False
        """Whether the host has no room for more than what runs."""

    def check_room(self, uid: int, most: int | None = None) -> None:
        """Raise QueueFull when no further call of this caller may wait; ``most`` is a bound of its own."""
        share = self._shares.get(uid)
        own = share.waiting if share is not None else 0
        if (most is None or own < most) and places.fits(own + 1, self._queue - self.queued - 1):
            return
        if own == 0 and self.queued == 0 and self.running < self.slots:
            return
        raise places.full(
            self._queue, queued=self.queued, own=own, most=most, running=self.running, pace=self._pace
        )

    def enqueue(self, ticket: Ticket) -> None:
        """Wait for a turn, which may come at once; one that had a turn before keeps its place."""
        share = self._shares.get(ticket.uid)
        if share is None:
            share = self._shares[ticket.uid] = _Share()
        share.weight, share.concurrent = ticket.weight, ticket.concurrent
        if not share.running and not share.waiting:  # an idle caller saves up no turns
            share.turns = max(share.turns, self._time)
        ticket.order = ticket.order or next(self._numbers)
        share.waiting += 1
        self.queued += 1
        if self._busy_since is None:
            self._busy_since = time.monotonic()
        series = self._series.get(ticket.serial) if ticket.serial is not None else None
        if series is not None and series.holder is not ticket:
            ticket.state = "blocked"
            heapq.heappush(series.waiting, (ticket.order, ticket))
            return
        if ticket.serial is not None:
            self._series.setdefault(ticket.serial, _Series(ticket))
        self._make_ready(share, ticket)
        self._grant()

    def keep(self, ticket: Ticket) -> Hold:
        """Let what a running call of a series holds stay its series' when it leaves, until ``release``."""
        assert ticket.serial is not None  # noqa: S101
        hold = Hold(ticket.payer, ticket.serial, ticket.memory, ticket.cpus, ticket)
        self._holds[ticket.serial] = hold
        return hold

    def release(self, hold: Hold) -> None:
        """Give it back; a call that runs on it holds it until it leaves. Safe to call twice."""
        if self._holds.get(hold.serial) is not hold:
            return
        del self._holds[hold.serial]
        if hold.rider is None:
            self._return(hold.uid, hold.memory, hold.cpus)
            self._forget(hold.uid)
            self._grant()

    @property
    def kept(self) -> int:
        """Bytes that all holds have together."""
        return sum(hold.memory for hold in self._holds.values())

    @property
    def kept_cpus(self) -> int:
        """The same of thousandths of CPUs."""
        return sum(hold.cpus for hold in self._holds.values())

    @property
    def holds(self) -> int:
        """How many there are."""
        return len(self._holds)

    def _ride(self, share: _Share, ticket: Ticket, hold: Hold) -> None:
        ticket.memory, ticket.cpus, ticket.state = hold.memory, hold.cpus, "running"
        ticket.on = hold
        hold.rider = ticket
        share.waiting -= 1
        self.queued -= 1
        self._riding.append(ticket)

    def _make_ready(self, share: _Share, ticket: Ticket) -> None:
        hold = None if ticket.serial is None else self._holds.get(ticket.serial)
        if hold is not None and hold.rider is None:
            self._ride(share, ticket, hold)
            return
        ticket.state = "waiting"
        heapq.heappush(share.ready, (-ticket.priority, ticket.order, ticket))
        self._list(share)

    def _list(self, share: _Share) -> None:
        if not share.listed and share.ready and share.may_start:
            share.listed = True
            heapq.heappush(self._callers, (share.turns, next(self._numbers), share))

    def leave(self, ticket: Ticket) -> None:
        """Be done, in whatever state: give back what it holds, or leave the queue. Safe to call twice."""
        share = self._shares.get(ticket.uid)
        if ticket.state == "running":
            self._give_back(ticket)
        elif ticket.state in {"waiting", "blocked"} and share is not None:
            share.waiting -= 1
            self.queued -= 1
            if ticket.state == "waiting":
                ticket.state = "gone"
                share.withdraw()
        ticket.state = "gone"
        self._next_of_series(ticket)
        self._forget(ticket.uid)
        self._grant()

    def rest(self, ticket: Ticket) -> None:
        """Give back what a ticket holds, which will be enqueued again: its series waits for that."""
        if ticket.state == "running":
            self._give_back(ticket)
        ticket.state = "resting"
        self._forget(ticket.uid)
        self._grant()

    def _next_of_series(self, ticket: Ticket) -> None:
        series = self._series.get(ticket.serial) if ticket.serial is not None else None
        if series is None or series.holder is not ticket or ticket.serial is None:
            return
        while series.waiting:
            _, following = heapq.heappop(series.waiting)
            if following.state == "blocked":
                series.holder = following
                self._make_ready(self._shares[following.uid], following)
                return
        del self._series[ticket.serial]

    def _return(self, uid: int, memory: int, cpus: int) -> None:
        share = self._shares[uid]
        share.running -= 1
        self.running -= 1
        self.memory_used -= memory
        self.cpus_used -= cpus
        self._list(share)

    def _give_back(self, ticket: Ticket) -> None:
        hold = None if ticket.serial is None else self._holds.get(ticket.serial)
        if hold is not None and hold.rider is ticket:
            hold.rider = None  # what it held stays where it is
        else:
            self._return(ticket.payer, ticket.memory, ticket.cpus)
            self._forget(ticket.payer)
        now = time.monotonic()
        if self._busy_since is not None:
            self._pace += PACE * (now - self._busy_since - self._pace)
        self._busy_since = now if self.queued else None

    def _forget(self, uid: int) -> None:
        share = self._shares.get(uid)
        if share is not None and not share.running and not share.waiting:
            del self._shares[uid]
            share.ready.clear()
            if not self._shares:
                self._time = 0.0
                self._callers.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Grant nothing within a block."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._grant()

    def _grant(self) -> None:
        granted, self._riding = self._riding, []
        while not self._paused and self.running < self.slots and (share := self._next()) is not None:
            ticket = share.head()
            if ticket is None or not self._fits(ticket):
                if ticket is not None and self._is_kept_from(ticket):
                    self.on_starved()
                break
            heapq.heappop(share.ready)
            self._start(share, ticket)
            granted.append(ticket)
        if granted:
            self.on_grant()
        for ticket in granted:
            ticket.on_grant()

    def _start(self, share: _Share, ticket: Ticket) -> None:
        heapq.heappop(self._callers)
        share.listed = False
        self._time = max(self._time, share.turns)
        share.turns += 1 / share.weight
        share.waiting -= 1
        self.queued -= 1
        share.running += 1
        self.running += 1
        self.memory_used += ticket.memory
        self.cpus_used += ticket.cpus
        ticket.state, ticket.on = "running", None
        self._list(share)

    def _is_kept_from(self, ticket: Ticket) -> bool:
        """Whether a call would not fit beside what is kept that no call runs on, if nothing else ran."""
        idle = [hold for hold in self._holds.values() if hold.rider is None]
        memory, cpus = sum(hold.memory for hold in idle), sum(hold.cpus for hold in idle)
        over = self.cpus is not None and cpus + ticket.cpus > self.cpus
        return bool(idle) and (over or memory + ticket.memory > self.memory)

    def _fits(self, ticket: Ticket) -> bool:
        """Whether a call may start beside those that run. One may always run alone."""
        if not self.running:
            return True
        if self.memory_used + ticket.memory > self.memory:
            return False
        if self.cpus is not None and self.cpus_used + ticket.cpus > self.cpus:
            return False
        if self.pressed():
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(LOOK_AGAIN, self._look_again)
            return False
        return True

    def _look_again(self) -> None:
        self._timer = None
        self._grant()

    def _next(self) -> _Share | None:
        """The caller whose turn it is; it stays the first of the heap."""
        while self._callers:
            share = self._callers[0][2]
            if share.head() is not None and share.may_start:
                return share
            heapq.heappop(self._callers)
            share.listed = False
        return None

    @asynccontextmanager
    async def admitted(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for a turn, and hold slot, memory and CPUs for the time of the block."""
        turn = anyio.Event()
        ticket.on_grant = turn.set
        self.enqueue(ticket)
        try:
            await turn.wait()
            yield
        finally:
            self.leave(ticket)
