"""The b-trees of the journal's database: which are damaged, and indexes that are made again.

Theory of operation.  An index says nothing that its table does not, so one with a damaged page can be made
again. SQLite's REINDEX and DROP INDEX free the old pages and fail on such a one, so a new one is made beside
it and takes its name: its root page is written into the schema (https://www.sqlite.org/pragma.html,
"writable_schema"), and the old pages stay unused. That is committed only if ``integrity_check`` finds that
table and indexes agree then: a table that has lost rows must not pass for whole, for a key that is not found
runs a call twice. Tables are only named: what is in them is nowhere else.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["Damaged", "checked", "is_damage", "remake", "unreadable"]

_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_ASIDE = re.compile(r"_damaged_\d+$")  # what ``sessioncalls`` put aside
_INDEX = re.compile(r" index (\w+)$")  # messages of integrity_check
_NEW = "made_again"


class _Tree(NamedTuple):
    """``sql`` is None for an index that a constraint of its table made."""

    name: str
    table: str
    sql: str | None

    def query(self, connection: sqlite3.Connection) -> str:
        """What reads every page of it but those of long values."""
        if self.name == self.table:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({self.name})")]
            source = f"{self.table} NOT INDEXED"
        else:
            columns = self.columns(connection)
            _, where, condition = (self.sql or "").partition(" WHERE ")
            source = f"{self.table} INDEXED BY {self.name}{where}{condition}"
        sizes = " + ".join(f"length({name})" for name in columns)
        return f"SELECT sum({sizes}) FROM {source}"  # noqa: S608  # names of our schema

    def columns(self, connection: sqlite3.Connection) -> list[str]:
        return [row[2] for row in connection.execute(f"PRAGMA index_info({self.name})")]


@dataclass(frozen=True)
class Damaged:
    """A table, or an index of one."""

    name: str
    table: str
    why: str

    @property
    def index(self) -> bool:
        """Whether its table has all that is in it."""
        return self.name != self.table

    def __str__(self) -> str:
        return f"index {self.name} of table {self.table}" if self.index else f"table {self.name}"


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite says that the database itself is damaged."""
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT


def _trees(connection: sqlite3.Connection) -> Iterator[_Tree]:
    rows = connection.execute(
        "SELECT name, tbl_name, sql FROM sqlite_schema WHERE rootpage > 0 ORDER BY tbl_name, type DESC, name"
    )
    for row in rows.fetchall():
        if not _ASIDE.search(row[1]):
            yield _Tree(*row)


def unreadable(connection: sqlite3.Connection, *, tables: bool = True) -> list[Damaged]:
    """The indexes, and with ``tables`` the tables, that cannot be read to their end. Raises sqlite3.Error."""
    trees = [tree for tree in _trees(connection) if tables or tree.name != tree.table]
    found = (_unread(connection, tree) for tree in trees)
    return [one for one in found if one is not None]


def _unread(connection: sqlite3.Connection, tree: _Tree) -> Damaged | None:
    try:
        connection.execute(tree.query(connection)).fetchone()
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return Damaged(tree.name, tree.table, str(error))
    return None


def checked(connection: sqlite3.Connection, *, deep: bool) -> Iterator[Damaged]:
    """The tables and indexes in which SQLite finds damage; with ``deep`` also those that do not agree.

    Table by table, for as long as one is read the write-ahead log does not shrink. Raises sqlite3.Error.
    """
    trees = list(_trees(connection))
    for table in (tree.table for tree in trees if tree.name == tree.table):
        said = _said(connection, "integrity_check" if deep else "quick_check", table)
        if not said:
            continue
        unread = [_unread(connection, tree) for tree in trees if tree.table == table]
        found = [one for one in unread if one is not None]
        for each in said:
            if not found and (match := _INDEX.search(each)):
                found.append(Damaged(match[1], table, each))
        yield from found or [Damaged(table, table, f"in it or in an index of it: {said[0]}")]


def _said(connection: sqlite3.Connection, how: str, table: str) -> list[str]:
    """What a check of SQLite finds in a table and its indexes."""
    try:
        found = [str(row[0]) for row in connection.execute(f"PRAGMA {how}({table})")]
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return [str(error)]
    return [] if found == ["ok"] else [one.removeprefix("*** in database main ***\n") for one in found]


def remake(path: Path, damaged: Iterable[Damaged]) -> list[Damaged]:
    """Make damaged indexes again; returns those that were. Blocks, and holds the database for as long.

    Those of a table that is damaged too, or does not agree with its other indexes, are left as they are.
    Raises sqlite3.Error.
    """
    found = list(damaged)
    made: list[Damaged] = []
    for table in dict.fromkeys(one.table for one in found):
        of_table = [one for one in found if one.table == table]
        if all(one.index for one in of_table):
            with (
                closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as connection,
                suppress(_DisagreeingError),
            ):
                _remake(connection, table, {one.name for one in of_table})
                made += of_table
    return made


class _DisagreeingError(Exception):
    """Raised where a table and its indexes do not have the same rows."""


def _remake(connection: sqlite3.Connection, table: str, names: set[str]) -> None:
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("PRAGMA writable_schema = ON")
        for tree in _trees(connection):
            if tree.table == table and tree.name in names:
                connection.execute(_definition(connection, tree))
                connection.execute(
                    "UPDATE sqlite_schema SET rootpage ="
                    " (SELECT rootpage FROM sqlite_schema WHERE name = ?) WHERE name = ?",
                    (_NEW, tree.name),
                )
                connection.execute("DELETE FROM sqlite_schema WHERE name = ?", (_NEW,))
                connection.execute("PRAGMA writable_schema = RESET")  # it is read again from there
                connection.execute("PRAGMA writable_schema = ON")
        connection.execute("PRAGMA writable_schema = RESET")
        if _said(connection, "integrity_check", table):
            raise _DisagreeingError
    except (sqlite3.DatabaseError, _DisagreeingError) as error:
        connection.execute("ROLLBACK")
        if isinstance(error, _DisagreeingError | sqlite3.IntegrityError) or is_damage(error):
            raise _DisagreeingError from error
        raise
    connection.execute("COMMIT")


def _definition(connection: sqlite3.Connection, tree: _Tree) -> str:
    if tree.sql is None:
        return f"CREATE UNIQUE INDEX {_NEW} ON {tree.table} ({', '.join(tree.columns(connection))})"
    return tree.sql.replace(f" {tree.name} ", f" {_NEW} ", 1)
