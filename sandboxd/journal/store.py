"""The journal: what was accepted, how it ended, and what was refused.

Theory of operation: one SQLite database in WAL mode in the state directory, which a lock holds for one
daemon. Writes go to the log from the event loop and are synced beside it (``writer``), reads go through two
threads with connections of their own, so the event loop never waits for a disk. An invocation has a row that
follows its state; when it ends, the row takes its final form and a record joins the chain (``chain``), in one
transaction, once. Whatever this returns from has happened: acceptance and outcome are on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import structlog

from sandboxd import canonical, errors, models
from sandboxd.blobs import BlobStore
from sandboxd.failpoint import failpoint
from sandboxd.journal import chain, records, requests, rows, schema, signing, upkeep, verify
from sandboxd.journal.ids import Ids, largest
from sandboxd.journal.lock import Lock
from sandboxd.journal.output import sync_directory
from sandboxd.journal.writer import Transaction, Writer

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

__all__ = ["Journal"]

T = TypeVar("T")
log = structlog.get_logger(__name__)
KEPT_REFUSALS = 10_000
SOURCE = "#source"
"""After the digest of a policy: the key of what makes that policy again."""
SIGN_RECORDS = 1000
SIGN_SECONDS = 600.0
SIGN_CHECK = 5.0
_PRUNE_EVERY = 100
_READERS = 2


class Journal:
    """An async context manager. All times are microseconds since the epoch.

    Each method raises HostFailed when the database cannot be written or read (no space, an I/O error)
    and JournalCorrupt when it is damaged. A task that is cancelled in a writing method does not take
    the write back.
    """

    def __init__(self, state_dir: Path, key: signing.KeyPlace) -> None:
        self._directory = state_dir
        self._place = key
        self._key: signing.NodeKey | None = None
        self._signed = (0, 0)
        self._kept: set[str] = set()
        self._path = state_dir / "journal.sqlite3"
        self._writer = Writer(self._path)
        self._ids = Ids()
        self._readers: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock: Lock | None = None

    @classmethod
    def open(cls, state_dir: Path, key: signing.KeyPlace | None = None) -> Self:
        """A journal in this directory, which is made if it is missing; use it with ``async with``.

        ``key`` is where the key is that heads are signed with; without it, the directory's own. Entering
        raises ConfigInvalid when another daemon uses the directory, a newer version wrote the journal, or
        the key cannot be used.
        """
        return cls(state_dir, key or signing.place_of(None, state_dir, {}))

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._start)
        self._writer.serve()
        try:
            self._ids.after(await self._read(largest))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(errors.SandboxdError):  # what keeps it from being written was told before
            await self.sign_head()
        await self._close()

    async def _close(self) -> None:
        await self._writer.rest()
        await asyncio.to_thread(self._stop)

    def _start(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(self._directory.parent)  # it may have been made a moment ago
            self._lock = Lock(self._directory / "lock")
        except OSError as error:
            raise errors.ConfigInvalid(
                f"the state directory {self._directory} cannot be used: {error.strerror}"
            ) from error
        try:
            self._key = signing.NodeKey.open(self._place)
            self._key.publish(self._directory)
            self._writer.start()
        except BaseException:
            self._lock.release()
            raise
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="journal-reader")

    def _stop(self) -> None:
        if self._readers is not None:
            self._readers.shutdown()
        for connection in self._connections:
            connection.close()
        self._writer.stop()
        if self._lock is not None:
            self._lock.release()

    def new_id(self) -> str:
        """An id for a call, a session or a checkpoint, larger than all that are in the journal."""
        return self._ids.new()

    async def accept(self, record: records.Accepted) -> records.Existing | None:
        """Record an acceptance, durably, unless the caller's key stands for this request already.

        Returns None when this call is the new one, else the call that the key stands for (running or
        ended). Race-free: of many at once with one key, one gets None. Raises KeyConflict when the key
        was used with another request.
        """
        invocation = record.invocation
        row = self._row(invocation)

        def operation(transaction: Transaction) -> records.Existing | None:
            if invocation.key is not None:
                found = rows.find_key(transaction.connection, invocation.caller.uid, invocation.key)
                if found is not None and found.request_digest != record.request_digest:
                    raise rows.conflict(transaction.connection, found, record.request)
                if found is not None:
                    return found
            transaction.connection.execute(
                "INSERT INTO invocations (uid, key, request_digest, state, policy, cause, doc, id)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (invocation.caller.uid, invocation.key, record.request_digest, *row),
            )
            if invocation.labels:
                transaction.connection.executemany(
                    "INSERT INTO labels (name, value, id) VALUES (?, ?, ?)",
                    [(name, value, invocation.id) for name, value in invocation.labels.items()],
                )
            if record.request is not None and record.open is not None:
                requests.write(transaction.connection, record.request, record.open, record.callback)
            failpoint("accept.write")
            return None

        def undo(transaction: Transaction) -> None:
            """Whoever asked was told that it is not accepted."""
            for table in ("callbacks", "queue", "request_blobs", "requests", "labels", "invocations"):
                transaction.connection.execute(f"DELETE FROM {table} WHERE id = ?", (invocation.id,))  # noqa: S608

        found = await self._writer.run(operation, durable=True, undo=undo)
        failpoint("accept.durable")
        return found

    async def conflict(self, existing: records.Existing, request: requests.Asked) -> errors.KeyConflict:
        """The refusal of a request whose key stands for another one, which says in what they differ."""
        return await self._read(lambda connection: rows.conflict(connection, existing, request))

    async def find_key(self, uid: int, key: str) -> records.Existing | None:
        """The call that a caller's key stands for, if any; its acceptance is on disk."""
        found = await self._read(lambda connection: rows.find_key(connection, uid, key))
        if found is not None:
            await self._writer.synced()  # it may have been written a moment ago
        return found

    def follow(self, invocation: models.Invocation, *, memory: int | None = None) -> None:
        """Keep the state of a call that has not ended; waits for nothing and is not durable.

        ``memory`` is what a call that rests will hold in its next attempt, if that is not as before.
        If the daemon dies at once the call is still there, as an earlier state of it.
        """
        row = self._row(invocation)
        resting = invocation.state is models.State.QUEUED and invocation.attempts > 0

        def operation(transaction: Transaction) -> None:
            transaction.connection.execute(
                "UPDATE invocations SET state = ?, policy = ?, cause = ?, doc = ?"
                " WHERE id = ? AND state != 'ended'",
                row,
            )
            if resting:
                transaction.connection.execute(
                    "UPDATE queue SET resting = 1, memory = coalesce(?, memory) WHERE id = ?",
                    (memory, invocation.id),
                )

        self._writer.post(operation)

    async def started(self, id_: str, attempts: int) -> None:
        """Record, durably, that so many attempts of a call were given a container."""

        def operation(transaction: Transaction) -> None:
            transaction.connection.execute(
                "UPDATE queue SET started = ?, resting = 0 WHERE id = ?", (attempts, id_)
            )

        await self._writer.run(operation, durable=True)
        failpoint("attempt.durable")

    async def request(self, id_: str) -> models.Request:
        """What was asked for a call, its contents included; for who runs it later, or again.

        Raises NotFound for a call that is not known, was accepted by a version that did not keep it, or whose
        contents were pruned; JournalCorrupt when it, or a content of it, is not what its digest says.
        """
        found = await self._read(lambda connection: requests.read(connection, id_))
        if found is None:
            raise errors.NotFound(f"what was asked for call {id_!r} is not in the journal")
        blobs = BlobStore(self._directory / "blobs")
        return await asyncio.to_thread(requests.rebuild, found, blobs)

    async def ended(
        self,
        invocation: models.Invocation,
        header: dict[str, Any],
        *,
        also: Callable[[sqlite3.Connection], None] | None = None,
        output: bytes | None = None,
    ) -> chain.Head:
        """Record an outcome, durably, and chain its record; returns the new head.

        ``also`` is what comes about with it, in the same transaction, or not at all.
        ``output`` is the copy of its spool, where that is not on disk yet (``behind``).

        ``header`` is ``records.outcome_header``'s. Raises StateConflict for a call that has another outcome
        already, NotFound for one that was never accepted. After HostFailed it may have been written, and not
        synced: the same again is recorded once.
        """
        if invocation.state is not models.State.ENDED or invocation.outcome is None:
            raise ValueError("only an ended invocation with an outcome can be recorded as ended")
        row = self._row(invocation)

        def operation(transaction: Transaction, *, indexed: bool = True) -> chain.Head:
            changed = transaction.connection.execute(
                "UPDATE invocations SET state = ?, policy = ?, cause = ?, doc = ?"
                " WHERE id = ? AND state != 'ended'",
                row,
            ).rowcount
            if changed != 1:
                rows.check_same(transaction.connection, invocation.id, row[3])
                return transaction.head
            if also is not None:
                also(transaction.connection)
            transaction.connection.execute("DELETE FROM queue WHERE id = ?", (invocation.id,))
            transaction.head = chain.append(
                transaction.connection, transaction.head, header, row[3], indexed=indexed
            )
            if output is not None:
                transaction.connection.execute(
                    "INSERT INTO unsynced (id, files) VALUES (?, ?)", (invocation.id, output)
                )
            failpoint("outcome.write")
            if invocation.artifacts:
                transaction.connection.executemany(
                    "INSERT OR IGNORE INTO artifacts (digest, id, size) VALUES (?, ?, ?)",
                    [(file.digest, invocation.id, file.size) for file in invocation.artifacts],
                )
            return transaction.head

        try:
            head = await self._writer.run(operation, durable=True, patient=True)
        except errors.JournalCorrupt:
            if invocation.session is None:
                raise
            # the index of sessions can be made again, an outcome cannot
            unindexed = partial(operation, indexed=False)
            head = await self._writer.run(unindexed, durable=True, patient=True)
            log.error("the index of sessions is damaged", session=invocation.session, record=head.n)  # noqa: TRY400
        failpoint("outcome.durable")
        return head

    async def get(self, id_: str) -> models.Invocation | None:
        """An invocation as it stands. The heads of its streams are empty here: its spool has them.

        One that was pruned is what its header still knows, with ``pruned``.
        """
        return await self._read(lambda connection: rows.get(connection, id_))

    async def in_flight(self) -> list[models.Invocation]:
        """Calls that were accepted and have no outcome, oldest first; for the start of a daemon."""
        return await self._read(rows.in_flight)

    async def open_calls(self) -> list[requests.Open]:
        """The same calls, by what the queue has to know of them: of a long queue nothing else is read."""
        return await self._read(requests.open_calls)

    async def owed(self) -> list[requests.Owed]:
        """Who has to be told of a call's end, in any state of it."""
        return await self._read(requests.owed)

    async def tried(self, id_: str, tries: int, *, done: int | None, problem: str | None) -> None:
        """Who had to be told of a call's end was, in so many tries, or has a problem; not durable.

        ``done``: when nothing more is tried.
        """
        row = (tries, done, problem, id_)
        await self._writer.run(
            lambda transaction: transaction.connection.execute(
                "UPDATE callbacks SET tries = ?, done = ?, problem = ? WHERE id = ?", row
            ),
            durable=False,
        )

    async def callback(self, id_: str) -> models.CallbackState | None:
        """What became of the callback of a call, if it has one."""
        return await self._read(lambda connection: requests.callback_of(connection, id_))

    async def refused(self, refusal: records.Refusal) -> None:
        """Keep a refusal. The newest ``KEPT_REFUSALS`` are kept; not durable against power loss."""
        row = refusal.row()

        def operation(transaction: Transaction) -> None:
            number = transaction.connection.execute(
                "INSERT INTO refusals (at, uid, code, detail, request) VALUES (?, ?, ?, ?, ?)", row
            ).lastrowid
            if number is not None and number % _PRUNE_EVERY == 0:
                transaction.connection.execute("DELETE FROM refusals WHERE n <= ?", (number - KEPT_REFUSALS,))

        await self._writer.run(operation, durable=False)

    async def refusals(self, limit: int = 100) -> list[records.Refusal]:
        """The newest refusals, newest first; at most ``rows.MAX_LIST``."""

        def read(connection: sqlite3.Connection) -> list[records.Refusal]:
            found = connection.execute(
                "SELECT at, uid, code, detail, request FROM refusals ORDER BY n DESC LIMIT ?",
                (max(1, min(limit, rows.MAX_LIST)),),
            )
            return [records.Refusal(*row) for row in found]

        return await self._read(read)

    async def verify(self, head: str | None = None, *, deep: bool = False) -> verify.VerifyReport:
        """Check the whole chain, and that an exported head is in it. Raises InvalidRequest for no head."""
        keys = {self.key.id}
        keys |= {signing.key_id(key) for key in await asyncio.to_thread(signing.known, self._directory)}
        place = self._directory if deep else None
        return await self._read(lambda connection: verify.verify(connection, head, keys=keys, deep=place))

    async def head(self) -> chain.Head:
        """The newest record's number and digest; ``str()`` of it is what ``verify`` takes."""
        return await self._read(chain.read_head)

    @property
    def key(self) -> signing.NodeKey:
        """What heads are signed with."""
        if self._key is None:
            raise errors.HostFailed("the journal is not open")
        return self._key

    @property
    def count(self) -> int:
        """How many records there are, as the newest transaction left it."""
        return self._writer.head.n

    async def after(self, n: int, limit: int) -> list[upkeep.Row]:
        """The records after number ``n``, in order."""
        return await self._read(lambda connection: upkeep.after(connection, n, limit))

    async def keep(self, contents: Mapping[str, bytes]) -> None:
        """Keep what records name by digest and share, such as policies in their resolved form."""
        new = {digest: data for digest, data in contents.items() if digest not in self._kept}
        if new:
            await self._writer.run(lambda transaction: upkeep.keep(transaction.connection, new), durable=True)
            self._kept.update(new)

    async def content(self, digest: str) -> bytes | None:
        """What was kept under a digest. Raises JournalCorrupt if it no longer has it."""
        data = await self._read(lambda connection: upkeep.content(connection, digest))
        if data is not None and canonical.digest_bytes(data) != digest:
            raise errors.JournalCorrupt(f"what is kept under {digest} was changed", digest=digest)
        return data

    async def source(self, digest: str) -> bytes | None:
        """What makes the policy of a digest again; whether it does is for the digest of that to say."""
        return await self._read(lambda connection: upkeep.content(connection, digest + SOURCE))

    async def oldest(self, limit: int) -> list[upkeep.Kept]:
        """The oldest calls whose bodies are kept."""
        return await self._read(lambda connection: upkeep.oldest(connection, limit))

    async def held(self) -> int:
        """Bytes of all bodies, streams and artifacts that are kept."""
        return await self._read(upkeep.held)

    async def prune(self, calls: Sequence[tuple[int, str]]) -> int:
        """Take the bodies of ended calls away, durably; returns of how many. Their files are the caller's."""
        at = time.time_ns() // 1000
        return await self._writer.run(
            lambda transaction: upkeep.prune(transaction.connection, calls, at), durable=True
        )

    async def pruned_among(self, ids: Sequence[str]) -> list[str]:
        """Those of these calls that were pruned."""
        return await self._read(lambda connection: upkeep.pruned_among(connection, ids))

    async def referenced(self, digests: Collection[str]) -> set[str]:
        """Those of these blobs that the record of a kept call names."""
        return await self._read(lambda connection: upkeep.referenced(connection, digests))

    async def releases(self, digest: str, uid: int | None, limit: int) -> list[upkeep.Row]:
        """The newest calls that released a file of this digest, of one caller or of all."""
        return await self._read(lambda connection: upkeep.releases(connection, digest, uid, limit))

    async def sign_head(self) -> bytes | None:
        """Sign the newest record's head and keep that; None where that was done or there is no record."""
        key, now = self.key, time.time_ns() // 1000

        def operation(transaction: Transaction) -> bytes | None:
            head = transaction.head
            if head.n == 0 or head.n == self._signed[0]:
                return None
            signed = key.sign(head, now)
            transaction.connection.execute(
                "INSERT OR IGNORE INTO heads (n, signed) VALUES (?, ?)", (head.n, signed)
            )
            self._signed = (head.n, now)
            return signed

        return await self._writer.run(operation, durable=True)

    async def keep_signing(self) -> None:
        """Sign the head whenever ``SIGN_RECORDS`` records or ``SIGN_SECONDS`` have come since; endless."""
        last, since = self._signed[0], time.monotonic()
        while True:
            await asyncio.sleep(SIGN_CHECK)
            new = self._writer.head.n - last
            if new >= SIGN_RECORDS or (new and time.monotonic() - since >= SIGN_SECONDS):
                try:
                    await self.sign_head()
                except errors.SandboxdError as error:
                    log.warning("the head was not signed", reason=str(error))
                last, since = self._writer.head.n, time.monotonic()

    async def list(
        self,
        *,
        uid: int | None = None,
        policy: str | None = None,
        cause: models.Cause | None = None,
        state: models.State | None = None,
        key: str | None = None,
        labels: Mapping[str, str] | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> list[models.Invocation]:
        """Invocations, newest first, that fit every filter given; ``before`` is an id and not included.

        At most ``rows.MAX_LIST``, and fewer when they are large.
        Raises InvalidRequest for too many labels.
        """
        query, values = rows.selected(
            uid=uid,
            policy=policy,
            cause=cause,
            state=state,
            key=key,
            labels=labels or {},
            before=before,
            limit=limit,
        )
        return await self._read(lambda connection: rows.listed(connection, query, values))

    async def write(
        self,
        operation: Callable[[sqlite3.Connection], T],
        *,
        undo: Callable[[sqlite3.Connection], object] | None = None,
    ) -> T:
        """Run a transaction of those who keep tables of their own here, durably. What it raises undoes it.

        Where it raises HostFailed it may have been written and not synced: ``undo`` is run before any other
        transaction then. Without one, it may be on disk.
        """
        return await self._writer.run(
            lambda transaction: operation(transaction.connection),
            durable=True,
            undo=None if undo is None else lambda transaction: undo(transaction.connection),
        )

    async def read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """What ``read`` finds in those tables."""
        return await self._read(read)

    @staticmethod
    def _row(invocation: models.Invocation) -> tuple[str, str, str | None, bytes, str]:
        cause = invocation.outcome.cause.value if invocation.outcome else None
        return (
            invocation.state.value,
            invocation.policy.name,
            cause,
            records.body(invocation),
            invocation.id,
        )

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        if self._readers is None:
            raise errors.HostFailed("the journal is not open")

        def run() -> T:
            connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = schema.connect_reader(self._path)
                self._connections.append(connection)
            with schema.mapped():
                connection.execute("BEGIN")  # all of it as of one moment
                try:
                    return read(connection)
                finally:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")

        loop, mending = asyncio.get_running_loop(), self._writer.mending
        while True:
            times = mending.times
            try:
                return await loop.run_in_executor(self._readers, run)
            except errors.JournalCorrupt as error:
                if not await mending.mended(error, times):
                    raise mending.named(error) from error.__cause__
