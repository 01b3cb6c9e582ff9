"""The containers that sessions keep over their calls (``isolation: session``).

Theory of operation.  The first call in a session under such a policy makes a container, as any call does,
with the session's files as they stand; when it has ended well enough, the container stays (``Kept``), with
its part of the scheduler's budgets. A further call takes a ``Seat`` in it. What the calls change is in the
container alone until a checkpoint of it is made: every such one stands on what the container began with.

A row of the journal says that a session has one, from the first call's outcome on. It goes in the transaction
that ends the container by a word; where one ends otherwise, it says what was lost, until a call has said it.
One that died while no call ran in it is not to be used, but has its files still: whoever has the session's
next turn keeps them first (``bury``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import structlog

from sandboxd import errors, units
from sandboxd.models import ContainerUse, SessionContainer
from sandboxd.supervisor.kept import Kept
from sandboxd.workspace import containers

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AsyncExitStack

    from sandboxd.config import SessionShare
    from sandboxd.engine.base import Slot
    from sandboxd.models import ContainerLost
    from sandboxd.plan import Plan, Shape
    from sandboxd.scheduler import Hold, Scheduler, Ticket
    from sandboxd.session import Start

__all__ = ["Keeping", "Live", "Seat"]

PART = 2  # of the daemon's budgets that all kept containers may hold: one in so many

log = structlog.get_logger("sandboxd.sessions")


@dataclass(eq=False)
class Live:
    """A container that a session keeps, and what it stands on."""

    session: str
    kept: Kept
    shape: Shape
    commit: Literal["exited", "success", "always", "never"] | None
    share: SessionShare
    base: Start
    hold: Hold
    scheduler: Scheduler
    used: int
    """Microseconds since the epoch: when a call in it ended last."""
    since_used: float
    """The same, of ``time.monotonic()``."""
    spared_until: float = 0.0
    """Of ``time.monotonic()``: until then it is not ended again, where that failed."""
    layer: str | None = None
    """Of its last checkpoint that is a layer on disk, with which the next shares what is the same."""
    ending: bool = False
    """Whether its end waits for its turn already."""

    @property
    def entry(self) -> containers.Entry:
        """As the journal has it."""
        return containers.Entry(self.kept.since, self.kept.calls, self.shape.policy)

    @property
    def idle(self) -> bool:
        """Whether it was not used for so long that it is to be ended, where no call is in it."""
        return time.monotonic() - self.since_used > self.share.container_idle / 1e6

    @property
    def over(self) -> bool:
        """Whether it has lived for so long that it is to be ended, once no call runs in it."""
        return time.monotonic() - self.kept.born > self.share.container_life / 1e6

    @property
    def spared(self) -> bool:
        """Whether it was tried to end it just now, and could not be done."""
        return time.monotonic() < self.spared_until

    def info(self) -> SessionContainer:
        """What is told of it."""
        return SessionContainer(
            state="live",
            since=self.kept.since,
            policy=self.shape.policy,
            calls=self.kept.calls,
            started=self.kept.started,
            used=self.used,
            expires=min(self.used + self.share.container_idle, self.kept.started + self.share.container_life),
            memory=self.hold.memory,
            cpus=self.hold.cpus,
            denied=self.kept.denied,
        )


class Keeping:
    """All of them, by their sessions. For one event loop."""

    def __init__(self) -> None:
        self._live: dict[str, Live] = {}
        self._making: list[Seat] = []
        """Places of calls whose containers are about to be made."""
        self.salvage: Callable[[Live], Awaitable[None]] | None = None
        """Keeps the files of one that has died, and takes it away, in its session's turn."""

    def __iter__(self) -> Iterator[Live]:
        return iter(list(self._live.values()))

    def of(self, session: str) -> Live | None:
        """The one of a session."""
        return self._live.get(session)

    def count(self, uid: int) -> int:
        """How many a caller's sessions keep, or are about to."""
        return sum(live.hold.uid == uid for live in self._live.values()) + sum(
            seat.uid == uid for seat in self._making
        )

    def refuse(self, session: str, named: str, shape: Shape | None = None) -> None:
        """Raise ContainerLive where a session keeps a container that is none of this shape."""
        live = self._live.get(session)
        if live is None or (shape is not None and live.shape.digest == shape.digest):
            return
        if shape is None:
            what = "it cannot be changed but by a call"
        elif shape.policy == live.shape.policy:
            what = f"policy {shape.policy!r} or its image has changed since it was made"
        else:
            what = f"it serves no call of policy {shape.policy!r}"
        raise errors.ContainerLive(
            f"session {named!r} keeps a container of policy {live.shape.policy!r} since call "
            f"{live.kept.since}, and {what}; end it first: `sandboxd session end {named}`",
            session=session,
            since=live.kept.since,
            policy=live.shape.policy,
        )

    def reserve(self, seat: Seat, share: SessionShare, scheduler: Scheduler) -> None:
        """A place for one more; ``unreserve`` gives it back. Raises QuotaExceeded."""
        count, plans = self.count(seat.uid) + 1, [one.plan for one in (*self._making, seat)]
        if count > share.containers:
            raise errors.QuotaExceeded(
                f"your sessions keep {count - 1} containers, and may keep {share.containers}; end one: "
                "`sandboxd session end`",
                quota="sessions.containers",
                asked=count,
                allowed=share.containers,
            )
        memory, most = scheduler.kept + sum(plan.holds for plan in plans), scheduler.memory // PART
        cpus = scheduler.kept_cpus + sum(plan.limits.cpus for plan in plans)
        places = max(1, scheduler.slots // PART)
        over = memory > most or (scheduler.cpus is not None and cpus > scheduler.cpus // PART)
        if over or scheduler.holds + len(plans) > places:
            raise errors.QuotaExceeded(
                f"kept containers may hold {units.format_size(most)}, {places} places and half of the CPUs, "
                f"half of the daemon's budget, and would hold {units.format_size(memory)} in "
                f"{scheduler.holds + 1}; some have to end first",
                quota="budget",
                asked=memory,
                allowed=most,
            )
        self._making.append(seat)

    def unreserve(self, seat: Seat) -> None:
        """It was made, or never will be. Safe to call twice."""
        if seat in self._making:
            self._making.remove(seat)

    def add(self, live: Live) -> None:
        """A session keeps this one from now on."""
        self._live[live.session] = live

    async def bury(self, session: str) -> None:
        """Where the one of a session has died, keep its files and take it away, in the session's turn.

        Raises JournalCorrupt, HostFailed; then it is there as before.
        """
        live = self._live.get(session)
        if live is not None and not live.kept.alive and self.salvage is not None:
            await self.salvage(live)

    async def end(self, live: Live, why: str) -> None:
        """Take it away with everything in it. Safe to call twice."""
        if self._live.get(live.session) is live:
            del self._live[live.session]
        live.kept.ended = live.kept.ended or why
        try:
            await live.kept.close()
        finally:
            live.scheduler.release(live.hold)
        log.info("container of a session ended", session=live.session, since=live.kept.since, why=why)


class Seat:
    """A call's place in the container of its session."""

    def __init__(
        self,
        keeping: Keeping,
        *,
        session: str,
        named: str,
        call: str,
        plan: Plan,
        share: SessionShare,
        base: Start,
        scheduler: Scheduler,
        ticket: Ticket,
        lost: ContainerLost | None,
    ) -> None:
        """``base`` is where the session stands, ``lost`` what it has lost and no call has told yet."""
        self._keeping = keeping
        self._session = session
        self._named = named
        self._call = call
        self.plan = plan
        self._share = share
        self._base = base
        self._scheduler = scheduler
        self._ticket = ticket
        self._lost = lost
        self._live: Live | None = None
        self.kept: Kept | None = None

    @property
    def uid(self) -> int:
        """Whose call it is."""
        return self._ticket.uid

    async def admit(self) -> Kept | None:
        """The container that there is; None: one has to be made, and ``made`` is to be told.

        Raises ContainerLive, QuotaExceeded; EngineFailed where it has died since the call has its turn.
        """
        self._keeping.refuse(self._session, self._named, self.plan.shape)
        live = self._keeping.of(self._session)
        if live is not None and not live.kept.alive:
            raise errors.EngineFailed(
                "the container that the session keeps ended as the call was about to begin in it; the next "
                "call runs in another, with its files"
            )
        self._live = live
        self.kept = None if live is None else live.kept
        if live is None:
            self._keeping.reserve(self, self._share, self._scheduler)
        return self.kept

    def made(self, slot: Slot) -> Kept:
        """A container was made for the call."""
        self.kept = Kept(slot, self._call)
        return self.kept

    def keep(self, stack: AsyncExitStack) -> None:
        """The call has ended, and its container stays; ``stack`` is what a new one is made of."""
        assert self.kept is not None  # noqa: S101
        now, at = time.time_ns() // 1000, time.monotonic()
        if self._live is None:
            self.kept.own(stack.pop_all())
            self._live = Live(
                self._session,
                self.kept,
                self.plan.shape,
                self.plan.commit,
                self._share,
                self._base,
                self._scheduler.keep(self._ticket),
                self._scheduler,
                now,
                at,
            )
            self._keeping.add(self._live)
        self._live.used, self._live.since_used = now, at
        self.kept.rest(self._call)
        self.leave()

    async def end(self, why: str) -> None:
        """The container is of no more use: everything in it ends."""
        self.leave()
        if self.kept is None:
            return
        self.kept.ended = self.kept.ended or why
        if self._live is not None:
            await self._keeping.end(self._live, why)
        else:
            await self.kept.close()

    async def undo(self) -> None:
        """There is no such call: what it made goes; what was there before stays."""
        if self.kept is not None and self.kept.fresh:
            await self.end("its first call was not accepted")
        elif self.kept is not None:
            self.kept.calls -= 1

    def leave(self) -> None:
        """The call has ended, however. Safe to call twice."""
        self._keeping.unreserve(self)

    @property
    def use(self) -> ContainerUse | None:
        """What the call's record says of it."""
        if self.kept is None:
            return None
        return ContainerUse(
            since=self.kept.since, number=self.kept.calls, ended=self.kept.ended, lost=self._lost
        )

    def note(self, connection: sqlite3.Connection) -> None:
        """What comes about with the call's outcome, in its transaction."""
        if self.kept is None:
            return
        entry = containers.Entry(self.kept.since, self.kept.calls, self.plan.shape.policy)
        if self.kept.ended is None:
            containers.note(connection, self._session, entry)
        else:
            containers.lose(connection, self._session, entry.lost(time.time_ns() // 1000, self.kept.ended))
