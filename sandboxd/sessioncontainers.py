"""The containers that sessions keep, between calls: their checkpoints, and how they end.

Theory of operation.  What calls change in a kept container (``keeping``) is in that alone. A checkpoint of
it, and its end, wait for their turn as a call does. At the end its files come first: that the session
stands on them, and that it keeps no container, come about in one transaction; then everything in it is
killed. What cannot be kept so is lost, and the session says it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors, models
from sandboxd.failpoint import failpoint
from sandboxd.workspace import containers, tables

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from anyio.abc import TaskGroup

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

DIED = "it ended while no call was in it"

Files = Literal["kept", "kept or lost", "discarded"]
"""What becomes of a container's files at its end; "kept": or it does not end."""

log = structlog.get_logger("sandboxd.sessions")


def _now() -> int:
    return time.time_ns() // 1000


class SessionContainers:
    """For one event loop. ``wake`` is called when there is something to do in ``look_after``."""

    def __init__(self, journal: Journal, holds: Holds, keeping: Keeping, wake: Callable[[], None]) -> None:
        self._journal = journal
        self._holds = holds
        self._keeping = keeping
        self._wake = wake
        self._is_starved = False
        keeping.salvage = self._salvage
        self.tasks: TaskGroup | None = None
        """Where ends wait for their turn; None: nobody looks after them."""

    async def open(self) -> None:
        """What an earlier daemon did not end is lost. Raises HostFailed, JournalCorrupt."""
        lost = await self._journal.write(
            lambda connection: containers.lose_all(
                connection, _now(), "the daemon ended, and with it the container"
            )
        )
        if lost:
            failpoint("container.lost")
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
            await hold.take_turn()
            await hold.stand()
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
                await self._end(self._live(row), "its session ended it", "discarded" if discard else "kept")

    async def end_all(self) -> None:
        """End all that are kept, at the end of the daemon. What cannot be checkpointed is lost."""

        async def end(live: Live) -> None:
            try:
                async with at_once:
                    await self._end(live, "the daemon was stopped", "kept")
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
        self, hold: CallSession, live: Live, *, last: Callable[[sqlite3.Connection], None] | None = None
    ) -> str:
        """Checkpoint a container, in its session's turn; returns where the session stands then.

        ``last`` says in the same transaction that the session keeps it no more.
        """
        try:
            at = await anyio.to_thread.run_sync(hold.keep_of, live)
            undo = hold.undo()

            def write(connection: sqlite3.Connection) -> None:
                hold.commit(connection)
                if last is not None:
                    last(connection)

            def take_back(connection: sqlite3.Connection) -> None:
                undo(connection)
                if last is not None:
                    containers.note(connection, live.session, live.entry)

            with anyio.CancelScope(shield=True):  # what is on disk is also told
                await self._journal.write(write, undo=take_back)
                hold.committed()
                live.layer = hold.written or live.layer
        except BaseException:
            with anyio.CancelScope(shield=True):
                await hold.abandon()
            raise
        return at

    async def _end(self, live: Live, why: str, files: Files, *, unused: bool = False) -> None:
        """End a container in its session's turn; what it raises leaves it as it was.

        ``unused``: not if a call is in it, or waits for it; else before those that wait.
        """
        row = await self._journal.read(lambda connection: tables.find(connection, live.session, None))
        if row is None:
            await self._keeping.end(live, why)
            return
        if unused and self._holds.turns.inside(live.session):
            return
        hold = self._holds.of(row, live.share, None)
        with self._holds.briefly(row.id):
            try:
                await hold.take_turn(first=True)
                await hold.stand()
                if self._keeping.of(row.id) is live:
                    await self._end_now(hold, live, why, files)
            finally:
                hold.leave()

    async def _end_now(self, hold: CallSession, live: Live, why: str, files: Files) -> None:
        # by itself: that is told to the session's next call, whatever becomes of the files
        died = files == "kept or lost" and not live.kept.alive
        why = DIED if died else why
        if died and live.commit == "never":
            await self._lose(live, why)
        elif files == "discarded" or live.commit == "never":
            await self._forget(live)
        else:
            try:
                await self._take(hold, live, last=self._kept(live, why) if died else self._ended(live))
            except (errors.QuotaExceeded, errors.WorkspaceUnfit) as error:
                if files == "kept":
                    raise
                await self._lose(live, f"{why}, and its files could not be kept: {error}")
        failpoint("container.ended")
        try:
            with anyio.CancelScope(shield=True):
                await self._keeping.end(live, why)
        except errors.SandboxdError:
            if not died:
                raise
            # whatever ended it, such as its engine, may be away: the call after it needs its files alone
            log.exception("a container of a session was not cleared away", session=live.session)

    async def _salvage(self, live: Live) -> None:
        """Keep what one has that has died, and take it away, in the turn of whoever asks.

        Raises HostFailed, JournalCorrupt, Corrupt; then it is there as before.
        """
        row = await self._journal.read(lambda connection: tables.find(connection, live.session, None))
        if row is None:
            await self._keeping.end(live, DIED)
            return
        hold = self._holds.of(row, live.share, None)
        try:
            await hold.stand()
            await self._end_now(hold, live, DIED, "kept or lost")
        finally:
            hold.leave()

    @staticmethod
    def _ended(live: Live) -> Callable[[sqlite3.Connection], None]:
        return lambda connection: containers.forget(connection, live.session)

    @staticmethod
    def _kept(live: Live, why: str) -> Callable[[sqlite3.Connection], None]:
        lost = live.entry.lost(_now(), f"{why}; its files were kept")
        return lambda connection: containers.lose(connection, live.session, lost)

    async def _forget(self, live: Live) -> None:
        await self._journal.write(
            self._ended(live),
            undo=lambda connection: containers.note(connection, live.session, live.entry),
        )

    async def _lose(self, live: Live, why: str) -> None:
        lost = live.entry.lost(_now(), why)
        await self._journal.write(
            lambda connection: containers.lose(connection, live.session, lost),
            undo=lambda connection: containers.note(connection, live.session, live.entry),
        )

    async def look_after(self) -> None:
        """End those that are idle for too long or have had their time, and note those that have ended.

        Where a call cannot start beside what they hold, the one that was not used for longest ends too.
        """
        for live in self._keeping:
            if live.over and not live.spared and not live.ending and self.tasks is not None:
                live.ending = True  # a call may be in it for long, and the others are looked after meanwhile
                self.tasks.start_soon(self._end_in_turn, live)
        unused = [live for live in self._keeping if self._is_unused(live)]
        starving = min(unused, key=lambda live: live.since_used, default=None) if self._is_starved else None
        self._is_starved = False
        for live in unused:
            if not live.kept.alive:
                await self._try(live, DIED, "kept or lost", unused=True)
            elif live.idle or live is starving:
                await self._try(live, "it was not used for so long", "kept or lost", unused=True)

    def _is_unused(self, live: Live) -> bool:
        return not live.ending and not live.spared and not self._holds.turns.inside(live.session)

    async def _end_in_turn(self, live: Live) -> None:
        try:
            await self._try(live, "it had lived for as long as it may", "kept or lost")
        except Exception:
            log.exception("a container could not be ended", session=live.session)
        finally:
            live.ending = False

    async def _try(self, live: Live, why: str, files: Files, *, unused: bool = False) -> None:
        try:
            await self._end(live, why, files, unused=unused)
        except errors.SandboxdError:  # the disk may be full: there may be room later
            log.exception("a container cannot be ended yet", session=live.session)
            live.spared_until = time.monotonic() + END_AGAIN

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
