"""The journal's one writer: transactions on the event loop, syncs beside it.

Theory of operation: an operation is one transaction, written to the write-ahead log at once and without a
sync (``synchronous=NORMAL``), which is a copy to the page cache and takes a tenth of a millisecond. What has
to be durable then waits for a sync of the log, which the kernel does meanwhile (``kernel/filesync``); all
that was written before it began is durable when it ends, so a hundred calls that are accepted at once cost
one sync. That is what ``synchronous=FULL`` does in each commit, but for the event loop, which does not wait.
A thread moves the log into the database now and then. Only when all of it was moved is its file written from
the start again; where operations never leave a moment for that and it grows long, they wait for the thread.

After a sync that failed nothing is known of what the log has on disk, and no later sync would tell. So
nothing is written until a thread has written the log's bytes once more, synced them, and found that they are
those that were written (``wal``). Outcomes wait for that, for ``PATIENCE``; all else is refused.

Where an operation meets a damaged page it is undone, and run again if that could be mended (``mending``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import structlog

from sandboxd import errors
from sandboxd.failpoint import failpoint
from sandboxd.journal import chain, schema, wal
from sandboxd.journal.mending import Mending
from sandboxd.journal.output import sync_directory
from sandboxd.kernel.filesync import FileSync

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Transaction", "Writer"]

T = TypeVar("T")
EVERY = 128  # transactions between two moves of the log into the database
PAUSE = 0.02  # seconds until that begins: the answer that is due now comes first
AGAIN = 1.0  # seconds between two tries to write the log again
PATIENCE = 5.0  # seconds that outcomes wait for that before whoever waits for them is told
LONG = 32 << 20  # bytes of the log's file beyond which operations wait until all of it was moved

log = structlog.get_logger(__name__)


@dataclass
class Transaction:
    """What an operation acts on: the connection, and the head of the chain as this transaction leaves it."""

    connection: sqlite3.Connection
    head: chain.Head


class Writer:
    """Owns the writing connection. ``start`` and ``stop`` block; all else is for one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.mending = Mending(path)
        self._later: list[Callable[[Transaction], object]] = []
        """Operations that were posted while the database was being mended."""
        self._transaction: Transaction | None = None
        self._mover: sqlite3.Connection | None = None
        self._log = -1
        self._shared = -1
        """SQLite's shared memory. Whoever closes it gives up all locks that SQLite has on it in this process
        (fcntl(2)), and another process would take the database for one that nobody has open."""
        self._sync: FileSync | None = None
        self._written = 0
        self._moving: asyncio.Future[None] | None = None
        self._most = LONG
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._lost: str | None = None
        """Why it is not known what the log has on disk."""
        self._restoring: asyncio.Task[None] | None = None
        self._undo: list[Callable[[Transaction], object]] = []

    def start(self) -> None:
        """Open the database. Raises what ``schema.connect_writer`` does."""
        try:
            self._open()
        except errors.JournalCorrupt as error:
            if not self.mending.look():
                raise self.mending.named(error) from error.__cause__
            self._open()

    def _open(self) -> None:
        connection = schema.connect_writer(self._path)
        try:
            with schema.mapped():
                self._transaction = Transaction(connection, chain.read_head(connection))
                self._mover = schema.connect_mover(self._path)
            failpoint("journal.opened")
            self._log = os.open(f"{self._path}-wal", os.O_RDWR | os.O_CLOEXEC)
            self._shared = os.open(f"{self._path}-shm", os.O_RDONLY | os.O_CLOEXEC)
            sync_directory(self._path.parent)  # a sync of the log alone does not make its name durable
        except OSError as error:
            self.stop()
            raise errors.HostFailed(f"the journal's log cannot be opened: {error.strerror}") from error
        except BaseException:
            connection.close()
            raise

    @property
    def head(self) -> chain.Head:
        """The head of the chain, as the newest transaction left it."""
        return chain.Head(0, chain.GENESIS) if self._transaction is None else self._transaction.head

    def serve(self) -> None:
        """Take operations from the running event loop."""
        self._sync = FileSync(self._log)

    async def run(
        self,
        operation: Callable[[Transaction], T],
        *,
        durable: bool,
        patient: bool = False,
        undo: Callable[[Transaction], object] | None = None,
    ) -> T:
        """Run an operation, and wait until it is on disk if it is to be durable.

        What it raises undoes it. When it cannot be synced, ``undo`` is run as soon as anything can be; one
        that is ``patient`` waits for that moment instead, and is durable then. After ``PATIENCE`` it raises
        HostFailed all the same, and may have been written. A task that is cancelled here does not take its
        operation back.
        """
        await self._turn(patient=patient)
        if self._sync is None:
            raise errors.HostFailed("the journal is closed")
        result = await self._tried(operation)
        if durable:
            try:
                await self.synced()
            except errors.HostFailed:
                if undo is not None:
                    self._undo.append(undo)
                if not patient:
                    raise
                await self._restored(PATIENCE)
                if self._lost is not None:
                    raise
        return result

    async def _turn(self, *, patient: bool) -> None:
        """Wait until an operation may be written, or it is known that it cannot be."""
        while (
            self.mending.going or not self._may_write.is_set() or (patient and self._restoring is not None)
        ):  # again: another that waited may have filled the log
            if self.mending.going:
                await self.mending.ended()
                self._post_later()
            elif self._restoring is None:
                await self._may_write.wait()
            else:
                await self._restored(PATIENCE)
                if self._lost is not None:
                    break  # what is to be done says why it cannot be

    async def _tried(self, operation: Callable[[Transaction], T]) -> T:
        while True:
            times = self.mending.times
            try:
                return self._apply(operation)
            except errors.JournalCorrupt as error:
                if not await self.mending.mended(error, times):
                    raise self.mending.named(error) from error.__cause__
            await self.mending.ended()
            self._post_later()

    async def synced(self) -> None:
        """Wait until all that was written before is on disk."""
        if self._sync is None:
            raise errors.HostFailed("the journal is closed")
        try:
            failpoint("journal.sync")
            await self._sync.synced()
            failpoint("journal.synced")
        except OSError as error:
            if self._lost is None:
                self._lost = f"the journal could not be synced: {error.strerror}"
                self._restoring = asyncio.create_task(self._restore())
            raise errors.HostFailed(self._lost) from error

    async def _restored(self, seconds: float | None = None) -> None:
        if self._restoring is not None:
            await asyncio.wait({self._restoring}, timeout=seconds)

    async def _restore(self) -> None:
        """Write the log again until that reaches the disk; ``_lost`` stays if its bytes are gone."""
        log.error("nothing is accepted until the journal can be synced", reason=self._lost)
        try:
            if self._moving is not None:
                await self._moving
            while True:
                try:
                    intact = await asyncio.to_thread(wal.write_again, self._log, self._shared)
                    break
                except OSError as error:
                    log.warning("the journal still cannot be synced", reason=str(error))
                    await asyncio.sleep(AGAIN)
            if not intact:
                self._lost = (
                    "the host lost what was written to the journal's log; restart the daemon: it goes on "
                    "from what is on disk"
                )
                log.error("the journal's log is not what was written", reason=self._lost)
            elif self._sync is not None:
                self._sync.written_again()
                self._lost = None
                for undo in self._undo:
                    self.post(undo)
                log.warning("the journal is synced again")
        finally:
            self._undo.clear()
            self._restoring = None

    def post(self, operation: Callable[[Transaction], object]) -> None:
        """Run an operation; it is not durable yet, and its failure concerns nobody."""
        if self.mending.going:
            self._later.append(operation)
            return
        self._post_later()
        try:
            self._apply(operation)
        except errors.SandboxdError as error:
            log.warning("not written", reason=str(error))

    def _post_later(self) -> None:
        later, self._later = self._later, []
        for operation in later:
            self.post(operation)

    def _apply(self, operation: Callable[[Transaction], T]) -> T:
        transaction = self._transaction
        if transaction is None:
            raise errors.HostFailed("the journal is closed")
        if self._lost is not None:
            raise errors.HostFailed(self._lost)
        connection, before = transaction.connection, transaction.head
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = operation(transaction)
            failpoint("journal.commit")
            connection.execute("COMMIT")
        except BaseException as error:
            transaction.head = before
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise schema.error_of(error) from error
            if isinstance(error, OSError):
                raise errors.HostFailed(f"the journal cannot be written: {error.strerror}") from error
            raise
        failpoint("journal.committed")
        self._written += 1
        if os.fstat(self._log).st_size > self._most:
            self._may_write.clear()
            self._move_after(0)
        elif self._written >= EVERY:
            self._move_after(PAUSE)
        return result

    def _move_after(self, seconds: float) -> None:
        if self._moving is None:
            loop = asyncio.get_running_loop()
            self._moving = loop.create_future()
            loop.call_later(seconds, self._move, loop, 1)

    def _move(self, loop: asyncio.AbstractEventLoop, tries: int) -> None:
        self._written = 0
        thread = loop.run_in_executor(None, self._move_log)
        thread.add_done_callback(lambda done: self._moved(loop, tries, whole=done.result()))

    def _move_log(self) -> bool:
        """Whether nothing is left that was written meanwhile."""
        if self._mover is None:
            return False
        try:
            failpoint("journal.move")
            _, pages, moved = self._mover.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            failpoint("journal.moved")
        except (sqlite3.Error, OSError) as error:  # it is tried again, and commits say what is wrong
            log.warning("the journal's log was not moved into the database", reason=str(error))
            return False
        return bool(pages == moved)

    def _moved(self, loop: asyncio.AbstractEventLoop, tries: int, *, whole: bool) -> None:
        if not self._may_write.is_set():
            if not whole and tries:  # it had begun before operations waited
                self._move(loop, tries - 1)
                return
            # its file does not shrink; and where somebody reads an old state for long it has to grow
            self._most = max(LONG, os.fstat(self._log).st_size + (0 if whole else LONG))
            self._may_write.set()
        moving, self._moving = self._moving, None
        if moving is not None and not moving.done():
            moving.set_result(None)

    async def rest(self) -> None:
        """Take nothing more, and wait for what goes on beside the event loop."""
        await self.mending.ended()
        self._post_later()
        if self._restoring is not None:
            self._restoring.cancel()
            await self._restored()
        sync, self._sync = self._sync, None
        if sync is not None:
            with contextlib.suppress(OSError):  # it was told to those who wait for it
                await sync.synced()
            sync.close()
        if self._moving is not None:
            await self._moving

    def stop(self) -> None:
        """Close the database, which moves the whole log into it."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        if self._mover is not None:
            self._mover.close()
            self._mover = None
        if self._transaction is not None:
            self._transaction.connection.close()
            self._transaction = None
        if self._shared >= 0:
            os.close(self._shared)
            self._shared = -1
