"""What can be saved of a damaged table of the queue, so that a daemon can go on.

Theory of operation: each call without an outcome is in ``invocations`` too. The rows of the queue are looked
up one by one, and those that can be read move into a new table; the damaged one stays aside, for its pages
cannot be freed. A call whose row is lost may have run, so it must not run again: without a row it is one of
which no request is known, and whoever starts next gives it the outcome of one that was interrupted.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING

from sandboxd.journal import btrees, schema

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["QUEUE", "save_queue"]

QUEUE = "queue"


def save_queue(path: Path) -> list[str]:
    """Put the table aside and make it again; returns the ids of calls that may have been in it and are lost.

    Blocks. Raises sqlite3.Error, and nothing is changed then.
    """
    with (
        closing(schema.connect_reader(path)) as reader,
        closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as connection,
    ):
        connection.execute("BEGIN IMMEDIATE")  # nobody writes between what is read and what is written
        rows, lost = _rows(reader)
        (table,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (QUEUE,)).fetchone()
        connection.execute(f"ALTER TABLE {QUEUE} RENAME TO {QUEUE}_damaged_{time.time_ns()}")
        connection.execute(table)
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {QUEUE} VALUES ({marks})", rows)  # noqa: S608
        connection.execute("COMMIT")
    return lost


def _rows(reader: sqlite3.Connection) -> tuple[list[tuple[object, ...]], list[str]]:
    rows, lost = [], []
    for (id_,) in reader.execute("SELECT id FROM invocations WHERE state != 'ended' ORDER BY id").fetchall():
        try:
            row = reader.execute("SELECT * FROM queue WHERE id = ?", (id_,)).fetchone()
        except sqlite3.DatabaseError as error:
            if not btrees.is_damage(error):
                raise
            lost.append(id_)
            continue
        if row is not None:
            rows.append(row)
    return rows, lost
