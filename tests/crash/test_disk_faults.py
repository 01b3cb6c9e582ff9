"""A disk that is full, breaks, or cannot sync: typed errors, nothing corrupt, and it goes on when mended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from disks import mounted
from invocations import DIGEST, call, ended

from sandboxd import errors, models
from sandboxd.journal import Accepted, Journal, outcome_header, writer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from disks import Disk

LOG = r"journal\.sqlite3-wal$"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "fs") as disk:
        yield disk


async def accept(journal: Journal, key: str | None = None) -> models.Invocation:
    invocation = call(key=key)
    assert await journal.accept(Accepted(invocation, DIGEST)) is None
    return invocation


async def finish(journal: Journal, invocation: models.Invocation, attempts: int = 1) -> None:
    done = ended(invocation).model_copy(update={"attempts": attempts})
    await journal.ended(done, outcome_header(done))


async def accepts_again(journal: Journal) -> models.Invocation:
    for _ in range(100):
        try:
            return await accept(journal)
        except errors.HostFailed:
            await asyncio.sleep(0.05)
    raise AssertionError("it does not recover")


async def test_what_could_not_be_synced_is_not_accepted(disk: Disk, tmp_path: Path) -> None:
    """A later sync that succeeds says nothing of what an earlier one lost."""
    state = disk.at / "state"
    async with Journal.open(state) as journal:
        first = await accept(journal, "first")
        disk.fail("fsync", path=LOG, do="EIO")
        with pytest.raises(errors.HostFailed, match="could not be synced"):
            await accept(journal, "lost")
        for _ in range(3):
            with pytest.raises(errors.HostFailed, match="could not be synced"):
                await accept(journal, "later")
        with pytest.raises(errors.HostFailed):
            await journal.find_key(1, "first")
        assert await journal.get(first.id) is not None  # what is there can be read
        disk.mend()
        again = await accepts_again(journal)
        assert await journal.find_key(1, "lost") is None  # who asked was told that it is not accepted
        assert {one.id for one in await journal.in_flight()} == {first.id, again.id}
        await finish(journal, first)
        assert (await journal.verify()).ok
    async with Journal.open(state) as journal:
        assert {one.id for one in await journal.in_flight()} == {again.id}


async def test_one_failed_sync_among_good_ones_is_enough(disk: Disk) -> None:
    async with Journal.open(disk.at / "state") as journal:
        await accept(journal)
        disk.fail("fsync", path=LOG, do="EIO", times=1)
        results = await asyncio.gather(*(accept(journal) for _ in range(20)), return_exceptions=True)
        failed = [one for one in results if isinstance(one, errors.HostFailed)]
        there = {one.id for one in await journal.in_flight()}
        assert failed
        assert {one.id for one in results if isinstance(one, models.Invocation)} <= there
        await accepts_again(journal)
        assert len(await journal.in_flight()) == 22 - len(failed)  # the others were taken back


async def test_an_outcome_waits_until_it_is_on_disk(disk: Disk) -> None:
    async with Journal.open(disk.at / "state") as journal:
        several = [await accept(journal) for _ in range(3)]
        disk.fail("fsync", path=LOG, do="EIO")
        waiting = [asyncio.create_task(finish(journal, one)) for one in several]
        await asyncio.sleep(0.3)
        waiting.append(asyncio.create_task(finish(journal, several[0])))
        assert not any(task.done() for task in waiting)
        disk.mend()
        assert await asyncio.gather(*waiting) == [None] * 4
        with pytest.raises(errors.StateConflict):  # one outcome
            await finish(journal, several[0], attempts=2)
        assert (await journal.verify()).records == 3
        assert await journal.in_flight() == []


async def test_an_outcome_that_waits_too_long_is_told_as_such_and_recorded_once(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE", 0.3)
    async with Journal.open(disk.at / "state") as journal:
        written, late = [await accept(journal) for _ in range(2)]
        disk.fail("fsync", path=LOG, do="EIO")
        for one in (written, late):  # the first is in the log, and the other waits for that
            for _ in range(2):
                with pytest.raises(errors.HostFailed, match="could not be synced"):
                    await finish(journal, one)
        disk.mend()
        await accepts_again(journal)
        for one in (written, late):
            await finish(journal, one)
            with pytest.raises(errors.StateConflict):
                await finish(journal, one, attempts=2)
        report = await journal.verify()
        assert (report.ok, report.records) == (True, 2)


async def test_a_log_whose_bytes_are_gone_is_not_believed(disk: Disk) -> None:
    """As where the kernel dropped pages that it could not write: what is read is not what was written."""
    state = disk.at / "state"
    async with Journal.open(state) as journal:
        first = await accept(journal)
        kept = (disk.behind / "state" / "journal.sqlite3-wal").read_bytes()
        disk.fail("fsync", path=LOG, do="EIO")
        with pytest.raises(errors.HostFailed):
            await accept(journal)
        (disk.behind / "state" / "journal.sqlite3-wal").write_bytes(kept)
        disk.mend()
        for _ in range(100):
            with pytest.raises(errors.HostFailed) as told:
                await accept(journal)
            if "restart the daemon" in str(told.value):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(str(told.value))
    async with Journal.open(state) as journal:
        assert [one.id for one in await journal.in_flight()] == [first.id]
        await finish(journal, first)
        assert (await journal.verify()).ok


@pytest.mark.parametrize("do", ["ENOSPC", "EIO", "short"])
@pytest.mark.parametrize("file", ["journal.sqlite3-wal", "journal.sqlite3"])
async def test_writes_that_fail_anywhere_corrupt_nothing(disk: Disk, do: str, file: str) -> None:
    """Each write of a few hundred in its turn is the first that fails, and then three more do."""
    state = disk.at / "state"
    known: set[str] = set()
    done: set[str] = set()
    async with Journal.open(state) as journal:
        for after in range(1, 40, 6):
            disk.fail("write", path=rf"{file}$".replace(".", r"\."), do=do, after=after, times=4)
            for _ in range(12):
                try:
                    one = await accept(journal)
                    known.add(one.id)
                    await finish(journal, one)
                    done.add(one.id)
                except errors.HostFailed:
                    continue
            disk.mend()
            last = await accepts_again(journal)
            known.add(last.id)
            assert (await journal.verify()).ok
    async with Journal.open(state) as journal:
        assert (await journal.verify()).ok
        open_ = {one.id for one in await journal.in_flight()}
        assert known - done == open_
        assert len(await journal.list(limit=500)) == min(500, len(known))


@pytest.mark.parametrize("do", ["ENOSPC", "EIO"])
async def test_a_journal_that_cannot_be_opened_says_so(disk: Disk, do: str) -> None:
    state = disk.at / "state"
    async with Journal.open(state) as journal:
        one = await accept(journal)
    for operation in ("create", "write", "grow", "fsync", "fsyncdir", "open"):
        disk.fail(operation, path="journal", do=do)
        try:
            async with Journal.open(state) as journal:
                await journal.get(one.id)
        except (errors.HostFailed, errors.ConfigInvalid) as error:
            assert str(error)  # noqa: PT017
    disk.mend()
    async with Journal.open(state) as journal:
        assert [found.id for found in await journal.in_flight()] == [one.id]
