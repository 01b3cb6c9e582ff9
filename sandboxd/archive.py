"""What becomes of calls that have ended: signed heads, the index, retention, unused blobs; and their
policies.

Theory of operation: all of it goes on in the background, in small steps with pauses, on the disk in threads,
so that no call waits for it; whatever a step leaves undone when the daemon dies is done after its next
start. Retention first takes the bodies of the oldest calls out of the journal, in one transaction for some
of them, and then their files; records and digests stay. A blob goes when nothing names it, which is asked of
every source of ``references``, and when nobody wrote it for ``GRACE``: what is being collected is not named
yet.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import structlog

from sandboxd import canonical, errors, models
from sandboxd.journal.search import Entry, Query, SearchIndex, command_text, readable
from sandboxd.journal.store import SOURCE
from sandboxd.lanes import Lanes
from sandboxd.policy.load import recorded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence
    from pathlib import Path

    from sandboxd.blobs import BlobStore
    from sandboxd.config import Retention
    from sandboxd.journal import Journal
    from sandboxd.journal.upkeep import Kept, Row
    from sandboxd.policy import Policy
    from sandboxd.policy.load import PolicySet
    from sandboxd.reload import PolicyStore

__all__ = ["Archive"]

PAUSE = 0.25  # seconds between two looks for what is new
SWEEP = 3600.0  # seconds between two looks for unused blobs
CHECK = 60.0  # seconds between two looks at retention
GRACE = 3600.0  # seconds that a blob is kept though nothing names it
STEP = 25  # calls that are pruned, or records that are indexed, at once
BREATH = 0.01  # seconds between two steps
_READ = 2048
MOST_RELEASES = 100
SEARCHES = 2  # threads that search at once, one for each caller
WAITING = 64  # searches of a caller

log = structlog.get_logger(__name__)


def _contents(policies: PolicySet) -> dict[str, bytes]:
    """What is kept of policies: the resolved form by its digest, and what makes the policy again."""
    found = {}
    for policy in policies.policies.values():
        found[policy.digest] = canonical.canonical(policy.spec.resolved())
        found[f"{policy.digest}{SOURCE}"] = json.dumps(policy.tree.plain(), ensure_ascii=False).encode()
    return found


def _lineage(digest: str, rows: Sequence[Row]) -> models.Lineage:
    found = models.Lineage(digest=digest, size=-1)
    for row in rows:
        try:
            call = models.Invocation.model_validate_json(row.doc or b"")
            header = json.loads(row.header)
        except ValueError:
            log.warning("the body of a record cannot be read", n=row.n, id=row.id)
            continue
        files = [artifact for artifact in call.artifacts if artifact.digest == digest]
        found.size = max(found.size, *(artifact.size for artifact in files), -1)
        found.calls.append(
            models.Release(
                id=row.id,
                n=row.n,
                uid=call.caller.uid,
                at=call.times.ended or call.times.accepted,
                paths=[artifact.path for artifact in files],
                policy=call.policy,
                image=call.image,
                plan=call.plan,
                inputs=header.get("inputs"),
                tar=header.get("tar"),
            )
        )
    return found


class Archive:
    """Runs beside the daemon. ``references`` say which blobs are named; the journal's is one of them."""

    def __init__(
        self, *, state: Path, journal: Journal, blobs: BlobStore, policies: PolicyStore, retention: Retention
    ) -> None:
        self._journal = journal
        self._blobs = blobs
        self._policies = policies
        self._spools = state / "calls"
        self._retention = retention
        self._index = SearchIndex(state / "search.sqlite3")
        self._known: object = None
        self._pruning = anyio.Lock()
        self._indexing = anyio.Lock()  # between a call that is indexed and the same one that is pruned
        self._left = True  # something of pruned calls may still be there
        self._sweeping = anyio.Lock()
        self._searching = Lanes("searches", most=SEARCHES, each=1, waiting=WAITING)
        self.references: list[Callable[[Collection[str]], Awaitable[set[str]]]] = [journal.referenced]

    async def keep_policies(self) -> None:
        """Keep the resolved forms of the policies that are in force, if they have changed."""
        current = self._policies.current
        if current is self._known:
            return
        await self._journal.keep(await anyio.to_thread.run_sync(_contents, current))
        self._known = current

    async def recorded_policy(self, name: str, digest: str) -> Policy:
        """A policy as a record names it, if the floors of now allow it. Raises NotFound, PolicyInvalid."""
        current = self._policies.current
        known = current.policies.get(name)
        if known is not None and known.digest == digest:
            return known
        text = await self._journal.source(digest)
        if text is None:
            raise errors.NotFound(f"policy {name!r} with the digest {digest} was not kept")
        found, problems = await anyio.to_thread.run_sync(recorded, text.decode(), name, current)
        if found is not None and found.digest == digest:
            return found
        said = str(problems[0]) if problems else "the floors of now make another one of it"
        raise errors.PolicyInvalid(
            f"policy {name!r} as it was recorded cannot be in force any more: {said}",
            problems=[problem.model_dump() for problem in problems],
        )

    async def run(self) -> None:
        """Do all of it, for ever."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._follow)
                tasks.start_soon(self._retain)
                tasks.start_soon(self._journal.keep_signing)
        finally:
            self._index.close()

    async def _follow(self) -> None:
        checked = False
        while True:
            try:
                await self.keep_policies()
                checked = checked or await self._is_of_this_journal()
                await self._catch_up()
            except errors.SandboxdError as error:
                log.warning("records were not indexed", reason=str(error))
                await anyio.sleep(CHECK)
            except Exception:  # the daemon, and its calls, do not end by it
                log.exception("records were not indexed")
                await anyio.sleep(CHECK)
            await anyio.sleep(PAUSE)

    async def _is_of_this_journal(self) -> bool:
        """Whether the newest call in the index has that record; if not, all of it is thrown away."""
        n, id_ = await self._in_index(lambda: self._index.last)
        rows = await self._journal.after(n - 1, 1)
        if n and (not rows or (rows[0].n, rows[0].id) != (n, id_)):
            log.warning("the index is of other records, and is made again", n=n, id=id_)
            await self._in_index(self._index.remove)
        return True

    async def _catch_up(self) -> None:
        last = await self._in_index(self._where)
        while last < self._journal.count:
            async with self._indexing:
                rows = await self._journal.after(last, STEP)
                if not rows:
                    return
                await self._in_index(self._add, rows)
            last = rows[-1].n
            await anyio.sleep(BREATH)

    async def _in_index(self, do: Callable[..., Any], *args: Any) -> Any:
        """Do something with the index, in a thread. One that is damaged is begun anew the next time."""
        try:
            return await anyio.to_thread.run_sync(do, *args)
        except sqlite3.OperationalError as error:  # the disk is full, or busy
            raise errors.HostFailed(f"the index of the records cannot be written: {error}") from error
        except sqlite3.DatabaseError as error:
            log.warning("the index of the records is damaged; it is made again", reason=str(error))
            await anyio.to_thread.run_sync(self._index.remove)
            raise errors.HostFailed("the index of the records was damaged") from error

    def _where(self) -> int:
        return self._index.last[0]

    def _add(self, rows: Sequence[Row]) -> None:
        self._index.add(filter(None, map(self._entry, rows)), {row.n for row in rows if row.doc is None})

    def _entry(self, row: Row) -> Entry | None:
        """What is indexed of a record; of a damaged one only what its header says."""
        try:
            header = json.loads(row.header)
            entry = Entry(
                row.n, row.id, header["at"], header["caller"]["uid"], "", header["outcome"]["cause"],
                header["image"], "", "", "",
            )  # fmt: skip
        except (ValueError, KeyError, TypeError):
            log.warning("a record cannot be read", n=row.n, id=row.id)
            return None
        try:
            call = None if row.doc is None else models.Invocation.model_validate_json(row.doc)
        except ValueError:
            log.warning("the body of a record cannot be read", n=row.n, id=row.id)
            call = None
        if call is None:
            return entry
        return entry._replace(
            policy=call.policy.name,
            command=command_text(call.argv),
            stdout=self._head(row.id, "stdout"),
            stderr=self._head(row.id, "stderr"),
        )

    def _head(self, id_: str, stream: str) -> str:
        try:
            with (self._spools / id_ / stream).open("rb") as file:
                return readable(file.read(_READ))
        except OSError:  # nothing was written, or it was pruned meanwhile
            return ""

    async def search(self, uid: int, query: Query) -> models.SearchResults:
        """A page of calls that fit, without those that were pruned, for a caller.

        Raises InvalidRequest, HostFailed, QueueFull.
        """
        found = await self._searching.run(uid, partial(self._index.find, query))
        gone = set(await self._journal.pruned_among([hit.id for hit in found.hits]))  # and not yet in there
        found.hits = [hit for hit in found.hits if hit.id not in gone]
        return found

    async def lineage(self, digest: str, uid: int | None) -> models.Lineage:
        """The calls, of one caller or of all, that released a content. Raises NotFound, InvalidRequest."""
        self._blobs.path(digest)
        rows = await self._journal.releases(digest, uid, MOST_RELEASES)
        found = await anyio.to_thread.run_sync(_lineage, digest, rows)
        if not found.calls:
            raise errors.NotFound(f"no call of yours released a file with the digest {digest}")
        return found

    async def _retain(self) -> None:
        swept = -SWEEP
        while True:
            try:
                if self._left:
                    await self._remove_leftovers()
                    await self._forget_leftovers()
                    self._left = False
                done = await self.prune(self._retention.age, self._retention.size)
                if done.calls or time.monotonic() - swept >= SWEEP:
                    swept = time.monotonic()
                    await self.sweep()
            except errors.SandboxdError as error:
                log.warning("retention has to wait", reason=str(error))
            except Exception:  # as above
                log.exception("retention has to wait")
            await anyio.sleep(CHECK)

    async def prune(self, age: int | None, size: int | None) -> models.Pruning:
        """Prune the oldest calls until all are younger than ``age`` microseconds and hold ``size`` bytes."""
        found = models.Pruning()
        async with self._pruning:
            if age is not None:
                before = time.time_ns() // 1000 - age
                while chosen := [one for one in await self._journal.oldest(STEP) if one.at < before]:
                    await self._take(chosen, found)
            if size is not None:
                await self._shrink(size, found)
        if found.calls:
            log.info("pruned", calls=found.calls, bytes=found.bytes)
        return found

    async def _shrink(self, size: int, found: models.Pruning) -> None:
        """Take the oldest until the rest holds ``size`` bytes.

        What is held takes a look at everything, so it is asked at the beginning and at the end.
        """
        while (over := await self._journal.held() - size) > 0:
            while over > 0:
                chosen, most = [], 0
                for one in await self._journal.oldest(STEP):
                    if most < over:
                        chosen.append(one)
                        most += one.bytes
                if not chosen:
                    return
                await self._take(chosen, found)
                over -= most - await self._shared(chosen)

    async def _shared(self, pruned: Sequence[Kept]) -> int:
        """Bytes of the files of these that are still there for others, and of those that they shared."""
        sizes = {digest: size for one in pruned for digest, size in one.files.items()}
        digests, named = list(sizes), set[str]()
        for at in range(0, len(digests), 500):
            named |= await self._journal.referenced(digests[at : at + 500])
        gone = sum(size for digest, size in sizes.items() if digest not in named)
        return sum(sum(one.files.values()) for one in pruned) - gone

    async def _take(self, chosen: Sequence[Kept], found: models.Pruning) -> None:
        """Prune these: first what makes room, which a full disk does not keep from going."""
        async with self._indexing:
            found.calls += await self._journal.prune([(one.n, one.id) for one in chosen])
            found.bytes += sum(one.bytes for one in chosen)
            await anyio.to_thread.run_sync(self._remove, [one.id for one in chosen])
            try:
                await self._in_index(self._index.forget, [one.n for one in chosen])
            except errors.HostFailed as error:
                self._left = True
                log.warning("pruned calls are still in the index", reason=str(error))
        await anyio.sleep(BREATH)

    def _remove(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            shutil.rmtree(self._spools / id_, ignore_errors=True)

    async def _remove_leftovers(self) -> None:
        """Files of calls that were pruned by a daemon that died before it could remove them."""
        names = await anyio.to_thread.run_sync(os.listdir, self._spools)
        for at in range(0, len(names), 500):
            gone = await self._journal.pruned_among(names[at : at + 500])
            await anyio.to_thread.run_sync(self._remove, gone)
            await anyio.sleep(BREATH)

    async def _forget_leftovers(self) -> None:
        """The same in the index."""
        last = 0
        while rows := await self._in_index(self._index.after, last, 500):
            async with self._indexing:
                gone = set(await self._journal.pruned_among([id_ for _, id_ in rows]))
                await self._in_index(self._index.forget, [n for n, id_ in rows if id_ in gone])
            last = rows[-1][0]
            await anyio.sleep(BREATH)

    async def referenced(self, digests: Collection[str]) -> set[str]:
        """Those of these blobs that something names."""
        found: set[str] = set()
        for source in self.references:
            found |= await source(digests)
        return found

    async def sweep(self) -> int:
        """Remove the blobs that nothing names; returns how many."""
        async with self._sweeping:
            return await self._sweep()

    async def _sweep(self) -> int:
        removed = 0
        for directory in await anyio.to_thread.run_sync(self._blobs.directories):
            digests = await anyio.to_thread.run_sync(self._blobs.unused_since, directory, time.time() - GRACE)
            for at in range(0, len(digests), 500):
                part = digests[at : at + 500]
                named = await self.referenced(part)
                gone = [digest for digest in part if digest not in named]
                removed += await anyio.to_thread.run_sync(self._blobs.discard, gone, time.time() - GRACE)
                await anyio.sleep(BREATH)
        if removed:
            log.info("blobs were removed that nothing names", count=removed)
        return removed
