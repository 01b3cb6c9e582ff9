"""Sessions: lines of calls that share a workspace, their checkpoints, and what becomes of both.

Theory of operation.  A session points at a checkpoint, its head. A call begins with the files of the head,
and where its policy keeps what it changed, that becomes a layer on disk first, to which nothing refers;
then one transaction of the journal writes the outcome, the checkpoint and the session's new head. So there
is no change in a session without its record, and no record of a change that is not there. Fork and rollback
only move pointers. What nothing refers to any more is removed in the background, and at start.

A session may keep a container over its calls (``sessioncontainers``). Then what they change is in that alone,
and nothing else may change the session.

One task makes layers into one where they have become many, removes sessions whose time is over, and clears
away.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors, models, units
from sandboxd.checkouts import Checkouts
from sandboxd.holds import Holds
from sandboxd.keeping import Keeping
from sandboxd.lanes import Lanes
from sandboxd.layers import Layers
from sandboxd.sessioncontainers import SessionContainers
from sandboxd.sessionreading import SessionReading, Standing
from sandboxd.workspace import allowance, stacks, tables

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sandboxd.api.identity import Caller
    from sandboxd.journal import Journal
    from sandboxd.workspace.effort import Effort
    from sandboxd.workspace.handles import Handles
    from sandboxd.workspace.store import LayerStore
    from sandboxd.workspace.tables import Checkpoint, Row
    from sandboxd.workspace.view import Lent

__all__ = ["Sessions", "Standing"]

LOOK = 1.0  # seconds between two looks for sessions whose time is over
CLOCK_REALTIME_COARSE = 5  # <linux/time.h>: the clock of what file systems note
TICKS = 50  # milliseconds, and some ticks of it

log = structlog.get_logger("sandboxd.sessions")


def _now() -> int:
    return time.time_ns() // 1000


async def _past(moment: int) -> None:
    """Wait until a file that is changed is given a time after this one: that clock is some ms behind."""
    for _ in range(TICKS):  # no longer where the clock is set back meanwhile
        if time.clock_gettime_ns(CLOCK_REALTIME_COARSE) // 1000 > moment:
            return
        await anyio.sleep(0.001)


class Sessions(SessionReading):
    """For one event loop; ``run`` is to be a task of it. What belongs to another caller is not found."""

    def __init__(
        self,
        journal: Journal,
        store: LayerStore,
        *,
        handles: Handles,
        lanes: Lanes,
        policy_of: Callable[[str], object],
        kept: Sequence[Path] = (),
    ) -> None:
        """``policy_of`` raises for a name of no policy that is in force.

        ``handles`` are of directories that callers have passed; none is, or has, what is ``kept``.

        They are looked at and let go of in ``lanes``: both may last as long as who passed them likes.
        """
        self._wake = anyio.Event()
        self._policy_of = policy_of
        checkouts = Checkouts(handles, lanes, mounts=store.mounts, kept=kept)
        layers, keeping = Layers(journal, store, self._stir), Keeping()
        holds = Holds(journal, store, layers=layers, checkouts=checkouts, keeping=keeping)
        super().__init__(
            journal,
            work=Lanes("file operations", most=8, each=2, waiting=64),
            checkouts=checkouts,
            layers=layers,
            holds=holds,
            containers=SessionContainers(journal, holds, keeping, self._stir),
        )

    async def open(self) -> None:
        """Remove what nothing refers to, and go on with what an earlier daemon began."""
        await self.layers.open()
        await self.containers.open()
        await self._journal.write(allowance.charge)

    async def run(self) -> None:
        """Look after sessions until cancelled. No fault in here ends a call."""
        async with anyio.create_task_group() as tasks:
            self.checkouts.tasks = self.containers.tasks = tasks
            tasks.start_soon(self.layers.unwritten.run)
            try:
                await self._look_after()
            finally:
                self.checkouts.tasks = self.containers.tasks = None

    def _stir(self) -> None:
        self._wake.set()

    async def _look_after(self) -> None:
        while True:
            self._wake = anyio.Event()
            try:
                await self._expire()
                await self.containers.look_after()
                await self.layers.look_after()
            except Exception:
                log.exception("sessions could not be looked after")
            with anyio.move_on_after(LOOK):
                await self._wake.wait()

    # What callers ask for.

    async def create(self, caller: Caller, asked: models.SessionRequest) -> models.SessionInfo:
        """A new session, without files but for those of a directory that its caller lends.

        Raises SessionExists, QuotaExceeded; NotPermitted, NotFound, PolicyInvalid, ControlNotSupported for
        its policy; NotFound, InvalidRequest for the directory.
        """
        id_, now = self._journal.new_id(), _now()
        first = tables.make_checkpoint(self._journal.new_id(), id_, caller.uid, None, created=now)
        row = self._row(caller, asked, id_=id_, at=first.id, now=now)
        if asked.checkout is None:
            return await self._insert(caller, row, first)
        lent = await self.checkouts.take(id_, asked.checkout, caller)
        try:
            await _past(now)
            return await self._insert(caller, replace(row, checkout=lent), first)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.checkouts.let_go(id_)
            raise

    async def lend(self, caller: Caller, named: str, handle: str) -> models.SessionInfo:
        """Give a session its directory again. Raises NotFound, StateConflict for another one."""
        row = await self.holds.find(caller, named)
        if row.checkout is None or row.uid != caller.uid:
            raise errors.StateConflict(f"session {named!r} stands on no directory of yours")
        if row.id in self.checkouts:
            return await self._info(row)
        await self.checkouts.take(row.id, handle, caller, expected=row.checkout)
        try:
            return await self._info(await self.holds.find(caller, row.id))  # it may have gone meanwhile
        except errors.NotFound:
            await self.checkouts.let_go(row.id)
            raise

    async def close(self) -> None:
        """Let go of every directory that is lent; what does not let go in time goes with the daemon.

        So do containers that are there still: who they were of is told so by the next daemon.
        """
        await self.containers.close()
        await self.checkouts.close()
        self.layers.unwritten.close()

    async def fork(self, caller: Caller, named: str, asked: models.SessionFork) -> models.SessionInfo:
        """A new session that begins with a checkpoint of another of the caller's.

        One of a session on a directory stands on it too. Raises NotFound, SessionExists, QuotaExceeded,
        NotPermitted, PolicyInvalid, ControlNotSupported, Corrupt, StateConflict for a directory that somebody
        else lends.
        """
        source = await self.holds.find(caller, named)
        start = source.head
        if asked.checkpoint is not None:
            start = (await self.holds.checkpoint(source, asked.checkpoint)).id
        stack = await self._journal.read(lambda connection: stacks.stack_of(connection, start))
        await self.layers.sample(source.id, stack)
        row = self._row(caller, asked, id_=self._journal.new_id(), at=start, now=_now())
        row = replace(row, policy=asked.policy or source.policy, network=allowance.begun_with(source.network))
        if source.checkout is None:
            return await self._insert(caller, row, None)
        if source.uid != caller.uid:
            raise errors.StateConflict(
                f"session {named!r} stands on a directory that its caller lends, which nobody else can fork; "
                "export its files, and import them into a session of yours",
                session=source.id,
            )
        if asked.checkout is not None:
            raise errors.InvalidRequest(
                "a fork stands on the directory of the session that it is made of; leave it out",
                field="checkout",
            )
        await self.checkouts.take_too(source, row.id)
        try:
            return await self._insert(caller, replace(row, checkout=source.checkout), None)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.checkouts.let_go(row.id)
            raise

    def _row(self, caller: Caller, asked: models.SessionRequest, *, id_: str, at: str, now: int) -> Row:
        if asked.policy is not None and not caller.may_use(asked.policy):
            raise errors.NotPermitted(
                f"policy {asked.policy!r} is not yours to use; you may use "
                f"{', '.join(sorted(caller.policies))}",
                policies=sorted(caller.policies),
            )
        if asked.policy is not None:
            self._policy_of(asked.policy)
        if asked.quota.size is not None and asked.quota.size > caller.sessions.size:
            raise errors.QuotaExceeded(
                f"quota.size {units.format_size(asked.quota.size)} is more than the "
                f"{units.format_size(caller.sessions.size)} that all your sessions may hold",
                quota="sessions.size",
                asked=asked.quota.size,
                allowed=caller.sessions.size,
            )
        if asked.quota.inodes is not None and asked.quota.inodes > caller.sessions.inodes:
            raise errors.QuotaExceeded(
                f"quota.inodes {units.format_count(asked.quota.inodes)} is more than the "
                f"{units.format_count(caller.sessions.inodes)} that all your sessions may have",
                quota="sessions.inodes",
                asked=asked.quota.inodes,
                allowed=caller.sessions.inodes,
            )
        quota = asked.quota
        return tables.Row(
            id_, caller.uid, asked.name, asked.policy, asked.labels, now, now, asked.ttl, asked.idle,
            quota.size, quota.inodes, at, at,
        )  # fmt: skip

    async def _insert(self, caller: Caller, row: Row, first: Checkpoint | None) -> models.SessionInfo:
        most = caller.sessions.count

        def insert(connection: sqlite3.Connection) -> None:
            count = tables.count_of(connection, caller.uid)
            if count >= most:
                raise errors.QuotaExceeded(
                    f"you have {count} sessions, and may have {most}; delete some, or give them a ttl",
                    quota="sessions.count",
                    asked=count + 1,
                    allowed=most,
                )
            if row.name is not None and (found := tables.find(connection, row.name, caller.uid)) is not None:
                raise errors.SessionExists(f"you have a session {row.name!r} already", id=found.id)
            if first is not None:
                tables.insert_checkpoint(connection, first)
            elif tables.checkpoint(connection, row.head) is None:  # it went meanwhile
                raise errors.NotFound("the checkpoint was removed")
            tables.insert_session(connection, row)

        def undo(connection: sqlite3.Connection) -> None:
            tables.remove_session(connection, row.id)
            if first is not None:
                tables.remove_checkpoint(connection, first.id)

        await self._journal.write(insert, undo=undo)
        return await self._info(row)

    async def rollback(self, caller: Caller, named: str, checkpoint: str) -> models.SessionInfo:
        """Let a session stand on another of its checkpoints. Raises NotFound, SessionBusy."""
        row = await self.holds.find(caller, named)
        wanted = await self.holds.checkpoint(row, checkpoint)
        async with self.holds.alone(row):
            self.containers.refuse(row.id, named)

            def move(connection: sqlite3.Connection) -> bool:
                if tables.checkpoint(connection, wanted.id) is None:
                    return False
                tables.touch(connection, row, at=_now())
                return tables.move(connection, row.id, since=row.head, to=wanted.id)

            def undo(connection: sqlite3.Connection) -> None:
                tables.touch(connection, row, at=row.used)
                tables.move(connection, row.id, since=wanted.id, to=row.head)

            if not await self._journal.write(move, undo=undo):
                raise errors.SessionBusy(f"session {named!r} was changed meanwhile; ask again")
        return await self.get(caller, row.id)

    async def discard(self, caller: Caller, named: str) -> models.SessionInfo:
        """Forget the checkpoints that a session's head does not stand on, as a rollback left them.

        Raises NotFound, SessionBusy.
        """
        row = await self.holds.find(caller, named)
        async with self.holds.alone(row):
            await self.layers.prune(row.id)
        return await self.get(caller, row.id)

    async def delete(self, caller: Caller, named: str) -> None:
        """Remove a session; what forks of it stand on stays. Raises NotFound, SessionBusy."""
        row = await self.holds.find(caller, named)
        await self._delete(row)
        log.info("session removed", id=row.id, uid=caller.uid)

    async def _delete(self, row: Row, *, over: int | None = None) -> bool:
        """Whether it went; with ``over`` only where its time is over then."""
        async with self.holds.alone(row, removing=True):
            gone = await self._journal.write(
                lambda connection: tables.mark_gone(connection, row.id, over=over),
                undo=lambda connection: tables.mark_there(connection, row.id),
            )
        if gone:
            await self.containers.end_of(row.id, "its session was removed")
            await self.checkouts.let_go(row.id)
            self.layers.to_prune.append(row.id)
            self._wake.set()
        return gone

    async def checkpoint(self, caller: Caller, named: str) -> models.CheckpointInfo:
        """As ``SessionContainers.checkpoint``."""
        return await self.containers.checkpoint(caller, named)

    async def end(self, caller: Caller, named: str, *, discard: bool) -> models.SessionInfo:
        """As ``SessionContainers.end``."""
        row = await self.holds.find(caller, named)
        await self.containers.end(row, discard=discard)
        return await self.get(caller, row.id)

    # What its files are changed for.

    async def change(
        self,
        caller: Caller,
        named: str,
        fill: Callable[[Sequence[Path | Lent], int], None],
        *,
        effort: Effort,
        match: frozenset[str] | None = None,
    ) -> models.CheckpointInfo:
        """A checkpoint of a change from outside; it waits for its turn, as a call does.

        ``fill`` makes a layer over others in an empty directory, in a thread, and looks at ``effort``.
        ``match`` are the digests of checkpoints that it is made for. Raises NotFound, PreconditionFailed,
        QuotaExceeded, WorkspaceUnfit, HostFailed, QueueFull, RequestTimeout, and what ``fill`` raises; then
        nothing has changed.
        """
        hold = await self.holds.enter(caller, named, None)
        try:
            await hold.begin()
            if match is not None and hold.before not in match:
                raise errors.PreconditionFailed(
                    f"session {named!r} does not stand on that checkpoint any more", digest=hold.before
                )
            hold.check(None)
            try:
                made = await self.work.run(
                    caller.uid, lambda: effort.within(lambda: hold.make(fill)), stop=effort.stop
                )
                with anyio.CancelScope(shield=True):  # what is on disk is also told
                    await self._journal.write(hold.commit, undo=hold.undo())
                    hold.committed()
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await hold.abandon()
                raise
        finally:
            hold.leave()
        return made.info(made.id)

    # Within.

    async def _expire(self) -> None:
        until, after = _now(), tables.FIRST
        while True:
            read = partial(tables.expired, now=until, after=after)
            over = await self._journal.read(read)
            if not over:
                return
            after = over[-1]
            await self._remove_all([id_ for _, id_ in over])

    async def _remove_all(self, over: Sequence[str]) -> None:
        for id_ in over:
            row = await self._journal.read(lambda connection, id_=id_: tables.find(connection, id_, None))  # type: ignore[misc]
            if row is None or not self.holds.is_over(row):
                continue
            try:
                if await self._delete(row, over=_now()):
                    log.info("session removed", id=row.id, uid=row.uid, why="its time is over")
            except errors.SessionBusy:
                continue
