"""Damaged pages of the journal's database: what is named, and which indexes are made again."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from journals import INDEXES, TABLES, behind, record, spoiled

from sandboxd.journal import Journal, btrees, schema

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


EMPTY = b"\0\0\0\0\x10\0\0"
"""After a page's kind: it is sound, and has no rows (https://www.sqlite.org/fileformat2.html)."""


async def filled(state: Path) -> None:
    async with Journal.open(state) as journal:
        for number in range(3):
            await record(journal, state, session="s", key=f"k{number}", labels={"n": str(number)})


def found(state: Path, *, deep: bool = False) -> list[str]:
    with closing(schema.connect_reader(state / "journal.sqlite3")) as connection:
        return [str(one) for one in btrees.checked(connection, deep=deep)]


@pytest.mark.parametrize("page", [bytes(4096), b"\x77"])
async def test_each_table_and_index_is_named(tmp_path: Path, page: bytes) -> None:
    await filled(tmp_path)
    path = tmp_path / "journal.sqlite3"
    whole = path.read_bytes()
    assert (found(tmp_path), found(tmp_path, deep=True)) == ([], [])
    for name in TABLES:
        spoiled(tmp_path, name, page)
        assert found(tmp_path) == found(tmp_path, deep=True) == [f"table {name}"]
        with closing(schema.connect_reader(path)) as connection:
            assert [one.name for one in btrees.unreadable(connection)] == [name]
        path.write_bytes(whole)
    for name in INDEXES:
        spoiled(tmp_path, name, page)
        assert found(tmp_path) == found(tmp_path, deep=True)
        assert [one.split()[:2] for one in found(tmp_path)] == [["index", name]]
        with closing(schema.connect_reader(path)) as connection:
            assert [one.name for one in btrees.unreadable(connection)] == [name]
        path.write_bytes(whole)


async def test_each_index_is_made_again_under_open_connections(tmp_path: Path) -> None:
    await filled(tmp_path)
    path = tmp_path / "journal.sqlite3"
    with closing(schema.connect_reader(path)) as before:
        schema_before = before.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    for name in INDEXES:
        spoiled(tmp_path, name, bytes(4096))
        with closing(schema.connect_reader(path)) as other:
            other.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            made = btrees.remake(path, btrees.unreadable(other))
            assert [one.name for one in made] == [name]
            assert btrees.unreadable(other) == []
            assert list(btrees.checked(other, deep=True)) == []
    with closing(schema.connect_reader(path)) as after:
        assert (
            after.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall() == schema_before
        )
    for name in INDEXES:  # all at once
        spoiled(tmp_path, name)
    with closing(schema.connect_reader(path)) as connection:
        assert {one.name for one in btrees.remake(path, btrees.unreadable(connection))} == set(INDEXES)
    assert found(tmp_path, deep=True) == []
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        connection.execute("INSERT INTO invocations SELECT * FROM invocations")


async def test_an_index_is_not_made_of_a_table_that_has_lost_rows(tmp_path: Path) -> None:
    """The other indexes know of more calls: a key that is not found would run its call again."""
    await filled(tmp_path)
    path = tmp_path / "journal.sqlite3"
    spoiled(tmp_path, "invocations", b"\x0d" + EMPTY)
    spoiled(tmp_path, "invocation_keys", bytes(4096))
    before = path.read_bytes()
    with closing(schema.connect_reader(path)) as connection:
        unread = btrees.unreadable(connection)
        assert [one.name for one in unread] == ["invocation_keys"]
        assert btrees.remake(path, unread) == []
        assert btrees.unreadable(connection) == unread
    assert path.read_bytes() == before
    spoiled(tmp_path, "invocations", b"\x77")
    with closing(schema.connect_reader(path)) as connection:
        assert btrees.remake(path, btrees.unreadable(connection)) == []


async def test_an_index_that_lacks_a_row_is_found_and_made_again(tmp_path: Path) -> None:
    await filled(tmp_path)
    path = tmp_path / "journal.sqlite3"
    spoiled(tmp_path, "invocation_keys", b"\x0a" + EMPTY)
    assert found(tmp_path) == []
    assert found(tmp_path, deep=True) == ["index invocation_keys of table invocations"]
    with closing(schema.connect_reader(path)) as connection:
        made = btrees.remake(path, btrees.checked(connection, deep=True))
    assert [one.name for one in made] == ["invocation_keys"]
    assert found(tmp_path, deep=True) == []


async def test_what_was_put_aside_is_no_damage(tmp_path: Path) -> None:
    await filled(tmp_path)
    spoiled(tmp_path, "session_records")
    behind(tmp_path, "ALTER TABLE session_records RENAME TO session_records_damaged_1")
    assert found(tmp_path, deep=True) == []
