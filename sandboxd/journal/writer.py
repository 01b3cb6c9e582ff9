"""The journal's one writer: a thread that turns everything waiting into one transaction.

Theory of operation: operations arrive in order on a queue. The thread takes all that wait, up to a
batch, runs each in a savepoint of one transaction, commits once (``synchronous=FULL`` if any of them
has to be durable, else ``NORMAL``, which in WAL mode does not wait for the disk), and only then tells
the waiting tasks. So a hundred calls that are accepted at once cost one sync. What nobody waits for
waits itself for something to be committed with, for a moment. An operation that fails undoes its
savepoint and nothing else; a commit that fails fails all of its batch. The log is moved into the database
between commits (``_checkpoint``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sandboxd import errors
from sandboxd.journal import chain, schema

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Operation", "Transaction", "Writer"]

T = TypeVar("T")
_BATCH = 512
EVERY = 128  # commits between two moves of the log into the database, when nobody waits
GROWTH = 64 << 20  # bytes that the log grows until it is moved whoever waits; then its file is used again
_PATIENCE = 0.05  # seconds that operations wait for a batch when nobody waits for them


@dataclass
class Transaction:
    """What an operation acts on: the connection, and the head of the chain as this batch leaves it."""

    connection: sqlite3.Connection
    head: chain.Head


Operation = Callable[[Transaction], Any]


@dataclass(frozen=True)
class _Job:
    operation: Operation
    durable: bool
    single: bool
    loop: asyncio.AbstractEventLoop | None
    future: asyncio.Future[Any] | None


class Writer:
    """Owns the writing connection and its thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = f"{path}-wal"
        self._since = self._size = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal-writer", daemon=True)
        self._opened: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._closed = False

    def start(self) -> None:
        """Open the database in the thread; blocks. Raises what ``schema.connect_writer`` does."""
        self._thread.start()
        error = self._opened.get()
        if error is not None:
            self._thread.join()
            raise error

    async def run(self, operation: Callable[[Transaction], T], *, durable: bool, single: bool = False) -> T:
        """Run an operation and wait until its batch is committed.

        ``single``: it is one statement, which alone needs no transaction around it. A task that is cancelled
        here does not take its operation back.
        """
        if self._closed:
            raise errors.HostFailed("the journal is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(operation, durable, single, loop, future))
        return await future

    def post(self, operation: Operation) -> None:
        """Run an operation in its turn; nobody waits for it, and its failure concerns nobody."""
        self._jobs.put(_Job(operation, durable=False, single=False, loop=None, future=None))

    def stop(self) -> None:
        """Commit what waits, close the database and end the thread; blocks."""
        self._closed = True
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            connection = schema.connect_writer(self._path)
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that started this one
            self._opened.put(error)
            return
        try:
            with schema.mapped():
                head = chain.read_head(connection)
        except errors.SandboxdError as error:
            connection.close()
            self._opened.put(error)
            return
        self._opened.put(None)
        try:
            self._serve(connection, Transaction(connection, head))
        finally:
            self._closed = True
            connection.close()
            self._abandon()

    def _serve(self, connection: sqlite3.Connection, transaction: Transaction) -> None:
        durable = True
        ended = False
        while not ended:
            jobs, ended = self._take()
            if not jobs:
                continue
            wanted = any(job.durable for job in jobs)
            results: list[tuple[_Job, Any, BaseException | None]]
            before = transaction.head
            try:
                if wanted != durable:
                    connection.execute(f"PRAGMA synchronous = {'FULL' if wanted else 'NORMAL'}")
                    durable = wanted
                if len(jobs) == 1:
                    results = [self._apply_alone(jobs[0], transaction)]
                else:
                    connection.execute("BEGIN IMMEDIATE")
                    results = [self._apply(job, transaction) for job in jobs]
                    connection.execute("COMMIT")
            except sqlite3.Error as error:
                transaction.head = before
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                failure = schema.error_of(error)
                results = [(job, None, failure) for job in jobs]
            self._tell(results)
            self._checkpoint(connection)

    def _checkpoint(self, connection: sqlite3.Connection) -> None:
        """Move the log into the database: not in a commit, for which somebody waits."""
        self._since += 1
        try:
            size = os.stat(self._log).st_size  # noqa: PTH116  (after each commit)
            if (self._since >= EVERY and self._jobs.empty()) or size > self._size + GROWTH:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
                self._since, self._size = 0, size
        except (OSError, sqlite3.Error):
            return  # it is tried again after the next commit, which says what is wrong

    def _abandon(self) -> None:
        """Nobody waits for ever for a thread that has ended."""
        failure = errors.HostFailed("the journal is closed")
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    self._tell([(job, None, failure)])

    def _take(self) -> tuple[list[_Job], bool]:
        """Everything that waits, and whether the end was among it."""
        jobs: list[_Job] = []
        job = self._jobs.get()
        until = time.monotonic() + _PATIENCE
        awaited = False
        while job is not None:
            jobs.append(job)
            awaited = awaited or job.future is not None
            if len(jobs) == _BATCH:
                return jobs, False
            try:
                job = self._jobs.get(timeout=0 if awaited else max(0.0, until - time.monotonic()))
            except queue.Empty:
                return jobs, False
        return jobs, True

    @staticmethod
    def _apply_alone(job: _Job, transaction: Transaction) -> tuple[_Job, Any, BaseException | None]:
        """A batch of one: each statement less is a turn less at the interpreter's lock."""
        before, connection = transaction.head, transaction.connection
        try:
            if not job.single:
                connection.execute("BEGIN IMMEDIATE")
            result = job.operation(transaction)
            if not job.single:
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            failure: BaseException = schema.error_of(error)
        except Exception as error:  # noqa: BLE001 - it is given to the task that asked for the operation
            failure = error
        else:
            return job, result, None
        transaction.head = before
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        return job, None, failure

    @staticmethod
    def _apply(job: _Job, transaction: Transaction) -> tuple[_Job, Any, BaseException | None]:
        before = transaction.head
        transaction.connection.execute("SAVEPOINT operation")
        try:
            result = job.operation(transaction)
        except sqlite3.Error as error:
            if not transaction.connection.in_transaction:
                raise  # a full disk and its like roll everything back: lang_transaction.html, section 3
            failure: BaseException = schema.error_of(error)
        except Exception as error:  # noqa: BLE001 - it is given to the task that asked for the operation
            failure = error
        else:
            transaction.connection.execute("RELEASE operation")
            return job, result, None
        transaction.head = before
        transaction.connection.execute("ROLLBACK TO operation")
        transaction.connection.execute("RELEASE operation")
        return job, None, failure

    @staticmethod
    def _tell(results: list[tuple[_Job, Any, BaseException | None]]) -> None:
        loops = {job.loop for job, _, _ in results if job.loop is not None}
        for loop in loops:
            mine = [
                (job.future, result, error)
                for job, result, error in results
                if job.loop is loop and job.future is not None
            ]
            with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                loop.call_soon_threadsafe(_resolve, mine)


def _resolve(results: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, result, error in results:
        if future.done():
            continue  # cancelled
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
