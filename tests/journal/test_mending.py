"""A journal whose database is damaged, as a daemon uses it: indexes are made again, tables are named."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from journals import INDEXES, record, spoiled

from sandboxd import errors
from sandboxd.journal import Journal, Refusal, btrees

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def filled(state: Path) -> list[str]:
    async with Journal.open(state) as journal:
        done = [
            await record(journal, state, session="s", key=f"k{n}", labels={"n": str(n)}) for n in range(3)
        ]
        return [one.id for one in done]


def damaged(state: Path) -> list[str]:
    with closing(sqlite3.connect(state / "journal.sqlite3")) as connection:
        return [str(one) for one in btrees.checked(connection, deep=True)]


@pytest.mark.parametrize("name", [name for name in INDEXES if "invocation" in name or "records_" in name])
async def test_a_damaged_index_of_calls_is_made_again_when_it_is_met(tmp_path: Path, name: str) -> None:
    """By one that reads, or one that writes; whichever comes first."""
    ids = await filled(tmp_path)
    for reads in (True, False):
        spoiled(tmp_path, name)
        async with Journal.open(tmp_path) as journal:
            if reads:
                assert [one.id for one in await journal.list(uid=1)] == ids[::-1]
                assert (await journal.get(ids[0])) is not None
                assert (await journal.find_key(1, "k1")) is not None
                assert await journal.open_calls() == []
                await journal.oldest(10)
            ids.append((await record(journal, tmp_path, key=f"new{len(ids)}", labels={"a": "b"})).id)
            assert (await journal.verify(deep=False)).ok
        assert damaged(tmp_path) == []


async def test_many_that_meet_it_at_once_all_go_on(tmp_path: Path) -> None:
    await filled(tmp_path)
    for name in INDEXES:
        spoiled(tmp_path, name)
    async with Journal.open(tmp_path) as journal:
        first = [record(journal, tmp_path, key=f"many{number}") for number in range(20)]
        done, lists = await asyncio.gather(
            asyncio.gather(*first), asyncio.gather(*(journal.list(uid=1) for _ in range(20)))
        )
        assert len({one.id for one in done}) == 20
        assert all(len(one) >= 3 for one in lists)
        assert len(await journal.list()) == 23
        assert (await journal.verify()).ok
    assert damaged(tmp_path) == []


async def test_what_is_posted_meanwhile_is_written(tmp_path: Path) -> None:
    await filled(tmp_path)
    spoiled(tmp_path, "invocation_keys")
    async with Journal.open(tmp_path) as journal:
        finding = asyncio.create_task(journal.find_key(1, "k1"))
        while not journal._writer.mending.going:  # noqa: ASYNC110  # nobody tells of it
            await asyncio.sleep(0)
        journal._writer.post(
            lambda transaction: transaction.connection.execute(
                "INSERT INTO refusals (at, code, detail, request) VALUES (1, 'posted', '', '')"
            )
        )
        refusing = asyncio.create_task(journal.refused(Refusal(2, 1, "after", "")))
        assert (await finding) is not None
        await refusing
        assert [one.code for one in await journal.refusals()] == ["after", "posted"]


async def test_a_damaged_table_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    ids = await filled(tmp_path)
    spoiled(tmp_path, "labels")
    spoiled(tmp_path, "refusals")
    async with Journal.open(tmp_path) as journal:
        for _ in range(2):
            with pytest.raises(
                errors.JournalCorrupt, match=r"the table labels, the table refusals; .*backup"
            ):
                await record(journal, tmp_path, labels={"a": "b"})
        with pytest.raises(errors.JournalCorrupt, match="the table refusals"):
            await journal.refused(Refusal(2, 1, "after", ""))
        ids.append((await record(journal, tmp_path)).id)
        assert [one.id for one in await journal.list()] == ids[::-1]


@pytest.mark.parametrize("name", ["records", "invocations"])
async def test_a_journal_without_its_calls_is_refused_by_name(tmp_path: Path, name: str) -> None:
    await filled(tmp_path)
    spoiled(tmp_path, name)
    before = (tmp_path / "journal.sqlite3").read_bytes()

    async def used() -> None:
        async with Journal.open(tmp_path) as journal:
            await record(journal, tmp_path)

    with pytest.raises(errors.JournalCorrupt, match=f"the table {name}; "):
        await used()
    assert (tmp_path / "journal.sqlite3").read_bytes()[4096:] == before[4096:]
