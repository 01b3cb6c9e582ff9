"""What is asked of the journal beside calls: contents by digest, what may be pruned, what blobs are named.

Each function takes a connection; ``Journal`` runs those that read in its readers and those that write in its
writer.
"""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "Kept",
    "Row",
    "after",
    "content",
    "held",
    "keep",
    "oldest",
    "prune",
    "pruned_among",
    "referenced",
    "releases",
    "within",
]

MOST = 16 << 20  # bytes of documents that are read at once, from where it ends: one may have 34 MiB
_SIZED = bytes | str

_FILES = (
    "SELECT sum(size) FROM (SELECT max(size) AS size FROM (SELECT digest, size FROM artifacts"
    " UNION ALL SELECT digest, size FROM request_blobs) GROUP BY digest)"
)


class Row(NamedTuple):
    """A record, as the index wants it. ``doc`` is None where it was pruned."""

    n: int
    id: str
    header: bytes
    doc: bytes | None


class Kept(NamedTuple):
    """A call whose body is kept: its record, when it ended, what it holds on disk, shared files included.

    ``files`` are its artifacts and inputs: sizes by digest.
    """

    n: int
    id: str
    at: int
    bytes: int
    files: dict[str, int]


def within(cursor: sqlite3.Cursor, most: int) -> Iterator[tuple[Any, ...]]:
    """Rows, until ``most`` bytes of them were read; at least one."""
    size = 0
    with closing(cursor):  # what is not read to its end holds the database as it was
        for row in cursor:
            yield row
            for value in row:
                if isinstance(value, _SIZED):
                    size += len(value)
            if size >= most:
                return


def after(connection: sqlite3.Connection, n: int, limit: int) -> list[Row]:
    """The records after number ``n``, or the first of them: what has ``MOST`` bytes is enough."""
    rows = connection.execute(
        "SELECT r.n, r.id, r.header, i.doc FROM records AS r LEFT JOIN invocations AS i ON i.id = r.id"
        " WHERE r.n > ? ORDER BY r.n LIMIT ?",
        (n, limit),
    )
    return [Row(*row) for row in within(rows, MOST)]


def content(connection: sqlite3.Connection, digest: str) -> bytes | None:
    """What was kept under a digest."""
    row = connection.execute("SELECT data FROM contents WHERE digest = ?", (digest,)).fetchone()
    return row[0] if row else None


def keep(connection: sqlite3.Connection, contents: Mapping[str, bytes]) -> None:
    """Keep contents under their digests, each once."""
    connection.executemany(
        "INSERT OR IGNORE INTO contents (digest, data) VALUES (?, ?)", list(contents.items())
    )


def oldest(connection: sqlite3.Connection, limit: int) -> list[Kept]:
    """The oldest calls whose bodies are kept, by when they ended: a clock that was ahead holds nothing up."""
    rows = connection.execute(
        "SELECT n, id, coalesce(at, 0), bytes"
        " + coalesce((SELECT length(contents) FROM requests WHERE id = records.id), 0),"
        " (SELECT json_group_object(digest, size) FROM (SELECT digest, size FROM artifacts"
        " WHERE id = records.id UNION SELECT digest, size FROM request_blobs WHERE id = records.id))"
        " FROM records WHERE bytes > 0 ORDER BY at, n LIMIT ?",
        (limit,),
    )
    found = []
    for n, id_, at, size, named in rows:
        files = json.loads(named)
        found.append(Kept(n, id_, at, size + sum(files.values()), files))
    return found


def held(connection: sqlite3.Connection) -> int:
    """Bytes of all bodies, streams, inputs and artifacts; a file of several calls counts once."""
    questions = (
        "SELECT sum(bytes) FROM records WHERE bytes > 0",
        "SELECT sum(length(contents)) FROM requests",
        _FILES,
    )
    return sum(int(connection.execute(question).fetchone()[0] or 0) for question in questions)


def prune(connection: sqlite3.Connection, calls: Iterable[tuple[int, str]], at: int) -> int:
    """Take the bodies of these calls away, and what is known of them only for their bodies' sake."""
    done = 0
    for n, id_ in calls:
        # in any case: a record without its invocation must not come up again for ever
        connection.execute("UPDATE records SET bytes = 0 WHERE n = ?", (n,))
        row = connection.execute("SELECT doc FROM invocations WHERE id = ?", (id_,)).fetchone()
        changed = connection.execute(
            "UPDATE invocations SET doc = NULL, pruned = ? WHERE id = ? AND state = 'ended'", (at, id_)
        ).rowcount
        if not changed:
            continue
        for table in ("artifacts", "request_blobs", "requests"):
            connection.execute(f"DELETE FROM {table} WHERE id = ?", (id_,))  # noqa: S608  # constants
        connection.execute("DELETE FROM callbacks WHERE id = ? AND done IS NOT NULL", (id_,))
        connection.executemany(
            "DELETE FROM labels WHERE name = ? AND value = ? AND id = ?",
            [(name, value, id_) for name, value in _labels(row[0] if row else None).items()],
        )
        done += 1
    return done


def _labels(doc: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(doc or b"{}").get("labels")
    except (ValueError, AttributeError, RecursionError):  # it is damaged: what it says is not known
        return {}
    return found if isinstance(found, dict) else {}


def pruned_among(connection: sqlite3.Connection, ids: Sequence[str]) -> list[str]:
    """Those of these calls that were pruned."""
    marks = ",".join("?" * len(ids))
    query = f"SELECT id FROM invocations WHERE pruned IS NOT NULL AND id IN ({marks})"  # noqa: S608  # marks
    return [row[0] for row in connection.execute(query, list(ids))]


def referenced(connection: sqlite3.Connection, digests: Collection[str]) -> set[str]:
    """Those of these blobs that the record of a kept call names, or a request that waits, runs or ran."""
    marks = ",".join("?" * len(digests))
    found: set[str] = set()
    for table in ("artifacts", "request_blobs"):
        query = f"SELECT DISTINCT digest FROM {table} WHERE digest IN ({marks})"  # noqa: S608  # constants
        found.update(row[0] for row in connection.execute(query, list(digests)))
    return found


def releases(connection: sqlite3.Connection, digest: str, uid: int | None, limit: int) -> list[Row]:
    """The newest calls that released a file of this digest, of one caller or of all; bounded as ``after``."""
    rows = connection.execute(
        "SELECT r.n, r.id, r.header, i.doc FROM artifacts AS a JOIN invocations AS i ON i.id = a.id"
        " JOIN records AS r ON r.id = a.id WHERE a.digest = ? AND (? IS NULL OR i.uid = ?)"
        " ORDER BY a.id DESC LIMIT ?",
        (digest, uid, uid, limit),
    )
    return [Row(*row) for row in within(rows, MOST)]
