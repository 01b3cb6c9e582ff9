"""What is read of sessions: what they are and have been, and the layers that checkpoints are made of."""

from __future__ import annotations

from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sandboxd import errors, models
from sandboxd.workspace import allowance, stacks, tables
from sandboxd.workspace.effort import Effort

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from sandboxd.api.identity import Caller
    from sandboxd.checkouts import Checkouts
    from sandboxd.holds import Holds
    from sandboxd.journal import Journal
    from sandboxd.lanes import Lanes
    from sandboxd.layers import Layers
    from sandboxd.sessioncontainers import SessionContainers
    from sandboxd.workspace.checkout import Checkout
    from sandboxd.workspace.stacks import Stack
    from sandboxd.workspace.tables import Checkpoint, Row

__all__ = ["SessionReading", "Standing"]

MOST = 500  # of a page


class SessionReading:
    """For one event loop. What belongs to another caller is not found."""

    def __init__(
        self,
        journal: Journal,
        *,
        work: Lanes,
        checkouts: Checkouts,
        layers: Layers,
        holds: Holds,
        containers: SessionContainers,
    ) -> None:
        """``work`` is where files are read."""
        self._journal = journal
        self.work = work
        self.checkouts = checkouts
        self.layers = layers
        self.holds = holds
        self.containers = containers

    async def get(self, caller: Caller, named: str) -> models.SessionInfo:
        """One session, by its id or name. Raises NotFound."""
        return await self._info(await self.holds.find(caller, named))

    async def id_of(self, caller: Caller, named: str) -> str:
        """The id of one, by that or its name. Raises NotFound."""
        return (await self.holds.find(caller, named)).id

    async def list(self, caller: Caller, *, before: str | None, limit: int) -> models.SessionList:
        """A page of the caller's sessions, or of everybody's for an operator; newest first."""
        uid, most = None if caller.sees_all else caller.uid, min(limit, MOST)
        read = partial(tables.list_sessions, uid=uid, before=before, limit=most + 1)
        rows = await self._journal.read(read)
        shown = []
        for row in rows[:most]:
            with suppress(errors.NotFound):  # it went meanwhile
                shown.append(await self._info(row))
        return models.SessionList(sessions=shown, next=rows[most - 1].id if len(rows) > most else None)

    async def checkpoints(
        self, caller: Caller, named: str, *, before: str | None, limit: int
    ) -> models.CheckpointList:
        """A page of the checkpoints of a session, newest first; the last is the one that it began with.

        Raises NotFound.
        """
        row, most = await self.holds.find(caller, named), min(limit, MOST)

        def read(connection: sqlite3.Connection) -> tuple[list[Checkpoint], Checkpoint | None]:
            found = tables.checkpoints(connection, row.id, before=before, limit=most + 1)
            return found, tables.checkpoint(connection, row.origin)

        found, origin = await self._journal.read(read)
        more = len(found) > most
        page = found[:most]
        if not more and origin is not None and origin.session != row.id:
            page.append(origin)  # of the session that this one was forked from
        return models.CheckpointList(
            checkpoints=[one.info(row.head) for one in page],
            next=page[-1].id if more else None,
        )

    @asynccontextmanager
    async def standing(
        self, caller: Caller, named: str, *checkpoints: str | None
    ) -> AsyncIterator[tuple[Standing, ...]]:
        """What checkpoints are made of: ids, digests, ``origin``, ``root``, or None for where it stands.

        Ids and digests may be those of other sessions of its caller. None is removed meanwhile. Raises
        NotFound, Corrupt where a layer is gone.
        """
        row = await self.holds.find(caller, named)
        with ExitStack() as reading:
            reading.enter_context(self.holds.turns.reading(row.id))
            found = [await self._place(row, one, reading) for one in checkpoints]
            below = await self._journal.read(
                lambda connection: [stacks.stack_of(connection, id_) for _, id_, _ in found]
            )
            for (session, _, _), stack in zip(found, below, strict=True):
                await self.layers.unwritten.settle(stack.layers)
                self.layers.present(session, stack)
            yield tuple(
                Standing(
                    id_,
                    tuple(self.layers.paths(stack.layers)),
                    checkout,
                    partial(self.layers.check, session, stack),
                    partial(self.layers.check_small, session, stack),
                )
                for (session, id_, checkout), stack in zip(found, below, strict=True)
            )

    async def check(self, caller: Caller, named: str, checkpoint: str) -> None:
        """Compare all layers of a checkpoint with their digests. Raises NotFound, Corrupt, QueueFull."""
        effort = Effort()
        async with self.standing(caller, named, checkpoint) as (one,):
            work = partial(effort.within, partial(one.check, effort))
            await self.work.run(caller.uid, work, stop=effort.stop)

    async def keeps(self, session: str, checkpoint: str | None) -> bool:
        """Whether a session has a checkpoint, by its digest."""
        if checkpoint is None:
            return False

        def read(connection: sqlite3.Connection) -> bool:
            row = tables.find(connection, session, None)
            return row is not None and tables.within(connection, row, checkpoint) is not None

        return await self._journal.read(read)

    def left(self, caller: Caller) -> int:
        """Bytes that the caller's sessions may still grow by together."""
        return max(0, caller.sessions.size - self.layers.held.size_of(caller.uid))

    async def _place(
        self, row: Row, checkpoint: str | None, reading: ExitStack
    ) -> tuple[str, str, Checkout | None]:
        """A checkpoint's session and id, and what is below it; the session is kept until ``reading`` ends."""
        try:
            return row.id, await self._named(row, checkpoint), self.checkouts.of(row)
        except errors.NotFound:
            read = partial(tables.elsewhere, uid=row.uid, named=checkpoint or "")
            other = await self._journal.read(read)
            if other is None or self.holds.is_over(other):
                raise
        reading.enter_context(self.holds.turns.reading(other.id))
        # The same directory counts as one layer, which need not be compared with itself.
        below = self.checkouts.of(row if row.checkout == other.checkout else other)
        return other.id, (await self.holds.checkpoint(other, checkpoint or "")).id, below

    async def _named(self, row: Row, checkpoint: str | None) -> str:
        if checkpoint is None:
            current = await self._journal.read(lambda connection: tables.find(connection, row.id, None))
            return row.head if current is None else current.head
        if checkpoint == "origin":
            return row.origin
        if checkpoint == "root":
            first = await self._journal.read(lambda connection: tables.first_of(connection, row.origin))
            return row.origin if first is None else first.id
        return (await self.holds.checkpoint(row, checkpoint)).id

    async def _info(self, row: Row) -> models.SessionInfo:
        def read(
            connection: sqlite3.Connection,
        ) -> tuple[Row | None, Checkpoint | None, Stack, Checkpoint | None]:
            now = tables.find(connection, row.id, None)  # where it stood may have been taken back since
            at = row.head if now is None else now.head
            head, stack = tables.checkpoint(connection, at), stacks.stack_of(connection, at)
            return now, head, stack, tables.first_of(connection, row.origin) if row.checkout else None

        now, head, stack, first = await self._journal.read(read)
        if now is None or head is None:
            raise errors.NotFound(f"no session {row.id!r} of yours")
        row = now
        return models.SessionInfo(
            id=row.id,
            name=row.name,
            uid=row.uid,
            policy=row.policy,
            labels=row.labels,
            created=row.created,
            used=row.used,
            expires=row.expires,
            ttl=row.ttl,
            idle=row.idle,
            quota=models.SessionQuota(size=row.quota_size, inodes=row.quota_inodes),
            head=head.info(row.head),
            size=stack.size,
            inodes=stack.inodes,
            layers=len(stack.layers),
            checkout=self.checkouts.state(row),
            lent=None if first is None else first.created,
            container=await self.containers.info(row.id),
            calls=row.calls,
            network=models.SessionNetwork(**allowance.used_of(row.network)),
            in_flight=self.holds.turns.inside(row.id),
        )


@dataclass(frozen=True)
class Standing:
    """A checkpoint's id, and its layers, the newest first; below them, what its caller has lent."""

    checkpoint: str
    layers: tuple[Path, ...]
    checkout: Checkout | None
    check: Callable[..., None]
    """Given an ``Effort``, compares its layers with their digests, all but those that are given too.

    Blocks. Raises Corrupt.
    """
    check_small: Callable[..., None]
    """Given an ``Effort`` and one of its layers, does so with that if it costs next to nothing to read."""
