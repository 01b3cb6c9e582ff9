"""Sessions: lines of calls that share a workspace, their checkpoints, and what becomes of both.

Theory of operation.  A session points at a checkpoint, its head. A call begins with the files of the head,
and where its policy keeps what it changed, that becomes a layer on disk first, to which nothing refers;
then one transaction of the journal writes the outcome, the checkpoint and the session's new head. So there
is no change in a session without its record, and no record of a change that is not there. Fork and rollback
only move pointers. What nothing refers to any more is removed in the background, and at start.

One task makes layers into one where they have become many, removes sessions whose time is over, and clears
away.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread
import structlog
from uuid6 import uuid7

from sandboxd import errors, models, units
from sandboxd.init import LAUNCH
from sandboxd.lanes import Lanes
from sandboxd.session import LONG, OWNER, CallSession
from sandboxd.workspace import tables
from sandboxd.workspace.checkout import Checkout
from sandboxd.workspace.layer import Figures
from sandboxd.workspace.merge import Merged, merge
from sandboxd.workspace.shares import Shares
from sandboxd.workspace.turns import Turns
from sandboxd.workspace.unwritten import Unwritten

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from anyio.abc import TaskGroup

    from sandboxd.api.identity import Caller
    from sandboxd.journal import Journal
    from sandboxd.workspace.effort import Effort
    from sandboxd.workspace.handles import Handles
    from sandboxd.workspace.store import LayerStore
    from sandboxd.workspace.tables import Checkpoint, Row, Stack
    from sandboxd.workspace.view import Lent

__all__ = ["Sessions", "Standing"]

LOOK = 1.0  # seconds between two looks for sessions whose time is over
MOST = 500  # of a page
LETTING_GO = 5.0  # seconds, of all that is lent, at the end of the daemon

log = structlog.get_logger("sandboxd.sessions")


def _now() -> int:
    return time.time_ns() // 1000


class Sessions:
    """For one event loop; ``run`` is to be a task of it. What belongs to another caller is not found."""

    def __init__(
        self,
        journal: Journal,
        store: LayerStore,
        *,
        handles: Handles,
        lanes: Lanes,
        kept: Sequence[Path] = (),
    ) -> None:
        """``handles`` are of directories that callers have passed; none is, or has, what is ``kept``.

        They are looked at and let go of in ``lanes``: both may last as long as who passed them likes.
        """
        self._journal = journal
        self._handles = handles
        self._lanes = lanes
        self.work = Lanes("file operations", most=8, each=2, waiting=64)
        self._own = kept
        self._checkouts: dict[str, Checkout] = {}
        self._store = store
        self._turns = Turns()
        self._held = Shares()
        self._unwritten = Unwritten(journal, store)
        self._removing: set[str] = set()
        self._tasks: TaskGroup | None = None
        self._to_merge: deque[str] = deque()
        self._to_prune: deque[str | None] = deque()
        self._wake = anyio.Event()

    async def open(self) -> None:
        """Remove the layers that nothing refers to, and go on with what an earlier daemon began."""
        referenced, held, going = await self._journal.read(
            lambda connection: (
                tables.referenced(connection),
                tables.held(connection),
                tables.going(connection),
            )
        )
        removed = await anyio.to_thread.run_sync(self._store.clean, referenced)
        if removed:
            log.warning("files of calls without an outcome were removed", layers=removed)
        await self._unwritten.restore()
        self._held.start(held)
        self._to_prune += [*going, None]

    async def run(self) -> None:
        """Look after sessions until cancelled. No fault in here ends a call."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            tasks.start_soon(self._unwritten.run)
            try:
                await self._look_after()
            finally:
                self._tasks = None

    async def _look_after(self) -> None:
        while True:
            self._wake = anyio.Event()
            try:
                await self._expire()
                while self._to_prune:
                    await self._prune(self._to_prune.popleft())
                while self._to_merge:
                    await self._merge(self._to_merge.popleft())
            except Exception:
                log.exception("sessions could not be looked after")
            with anyio.move_on_after(LOOK):
                await self._wake.wait()

    # What callers ask for.

    async def create(self, caller: Caller, asked: models.SessionRequest) -> models.SessionInfo:
        """A new session, without files but for those of a directory that its caller lends.

        Raises SessionExists, QuotaExceeded, NotPermitted; NotFound, InvalidRequest for the directory.
        """
        id_, now = str(uuid7()), _now()
        first = tables.make_checkpoint(str(uuid7()), id_, caller.uid, None, created=now)
        row = self._row(caller, asked, id_=id_, at=first.id, now=now)
        if asked.checkout is None:
            return await self._insert(caller, row, first)
        checkout = await self._lent(id_, asked.checkout, caller)
        self._checkouts[id_] = checkout
        try:
            return await self._insert(caller, replace(row, checkout=_identity(checkout)), first)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._let_go(id_)
            raise

    async def lend(self, caller: Caller, named: str, handle: str) -> models.SessionInfo:
        """Give a session its directory again. Raises NotFound, StateConflict for another one."""
        row = await self._find(caller, named)
        if row.checkout is None or row.uid != caller.uid:
            raise errors.StateConflict(f"session {named!r} stands on no directory of yours")
        if row.id in self._checkouts:
            return await self._info(row)
        checkout = await self._lent(row.id, handle, caller)
        if _identity(checkout) != row.checkout:
            await self._lanes.run(caller.uid, checkout.close, always=True)
            raise errors.StateConflict(f"session {named!r} stands on another directory than the one passed")
        self._checkouts[row.id] = checkout
        try:
            return await self._info(await self._find(caller, row.id))  # it may have gone meanwhile
        except errors.NotFound:
            await self._let_go(row.id)
            raise

    async def _lent(self, id_: str, handle: str, caller: Caller) -> Checkout:
        handed = self._handles.take(handle, caller.uid)

        def lend() -> Checkout:
            with handed as directory:
                place = self._store.mounts / f"checkout-{id_}"
                checkout = Checkout.of(directory, handed.owner, place=place, launcher=LAUNCH, kept=self._own)
                try:
                    os.close(checkout.mapped(*OWNER, slot=0))  # a file system that cannot is refused now
                except BaseException:
                    checkout.close()
                    raise
                return checkout

        return await self._lanes.run(caller.uid, lend, undo=Checkout.close, always=True)

    async def _let_go(self, id_: str) -> None:
        """Done when this returns, or, where its caller has it last, later: nobody waits for him."""
        checkout = self._checkouts.pop(id_, None)
        if checkout is None:
            return
        gone = anyio.Event()

        async def close() -> None:
            await self._lanes.run(checkout.owner.uid, checkout.close, always=True)
            gone.set()

        if self._tasks is None:
            await close()
            return
        self._tasks.start_soon(close)
        with anyio.move_on_after(LOOK):
            await gone.wait()

    async def close(self) -> None:
        """Let go of every directory that is lent; what does not let go in time goes with the daemon."""
        self._unwritten.close()
        with anyio.move_on_after(LETTING_GO, shield=True):
            async with anyio.create_task_group() as tasks:
                for id_ in list(self._checkouts):
                    tasks.start_soon(self._let_go, id_)

    def _checkout_of(self, row: Row) -> Checkout | None:
        """Raises StateConflict where the daemon has to be given it again."""
        found = self._checkouts.get(row.id)
        if row.checkout is not None and found is None:
            raise errors.StateConflict(
                f"session {row.name or row.id!r} stands on a directory of its caller's, which the daemon "
                "has no more since it was restarted; pass the directory again",
                session=row.id,
            )
        return found

    async def fork(self, caller: Caller, named: str, asked: models.SessionFork) -> models.SessionInfo:
        """A new session that begins with a checkpoint of another of the caller's.

        Raises NotFound, SessionExists, QuotaExceeded, NotPermitted.
        """
        source = await self._find(caller, named)
        if source.checkout is not None:
            raise errors.StateConflict(
                f"session {named!r} stands on a directory of its caller's, which changes; it cannot be forked"
            )
        start = source.head
        if asked.checkpoint is not None:
            start = (await self._checkpoint(source, asked.checkpoint)).id
        row = self._row(caller, asked, id_=str(uuid7()), at=start, now=_now())
        if asked.policy is None:
            row = replace(row, policy=source.policy)
        return await self._insert(caller, row, None)

    def _row(self, caller: Caller, asked: models.SessionRequest, *, id_: str, at: str, now: int) -> Row:
        if asked.policy is not None and not caller.may_use(asked.policy):
            raise errors.NotPermitted(
                f"policy {asked.policy!r} is not yours to use; you may use "
                f"{', '.join(sorted(caller.policies))}",
                policies=sorted(caller.policies),
            )
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

    async def get(self, caller: Caller, named: str) -> models.SessionInfo:
        """One session, by its id or name. Raises NotFound."""
        return await self._info(await self._find(caller, named))

    async def list(self, caller: Caller, *, before: str | None, limit: int) -> models.SessionList:
        """A page of the caller's sessions, or of everybody's for an operator; newest first."""
        uid, most = None if caller.sees_all else caller.uid, min(limit, MOST)
        read = partial(tables.list_sessions, uid=uid, before=before, limit=most + 1)
        rows = await self._journal.read(read)
        shown = [await self._info(row) for row in rows[:most]]
        return models.SessionList(sessions=shown, next=rows[most - 1].id if len(rows) > most else None)

    async def checkpoints(
        self, caller: Caller, named: str, *, before: str | None, limit: int
    ) -> models.CheckpointList:
        """A page of the checkpoints of a session, newest first; the last is the one that it began with.

        Raises NotFound.
        """
        row, most = await self._find(caller, named), min(limit, MOST)

        def read(connection: sqlite3.Connection) -> tuple[list[Checkpoint], Checkpoint | None]:
            found = tables.checkpoints(connection, row.id, before=before, limit=most + 1)
            return found, tables.checkpoint(connection, row.origin)

        found, origin = await self._journal.read(read)
        more = len(found) > most
        page = found[:most]
        if not more and origin is not None and origin.session != row.id:
            page.append(origin)  # of the session that this one was forked from
        return models.CheckpointList(
            checkpoints=[_checkpoint_info(one, row.head) for one in page],
            next=page[-1].id if more else None,
        )

    async def rollback(self, caller: Caller, named: str, checkpoint: str) -> models.SessionInfo:
        """Let a session stand on another of its checkpoints. Raises NotFound, SessionBusy."""
        row = await self._find(caller, named)
        wanted = await self._checkpoint(row, checkpoint)
        with self._alone(row):

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
        row = await self._find(caller, named)
        with self._alone(row):
            await self._prune(row.id)
        return await self.get(caller, row.id)

    async def delete(self, caller: Caller, named: str) -> None:
        """Remove a session; what forks of it stand on stays. Raises NotFound, SessionBusy."""
        row = await self._find(caller, named)
        await self._delete(row)
        log.info("session removed", id=row.id, uid=caller.uid)

    async def _delete(self, row: Row, *, over: int | None = None) -> bool:
        """Whether it went; with ``over`` only where its time is over then."""
        with self._alone(row):
            self._removing.add(row.id)
            try:
                gone = await self._journal.write(
                    lambda connection: tables.mark_gone(connection, row.id, over=over),
                    undo=lambda connection: tables.mark_there(connection, row.id),
                )
            finally:
                self._removing.discard(row.id)
        if gone:
            await self._let_go(row.id)
            self._to_prune.append(row.id)
            self._wake.set()
        return gone

    # What its files are read and changed for.

    @asynccontextmanager
    async def standing(
        self, caller: Caller, named: str, *checkpoints: str | None
    ) -> AsyncIterator[tuple[Standing, ...]]:
        """What checkpoints are made of: ids, digests, ``origin``, or None for where the session stands.

        The session is not removed meanwhile. Raises NotFound.
        """
        row = await self._find(caller, named)
        checkout = self._checkout_of(row)
        self._turns.enter(row.id)
        try:
            ids = [await self._named(row, one) for one in checkpoints]
            stacks = await self._journal.read(
                lambda connection: [tables.stack_of(connection, one) for one in ids]
            )
            for stack in stacks:
                await self._unwritten.settle(stack.layers)
            yield tuple(
                Standing(id_, tuple(self._paths(stack.layers)), checkout)
                for id_, stack in zip(ids, stacks, strict=True)
            )
        finally:
            self._turns.leave(row.id)

    def left(self, caller: Caller) -> int:
        """Bytes that the caller's sessions may still grow by together."""
        return max(0, caller.sessions.size - self._held.size_of(caller.uid))

    async def _named(self, row: Row, checkpoint: str | None) -> str:
        if checkpoint is None:
            current = await self._journal.read(lambda connection: tables.find(connection, row.id, None))
            return row.head if current is None else current.head
        if checkpoint == "origin":
            return row.origin
        return (await self._checkpoint(row, checkpoint)).id

    async def change(
        self,
        caller: Caller,
        named: str,
        fill: Callable[[Sequence[Path | Lent], int], None],
        *,
        effort: Effort,
    ) -> models.CheckpointInfo:
        """A checkpoint of a change from outside; it waits for its turn, as a call does.

        ``fill`` makes a layer over others in an empty directory, in a thread, and looks at ``effort``. Raises
        NotFound, QuotaExceeded, WorkspaceUnfit, HostFailed, QueueFull, RequestTimeout, and what ``fill``
        raises; then nothing has changed.
        """
        hold = await self.enter(caller, named, None)
        try:
            await hold.begin()
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
        return _checkpoint_info(made, made.id)

    # What calls ask for.

    async def enter(self, caller: Caller, named: str, policy: str | None) -> CallSession:
        """A call's hold on a session, which lives on until the call has left it.

        ``policy`` is what the request names. Raises NotFound, NotPermitted.
        """
        row = await self._find(caller, named)
        if row.policy is not None and policy not in {None, row.policy}:
            raise errors.NotPermitted(
                f"calls in session {named!r} run under policy {row.policy!r}, and the request asks for "
                f"{policy!r}; leave it out, or take another session",
                policies=[row.policy],
            )
        if row.id in self._removing:
            raise errors.NotFound(f"no session {named!r} of yours")
        checkout = self._checkout_of(row)
        self._turns.enter(row.id)
        return CallSession(
            row,
            caller.sessions,
            journal=self._journal,
            store=self._store,
            turns=self._turns,
            held=self._held,
            unwritten=self._unwritten,
            kept=self._kept,
            checkout=checkout,
        )

    def hold(self, id_: str) -> None:
        """Keep a session for a call that waits since an earlier daemon, until ``let_go``."""
        self._turns.enter(id_)

    def let_go(self, id_: str) -> None:
        """The call has entered it, or never will."""
        self._turns.leave(id_)

    def _kept(self, checkpoint: Checkpoint, layers: int) -> None:
        """A call was kept: where there are enough layers, they are made into one."""
        wanted = checkpoint.depth % tables.FAN == 0 or layers > LONG
        if wanted and checkpoint.id not in self._to_merge:
            self._to_merge.append(checkpoint.id)
            self._wake.set()

    def _paths(self, names: tuple[str, ...]) -> Iterator[Path]:
        yield from map(self._store.path, names)

    # Within.

    async def _find(self, caller: Caller, named: str) -> Row:
        def read(connection: sqlite3.Connection) -> Row | None:
            found = tables.find(connection, named, caller.uid)
            if found is None and caller.sees_all:
                found = tables.find(connection, named, None)
            return found

        row = await self._journal.read(read)
        if row is None or self._is_over(row):
            raise errors.NotFound(f"no session {named!r} of yours; `sandboxd session create` makes one")
        return row

    def _is_over(self, row: Row) -> bool:
        return row.expires is not None and row.expires <= _now() and not self._turns.inside(row.id)

    async def _checkpoint(self, row: Row, named: str) -> Checkpoint:
        found = await self._journal.read(lambda connection: tables.within(connection, row, named))
        if found is None:
            raise errors.NotFound(f"session {row.name or row.id!r} has no checkpoint {named!r}")
        return found

    def _alone(self, row: Row) -> _Alone:
        return _Alone(self._turns, row)

    async def _info(self, row: Row) -> models.SessionInfo:
        def read(connection: sqlite3.Connection) -> tuple[Checkpoint | None, Stack]:
            return tables.checkpoint(connection, row.head), tables.stack_of(connection, row.head)

        head, stack = await self._journal.read(read)
        if head is None:
            raise errors.NotFound(f"no session {row.id!r} of yours")
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
            head=_checkpoint_info(head, row.head),
            size=stack.size,
            inodes=stack.inodes,
            layers=len(stack.layers),
            checkout=self._lending(row),
            calls=row.calls,
            in_flight=self._turns.inside(row.id),
        )

    def _lending(self, row: Row) -> Literal["lent", "missing"] | None:
        if row.checkout is None:
            return None
        return "lent" if row.id in self._checkouts else "missing"

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
            if row is None or not self._is_over(row):
                continue
            try:
                if await self._delete(row, over=_now()):
                    log.info("session removed", id=row.id, uid=row.uid, why="its time is over")
            except errors.SessionBusy:
                continue

    async def _prune(self, session: str | None) -> None:
        """Forget what nothing stands on, in steps; then its layers go."""
        complete, steps = False, 0
        while not complete:
            found = await self._forgotten(session)
            for freed in found.freed:
                self._held.give(*freed)
            await self._unwritten.forget(found.layers)
            for name in found.layers:
                await anyio.to_thread.run_sync(self._store.remove, name)
            complete, steps = found.complete, steps + 1
        if session is not None and steps > 1:  # what is nobody's may have been left between them
            await self._prune(None)

    async def _forgotten(self, session: str | None) -> tables.Pruned:
        """One step of that. Raises HostFailed; then it was not made, or is taken back."""
        steps: list[tables.Pruned] = []

        def prune(connection: sqlite3.Connection) -> tables.Pruned:
            steps.append(tables.prune(connection, session))
            return steps[0]

        def undo(connection: sqlite3.Connection) -> None:
            steps[0].take_back(connection)

        return await self._journal.write(prune, undo=undo)

    async def _is_lent(self, checkpoint: str) -> bool:
        """Whether the session of a checkpoint stands on a directory of its caller's."""

        def read(connection: sqlite3.Connection) -> Row | None:
            found = tables.checkpoint(connection, checkpoint)
            return None if found is None else tables.find(connection, found.session or "", None)

        row = await self._journal.read(read)
        return row is not None and row.checkout is not None

    async def _merge(self, checkpoint: str) -> None:
        """Make layers below a checkpoint into fewer; what goes wrong is tried again with a later call."""
        wanted = await self._journal.read(lambda connection: tables.due(connection, checkpoint))
        lent = await self._is_lent(checkpoint)
        for end, span, below in wanted:
            try:
                await self._merge_one(end, span, below, lent=lent)
            except errors.SandboxdError:  # the others may go
                log.exception("layers of a session could not be merged", checkpoint=end.id, span=span)

    async def _merge_one(self, end: Checkpoint, span: int, below: str, *, lent: bool) -> None:
        def read(connection: sqlite3.Connection) -> tuple[Stack, Stack]:
            floor = end.depth - span
            return tables.stack_of(connection, end.id, floor=floor), tables.stack_of(connection, below)

        upper, lower = await self._journal.read(read)
        if len(upper.layers) < 2:
            return
        await self._unwritten.settle((*upper.layers, *lower.layers))

        found: list[Merged] = []

        def fill(into: int, scratch: int) -> Figures:
            paths = tuple(self._paths(upper.layers))
            beneath = tuple(self._paths(lower.layers))
            found.append(merge(paths, into, below=beneath, scratch=scratch, lent=lent))
            return Figures("", found[0].size, found[0].inodes)

        name, _ = await anyio.to_thread.run_sync(self._store.add, fill)
        made = tables.Merge(end.id, span, below, name, *found[0])
        written = False
        try:
            written = await self._journal.write(lambda connection: tables.insert_merge(connection, made))
        except errors.HostFailed:  # it may be there all the same
            written = name in await self._journal.read(tables.referenced)
            raise
        finally:
            if written:
                self._held.charge(end.uid, made.own_size, made.own_inodes + 1)
            else:
                await anyio.to_thread.run_sync(self._store.remove, name)


@dataclass(frozen=True)
class Standing:
    """A checkpoint's id, and its layers, the newest first; below them, what its caller has lent."""

    checkpoint: str
    layers: tuple[Path, ...]
    checkout: Checkout | None


def _identity(checkout: Checkout) -> str:
    device, inode = checkout.identity
    return f"{device:x}:{inode}"


class _Alone:
    """For the time of a block nobody else is in a session. Entering raises SessionBusy."""

    def __init__(self, turns: Turns, row: Row) -> None:
        self._turns = turns
        self._row = row

    def __enter__(self) -> None:
        inside = self._turns.inside(self._row.id)
        if inside:
            raise errors.SessionBusy(
                f"{inside} calls run in session {self._row.name or self._row.id!r} or wait for it; wait for "
                "them, or cancel them",
                session=self._row.id,
                calls=inside,
            )
        self._turns.enter(self._row.id)

    def __exit__(self, *_: object) -> None:
        self._turns.leave(self._row.id)


def _checkpoint_info(one: Checkpoint, head: str) -> models.CheckpointInfo:
    return models.CheckpointInfo(
        id=one.id,
        parent=one.parent,
        digest=one.digest,
        size=one.size,
        inodes=one.inodes,
        created=one.created,
        call=one.call,
        head=one.id == head,
    )
