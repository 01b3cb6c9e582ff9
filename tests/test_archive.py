"""Calls that have ended: indexed beside the daemon, found by their callers, pruned by age and size, swept."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
from journals import behind, call, record

from sandboxd import archive as archive_module
from sandboxd import errors, models
from sandboxd.archive import Archive
from sandboxd.blobs import BlobStore
from sandboxd.config import Retention
from sandboxd.journal import Accepted, Journal, upkeep
from sandboxd.journal.requests import Open, describe
from sandboxd.journal.search import Query
from sandboxd.policy import shipped_policies
from sandboxd.reload import PolicyStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence
    from pathlib import Path

    from sandboxd.journal.upkeep import Row

HOUR = 3600 * 10**6


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "PAUSE", 0.01)
    monkeypatch.setattr(archive_module, "BREATH", 0.0)


@asynccontextmanager
async def opened(state: Path, **retention: int) -> AsyncIterator[tuple[Journal, Archive]]:
    """A journal and its archive, which does not run yet."""
    async with Journal.open(state) as journal:
        (state / "calls").mkdir(exist_ok=True)
        yield (
            journal,
            Archive(
                state=state,
                journal=journal,
                blobs=BlobStore(state / "blobs"),
                policies=PolicyStore([shipped_policies()]),
                retention=Retention.model_construct(age=retention.get("age"), size=retention.get("size")),
            ),
        )


async def indexed(journal: Journal, archive: Archive) -> None:
    """Wait until all that was recorded is in the index."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(archive.run)
        with anyio.fail_after(20):
            while True:
                try:
                    if (await archive.search(0, Query())).indexed == journal.count:
                        break
                except errors.HostFailed:  # it is not made yet
                    pass
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


async def test_ended_calls_are_indexed_after_the_fact_and_at_the_next_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        for number in range(60):
            await record(
                journal, tmp_path, argv=["echo", f"first{number}"], stdout=b"needle\x00\xff %d" % number
            )
        await indexed(journal, archive)
        found = await archive.search(0, Query("needle", limit=500))
        assert len(found.hits) == 60
        assert [hit.command for hit in (await archive.search(0, Query("first7"))).hits] == ["echo first7"]
        for _ in range(3):
            await record(journal, tmp_path, argv=["echo", "later"])
    async with opened(tmp_path) as (journal, archive):
        assert (await archive.search(0, Query("later"))).hits == []
        await indexed(journal, archive)
        assert len((await archive.search(0, Query("later"))).hits) == 3


async def test_an_index_of_another_journal_is_thrown_away(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        for _ in range(5):
            await record(journal, tmp_path, argv=["old"])
        await indexed(journal, archive)
    for name in ("journal.sqlite3", "journal.sqlite3-wal", "journal.sqlite3-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    async with opened(tmp_path) as (journal, archive):
        for _ in range(6):
            await record(journal, tmp_path, argv=["new"])
        await indexed(journal, archive)
        assert (await archive.search(0, Query("old"))).hits == []
        assert len((await archive.search(0, Query("new"))).hits) == 6


async def test_a_damaged_body_does_not_stop_the_index(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, _):
        calls = [await record(journal, tmp_path, argv=["word"]) for _ in range(3)]
    behind(tmp_path, f"UPDATE invocations SET doc = x'ff00' WHERE id = '{calls[1].id}'")
    async with opened(tmp_path) as (journal, archive):
        await indexed(journal, archive)
        assert [hit.id for hit in (await archive.search(0, Query("word"))).hits] == [calls[2].id, calls[0].id]


async def test_policies_are_kept_by_digest(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        await archive.keep_policies()
        policy = PolicyStore([shipped_policies()]).current.get("python")
        data = await journal.content(policy.digest)
        assert data is not None
        assert json.loads(data) == policy.spec.resolved()
        assert await journal.content("sha256:" + "0" * 64) is None
    behind(tmp_path, f"UPDATE contents SET data = x'7b7d' WHERE digest = '{policy.digest}'")
    async with opened(tmp_path) as (journal, _):
        with pytest.raises(errors.JournalCorrupt):
            await journal.content(policy.digest)


async def test_bodies_go_and_records_stay(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        old = [
            await record(
                journal, tmp_path, stdout=b"old", labels={"a": "b"}, key=f"k{number}", files={"f": b"shared"}
            )
            for number in range(30)
        ]
        now = time.time_ns() // 1000
        new = await record(
            journal, tmp_path, stdout=b"new", labels={"a": "b"}, files={"f": b"shared"},
            times=models.Times(accepted=now),
        )  # fmt: skip
        await indexed(journal, archive)
        done = await archive.prune(HOUR, None)
        assert done.calls == 30
        assert done.bytes > 30 * 300
        report = await journal.verify(deep=True)
        assert (report.ok, report.pruned, report.records) == (True, 30, 31)
        found = await journal.get(old[0].id)
        assert found is not None
        assert found.pruned is not None
        assert (found.argv, found.artifacts, found.labels) == ([], [], {})
        assert (found.outcome, found.stdout, found.caller) == (old[0].outcome, old[0].stdout, old[0].caller)
        assert (found.policy, found.image.digest) == (old[0].policy, old[0].image.digest)
        assert [call.id for call in await journal.list(labels={"a": "b"})] == [new.id]
        assert sorted(os.listdir(tmp_path / "calls")) == [new.id]  # noqa: PTH208
        existing = await journal.find_key(1, "k3")  # a key lives as long as its record
        assert existing is not None
        assert existing.id == old[3].id
        assert (await archive.search(0, Query("true"))).hits[0].id == new.id
        assert len((await archive.search(0, Query("true"))).hits) == 1
        assert await archive.prune(HOUR, None) == models.Pruning()


async def test_a_record_that_lost_its_invocation_is_no_end_of_pruning(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, _):
        one, _ = [await record(journal, tmp_path) for _ in range(2)]
    behind(tmp_path, f"DELETE FROM invocations WHERE id = '{one.id}'")
    async with opened(tmp_path) as (journal, archive):
        with anyio.fail_after(20):
            assert (await archive.prune(HOUR, None)).calls == 1
        assert await journal.oldest(1) == []


async def test_a_clock_that_was_ahead_does_not_stop_retention(tmp_path: Path) -> None:
    future = time.time_ns() // 1000 + 1000 * HOUR
    async with opened(tmp_path) as (journal, archive):
        ahead = [
            await record(journal, tmp_path, stdout=b"x", times=models.Times(accepted=future))
            for _ in range(30)
        ]
        for _ in range(30):
            await record(journal, tmp_path, stdout=b"x")
        assert (await archive.prune(HOUR, None)).calls == 30
        kept = {path.name for path in (tmp_path / "calls").iterdir()}
        assert kept == {call.id for call in ahead}


async def test_what_is_held_is_not_counted_anew_for_each_step(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        for _ in range(200):
            await record(journal, tmp_path, stdout=bytes(1000), files={"f": b"shared" * 2000})
        counted = 0
        held = journal.held

        async def counting() -> int:
            nonlocal counted
            counted += 1
            return await held()

        journal.held = counting  # type: ignore[method-assign]
        size = await held() // 10
        await archive.prune(None, size)
        assert size - 10_000 < await held() <= size
        assert counted == 2


async def test_files_go_though_the_index_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: what makes room goes first, and the index is told as soon as it can be."""
    monkeypatch.setattr(archive_module, "CHECK", 0.02)
    async with opened(tmp_path) as (journal, archive):
        for _ in range(30):
            await record(journal, tmp_path, argv=["gone"], stdout=b"x")
        await indexed(journal, archive)
        forget = archive._index.forget

        def full(numbers: Sequence[int]) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        archive._index.forget = full  # type: ignore[method-assign]
        assert (await archive.prune(HOUR, None)).calls == 30
        assert os.listdir(tmp_path / "calls") == []  # noqa: PTH208
        assert len(archive._index.find(Query("gone", limit=500)).hits) == 30
        assert (await archive.search(0, Query("gone", limit=500))).hits == []
        archive._index.forget = forget  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(archive.run)
            with anyio.fail_after(20):
                while archive._index.find(Query("gone")).hits:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()


async def test_pruned_calls_are_in_no_index(tmp_path: Path) -> None:
    """Neither after a kill between journal and index, nor in one that is made again, nor by a race."""
    async with opened(tmp_path) as (journal, archive):
        for _ in range(3):
            await record(journal, tmp_path, argv=["gone"], stdout=b"x")
        await indexed(journal, archive)
        await journal.prune([(kept.n, kept.id) for kept in await journal.oldest(2)])  # and then: a kill
        assert len((await archive.search(0, Query())).hits) == 1
    async with opened(tmp_path) as (journal, archive):
        await archive._forget_leftovers()
        assert len(archive._index.find(Query()).hits) == 1
        archive._index.remove()
        await journal.prune([(kept.n, kept.id) for kept in await journal.oldest(2)])
        await indexed(journal, archive)
        assert archive._index.find(Query()).hits == []
        assert await anyio.to_thread.run_sync(archive._where) == 3  # it is not read again for ever
        again = await record(journal, tmp_path, argv=["gone"])
        await indexed(journal, archive)
        assert [hit.id for hit in archive._index.find(Query("gone")).hits] == [again.id]


async def test_a_call_that_is_pruned_while_it_is_indexed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        await record(journal, tmp_path, argv=["gone"], stdout=b"x")
        after = journal.after

        async def slowly(n: int, limit: int) -> list[Row]:
            rows = await after(n, limit)
            await anyio.sleep(0.3)  # prune comes between what is read and what is indexed
            return rows

        journal.after = slowly  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(archive._catch_up)
            await anyio.sleep(0.1)
            assert (await archive.prune(HOUR, None)).calls == 1
        assert archive._index.find(Query()).hits == []


async def test_lineage_reads_no_more_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "MOST", 2_000_000)
    async with opened(tmp_path) as (journal, archive):
        calls = [
            await record(journal, tmp_path, argv=["x" * 700_000], files={"f": b"same"}) for _ in range(9)
        ]
        found = await archive.lineage(calls[0].artifacts[0].digest, None)
        assert [call.id for call in found.calls] == [call.id for call in calls[:-4:-1]]
        assert (found.size, found.calls[0].paths) == (4, ["f"])


async def test_size_takes_the_oldest(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        calls = [await record(journal, tmp_path, stdout=bytes([n]) * 100_000) for n in range(60)]
        before = await journal.held()
        assert before > 6_000_000
        await archive.prune(None, 2_000_000)
        assert 1_800_000 < await journal.held() <= 2_000_000
        kept = {path.name for path in (tmp_path / "calls").iterdir()}
        assert kept == {call.id for call in calls[-len(kept) :]}
        assert (await journal.verify(deep=True)).ok


async def test_artifacts_and_inputs_count_and_shared_ones_count_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        for number in range(10):
            files = {"own": bytes([number]) * 100_000, "shared": b"s" * 500_000}
            await record(journal, tmp_path, files=files)
        behind_size = 10 * 100_000 + 500_000
        assert behind_size < await journal.held() < behind_size + 50_000
        stdin, tar = models.Bytes.of(b"i" * 300_000), models.Bytes.of(b"t" * 9000)
        asked = describe(models.Request(argv=["cat"], stdin=stdin, tar=tar))
        assert [len(data) for data in asked.large.values()] == [300_000]
        begun = call()
        await journal.accept(Accepted(begun, asked.digest, asked, Open(begun.id, 1)))
        held = await journal.held()
        assert behind_size + 309_000 < held < behind_size + 370_000
        (large,) = asked.large
        assert await journal.referenced([large]) == {large}
        await archive.prune(None, 900_000)
        assert await journal.held() <= 900_000 + 309_000 + 100_000  # what waits is never pruned
        assert await journal.referenced([large]) == {large}


async def test_files_that_a_killed_daemon_left_go_at_the_next_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        one, two = [await record(journal, tmp_path, stdout=b"x") for _ in range(2)]
        rows = [(kept.n, kept.id) for kept in await journal.oldest(1)]
        await journal.prune(rows)  # and then it was killed
        assert (tmp_path / "calls" / one.id).exists()
        await archive._remove_leftovers()
        assert sorted(os.listdir(tmp_path / "calls")) == [two.id]  # noqa: PTH208


def aged(path: Path) -> None:
    then = time.time() - archive_module.GRACE - 60
    os.utime(path, (then, then))


async def test_a_blob_goes_when_nothing_names_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        blobs = BlobStore(tmp_path / "blobs")
        old = await record(journal, tmp_path, files={"a": b"only old", "b": b"both"})
        now = time.time_ns() // 1000
        await record(journal, tmp_path, files={"b": b"both"}, times=models.Times(accepted=now))
        stray, checkpoint, fresh = (
            blobs.add(b"stray"),
            blobs.add(b"of a checkpoint"),
            blobs.add(b"just collected"),
        )
        only, both = (artifact.digest for artifact in old.artifacts)

        async def checkpoints(digests: Collection[str]) -> set[str]:
            return {checkpoint} & set(digests)

        archive.references.append(checkpoints)
        for digest in (stray, checkpoint, only, both):
            aged(blobs.path(digest))
        assert await archive.sweep() == 1
        assert not blobs.has(stray)
        await archive.prune(HOUR, None)
        assert await archive.sweep() == 1
        assert [blobs.has(digest) for digest in (only, both, checkpoint, fresh)] == [False, True, True, True]


async def test_a_blob_that_is_collected_again_is_not_swept(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    digest = blobs.add(b"again")
    aged(blobs.path(digest))
    when = time.time() - archive_module.GRACE
    directory = blobs.path(digest).parent
    assert blobs.unused_since(directory, when) == [digest]
    assert blobs.add(b"again") == digest  # between the look and the removal
    assert blobs.discard([digest], when) == 0
    assert blobs.has(digest)


async def test_searches_of_one_caller_take_neither_all_threads_nor_those_of_others(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        await record(journal, tmp_path)
        await indexed(journal, archive)
        running: Counter[str] = Counter()
        most: Counter[str] = Counter()
        counting = threading.Lock()
        find, free = archive._index.find, threading.Event()

        def slow(query: Query) -> models.SearchResults:
            with counting:
                running[query.text] += 1
                most[query.text] = max(most[query.text], running[query.text])
            free.wait(20)
            with counting:
                running[query.text] -= 1
            return find(query)

        archive._index.find = slow  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            for _ in range(60):
                tasks.start_soon(archive.search, 1, Query("greedy"))
            await anyio.sleep(0.05)
            tasks.start_soon(archive.search, 2, Query("modest"))
            with anyio.fail_after(20):
                while running.total() < archive_module.SEARCHES:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                await anyio.sleep(0.1)
                await anyio.to_thread.run_sync(time.monotonic)  # there are threads left
            free.set()
        assert most == {"greedy": 1, "modest": 1}


async def test_more_searches_of_a_caller_than_may_wait_are_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, archive):
        await record(journal, tmp_path)
        await indexed(journal, archive)
        find, free = archive._index.find, threading.Event()

        def slow(query: Query) -> models.SearchResults:
            free.wait(20)
            return find(query)

        archive._index.find = slow  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            for _ in range(archive_module.WAITING + 1):
                tasks.start_soon(archive.search, 1, Query())
            await anyio.sleep(0.05)
            with pytest.raises(errors.QueueFull):
                await archive.search(1, Query())
            free.set()


async def test_sweeps_at_once_do_not_hinder_each_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, archive):
        blobs = BlobStore(tmp_path / "blobs")
        for number in range(400):
            aged(blobs.path(blobs.add(b"%d" % number)))
        removed = []

        async def sweep() -> None:
            removed.append(await archive.sweep())

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(sweep)
        assert sorted(removed) == [0, 0, 0, 400]


async def test_a_blob_that_goes_while_they_are_listed_is_passed_over(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    digest = blobs.add(b"kept")
    aged(blobs.path(digest))
    directory = blobs.path(digest).parent
    (directory / ("0" * 64)).symlink_to(tmp_path / "gone")  # is listed, and is not there
    assert blobs.unused_since(directory, time.time() - archive_module.GRACE) == [digest]


async def test_what_goes_wrong_in_the_background_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No directory of output at first, and a source of references that fails: later all of it is done."""
    monkeypatch.setattr(archive_module, "CHECK", 0.02)
    async with opened(tmp_path, age=HOUR) as (journal, archive):
        await record(journal, tmp_path)
        (tmp_path / "calls").rmdir()
        failures = 0

        async def failing(_: Collection[str]) -> set[str]:
            nonlocal failures
            failures += 1
            raise OSError(5, "Input/output error")

        archive.references.append(failing)
        blobs = BlobStore(tmp_path / "blobs")
        stray = blobs.add(b"stray")
        aged(blobs.path(stray))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(archive.run)
            await anyio.sleep(0.1)
            (tmp_path / "calls").mkdir()
            with anyio.fail_after(20):
                while not failures:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                archive.references.remove(failing)
                while (await journal.verify()).pruned != 1:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                while (await archive.search(0, Query())).indexed != 1:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()


async def test_retention_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "CHECK", 0.05)
    async with opened(tmp_path, age=HOUR) as (journal, archive):
        for _ in range(5):
            await record(journal, tmp_path, stdout=b"x")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(archive.run)
            with anyio.fail_after(20):
                while os.listdir(tmp_path / "calls"):  # noqa: ASYNC110, PTH208
                    await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()
        assert (await journal.verify()).pruned == 5
