"""The containers that sessions keep, between calls: their checkpoints, and how they end.

Theory of operation.  What calls change in a kept container (``keeping``) is in that alone. A checkpoint of
it, and its end, wait for their turn as a call does. At the end its files come first: that the session
stands on them, and that it keeps no container, come about in one transaction; then everything in it is
killed. What cannot be kept so is lost, and the session says it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors, models
from sandboxd.workspace import containers, tables

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from sandboxd.api.identity import Caller
    from sandboxd.holds import Holds
    from sandboxd.journal import Journal
    from sandboxd.keeping import Keeping, Live
    from sandboxd.session import CallSession
    from sandboxd.workspace.tables import Row

__all__ = ["SessionContainers"]

END_AGAIN = 60.0  # seconds until it is tried again to end a container
LAST_CHECKPOINTS = 60.0  # seconds, of all containers, at the end of the daemon
LAST_AT_ONCE = 8

log = structlog.get_logger("sandboxd.sessions")


def _now() -> int:
    return time.time_ns() // 1000


def _nothing(_: sqlite3.Connection) -> None:
    """Nothing comes about beside it."""


class SessionContainers:
    """For one event loop. ``wake`` is called when there is something to do in ``look_after``."""

    def __init__(self, journal: Journal, holds: Holds, keeping: Keeping, wake: Callable[[], None]) -> None:
        self._journal = journal
        self._holds = holds
        self._keeping = keeping
        self._wake = wake
        self._is_starved = False

    async def open(self) -> None:
        """What an earlier daemon did not end is lost. Raises HostFailed, JournalCorrupt."""
        lost = await self._journal.write(
            lambda connection: containers.lose_all(
                connection, _now(), "the daemon ended, and with it the container"
            )
        )
        if lost:
            log.warning("containers that sessions kept are lost", count=lost)

    async def close(self) -> None:
        """End what is there still, without its files: whose it was is told so by the next daemon."""
        for live in self._keeping:
            try:
                await self._keeping.end(live, "the daemon ended")
            except errors.SandboxdError:
                log.exception("a container of a session was not cleared away", session=live.session)

    def starve(self) -> None:
        """A call cannot start beside what containers hold that no call is in."""
        self._is_starved = True
        self._wake()

    def refuse(self, session: str, named: str) -> None:
        """Raise ContainerLive where a session keeps one, whose files nobody else may change."""
        self._keeping.refuse(session, named)

    async def end_of(self, session: str, why: str) -> None:
        """End the one of a session that is no more."""
        if (live := self._keeping.of(session)) is not None:
            await self._keeping.end(live, why)

    # What callers ask for.

    async def checkpoint(self, caller: Caller, named: str) -> models.CheckpointInfo:
        """A checkpoint of the files in the container that a session keeps; it waits for its turn.

        Where nothing has changed, the one that there is. Raises NotFound, StateConflict where it keeps none,
        QuotaExceeded, WorkspaceUnfit, HostFailed; then nothing has changed.
        """
        row = await self._holds.find(caller, named)
        hold = self._holds.of(row, self._live(row).share, None)
        try:
            await hold.begin()
            live = self._live(row)  # it may have ended meanwhile
            if live.commit == "never":
                raise errors.StateConflict(
                    f"policy {live.shape.policy!r} keeps no files: it says `commit: never`", session=row.id
                )
            at = await self._take(hold, live)
        finally:
            hold.leave()
        found = await self._journal.read(lambda connection: tables.checkpoint(connection, at))
        if found is None:
            raise errors.NotFound(f"the checkpoint of session {named!r} was removed")
        return found.info(at)

    async def end(self, row: Row, *, discard: bool) -> None:
        """End the container that a session keeps, after a checkpoint of its files, unless they are discarded.

        Where one was lost, that is acknowledged. Raises SessionBusy, StateConflict where it keeps none, and
        what ``checkpoint`` does; then the container is there as before.
        """
        async with self._holds.alone(row):
            if self._keeping.of(row.id) is None and await self._has_lost(row.id):
                await self._journal.write(lambda connection: containers.forget(connection, row.id))
            else:
                await self._end(self._live(row), discard=discard, why="its session ended it")

    async def end_all(self) -> None:
        """End all that are kept, at the end of the daemon. What cannot be checkpointed is lost."""

        async def end(live: Live) -> None:
            try:
                async with at_once:
                    await self._end(live, discard=False, why="the daemon was stopped")
            except errors.SandboxdError:
                log.exception("a container's files were not kept", session=live.session)

        at_once = anyio.CapacityLimiter(LAST_AT_ONCE)
        with anyio.move_on_after(LAST_CHECKPOINTS):
            async with anyio.create_task_group() as tasks:
                for live in self._keeping:
                    tasks.start_soon(end, live)

    def _live(self, row: Row) -> Live:
        live = self._keeping.of(row.id)
        if live is None:
            raise errors.StateConflict(
                f"session {row.name or row.id!r} keeps no container; a call in it under a policy with "
                "`isolation: session` makes one",
                session=row.id,
            )
        return live

    async def _has_lost(self, session: str) -> bool:
        return await self._journal.read(lambda connection: containers.find(connection, session)) is not None

    async def _take(
        self, hold: CallSession, live: Live, also: Callable[[sqlite3.Connection], None] = _nothing
    ) -> str:
        """Checkpoint a container, in its session's turn; returns where the session stands then."""

        def write(connection: sqlite3.Connection) -> None:
            hold.commit(connection)
            also(connection)

        try:
            at = await anyio.to_thread.run_sync(hold.keep_of, live)
            with anyio.CancelScope(shield=True):  # what is on disk is also told
                await self._journal.write(write, undo=hold.undo())
                hold.committed()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await hold.abandon()
            raise
        return at

    async def _end(self, live: Live, *, discard: bool, why: str, unused: bool = False) -> None:
        """End a container in its session's turn; what it raises leaves it as it was.

        ``unused``: not if a call is in it, or waits for it.
        """
        row = await self._journal.read(lambda connection: tables.find(connection, live.session, None))
        if row is None:
            await self._keeping.end(live, why)
            return
        if unused and self._holds.turns.inside(live.session):
            return
        hold = self._holds.of(row, live.share, None)
        try:
            await hold.begin()
            if self._keeping.of(row.id) is not live:
                return
            if discard or live.commit == "never":
                await self._journal.write(lambda connection: containers.forget(connection, row.id))
            else:
                await self._take(hold, live, lambda connection: containers.forget(connection, row.id))
            with anyio.CancelScope(shield=True):
                await self._keeping.end(live, why)
        finally:
            hold.leave()

    async def look_after(self) -> None:
        """End those that are idle for too long, and note those that have ended themselves.

        Where a call cannot start beside what they hold, the one that was not used for longest ends too.
        """
        unused = [live for live in self._keeping if not self._holds.turns.inside(live.session)]
        starving = min(unused, key=lambda live: live.since_used, default=None) if self._is_starved else None
        self._is_starved = False
        for live in unused:
            if self._holds.turns.inside(live.session):
                continue
            try:
                if not live.kept.alive:
                    await self._lose(live, "it ended while no call was in it")
                elif live.idle or live is starving:
                    await self._end(live, discard=False, why="it was not used for so long", unused=True)
            except (errors.QuotaExceeded, errors.WorkspaceUnfit) as error:
                why = f"it was not used for so long, and its files could not be kept: {error}"
                await self._lose(live, why)
            except errors.SandboxdError:  # the disk may be full: there may be room later
                log.exception("a container that is not used cannot be ended yet", session=live.session)
                live.since_used += END_AGAIN

    async def _lose(self, live: Live, why: str) -> None:
        if self._holds.turns.inside(live.session):
            return  # whoever is in there finds it, or it is looked at again
        lost = live.entry.lost(_now(), why)
        self._holds.turns.enter(live.session)
        try:
            await self._holds.turns.take(live.session)
            try:
                if self._keeping.of(live.session) is live:
                    await self._journal.write(
                        lambda connection: containers.lose(connection, live.session, lost)
                    )
                    await self._keeping.end(live, why)
            finally:
                self._holds.turns.give(live.session)
        finally:
            self._holds.turns.leave(live.session)

    async def info(self, session: str) -> models.SessionContainer | None:
        """What is told of the one of a session, or of one that it has lost."""
        if (live := self._keeping.of(session)) is not None:
            return live.info()
        lost = await self._journal.read(lambda connection: containers.find(connection, session))
        if lost is None:
            return None
        return models.SessionContainer(
            state="lost", since=lost.since, policy=lost.policy, calls=lost.calls, lost=lost
        )
