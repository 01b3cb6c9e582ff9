"""The calls of a session in the order in which they ended: an index beside the records.

Theory of operation.  ``session_records`` has session and number of each record whose header names a session.
A row comes with its record, in one transaction, and stays: a header is kept when its body goes, so what was
pruned is in the line too. The index only finds: whoever reads by it looks at the headers it leads to, and
``verify`` compares it with all of them, both ways. It can be made again from them (``fill``).
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd import errors
from sandboxd.journal.upkeep import within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "STEP",
    "TABLE",
    "Check",
    "SessionCall",
    "add",
    "calls_of",
    "check_records",
    "fill",
    "indexed",
    "numbers_of",
    "session_of",
]

TABLE = """CREATE TABLE session_records (
    session TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (session, n)
) STRICT, WITHOUT ROWID"""
STEP = 1000
"""Records that are looked at in one read."""
_MOST = 16 << 20  # bytes of headers in one read
_DAMAGED_STEPS = 1000  # in which records are looked for one by one, before the rest is given up
_KEY = b'"session":'
_STREAM = rb'(?:null|\{"digest":"[^"\\]*","size":[0-9]+\})'
_SESSION = re.compile(
    rb',"session":"([^"\\]*)","stderr":%b,"stdout":%b,"tar":(?:null|"[^"\\]*"),"type":"outcome",'
    % (_STREAM, _STREAM)
)


@dataclass(frozen=True, slots=True)
class SessionCall:
    """One call; ``before`` and ``after`` are digests of checkpoints, ``before`` None if it had no turn."""

    id: str
    before: str | None
    after: str | None
    pruned: bool


def session_of(header: bytes) -> str | None:
    """The session that a header names; None where it names none, or is no JSON.

    A quote within a text is escaped, so what is there once, before the members that follow it in a header's
    canonical form, is that member: no object within a header has those. All else is parsed.
    """
    count = header.count(_KEY)
    if count == 0:
        return None
    found = _SESSION.search(header) if count == 1 else None
    if found is not None:
        return found[1].decode("utf-8", "replace")
    named = _object(header).get("session")
    return named if isinstance(named, str) else None


def _object(header: bytes) -> dict[str, Any]:
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):  # for `verify` to find
        return {}
    return found if isinstance(found, dict) else {}


def add(connection: sqlite3.Connection, session: str, n: int) -> None:
    """Note a record of a session, in the transaction that adds the record."""
    connection.execute("INSERT OR IGNORE INTO session_records (session, n) VALUES (?, ?)", (session, n))


def indexed(connection: sqlite3.Connection) -> bool:
    """Whether there is an index; a journal that an older version left has none."""
    query = "SELECT 1 FROM sqlite_schema WHERE name = 'session_records'"
    return connection.execute(query).fetchone() is not None


def fill(
    connection: sqlite3.Connection, reader: sqlite3.Connection, tell: Callable[[], object] = lambda: None
) -> int:
    """Make the index again, in a transaction of ``connection``; returns how many records have a session.

    What cannot be read is left out: ``verify`` names it. It is read with another connection, for a damaged
    page that is read in a transaction spoils all of that. ``tell`` is called now and then.
    """
    if _readable(reader):
        connection.execute("DELETE FROM session_records")
    else:
        aside = f"session_records_damaged_{time.time_ns()}"  # pages that cannot be read cannot be freed
        connection.execute(f"ALTER TABLE session_records RENAME TO {aside}")
        connection.execute(TABLE)
    filled = 0
    for found in _scan(reader):
        connection.executemany("INSERT OR IGNORE INTO session_records (session, n) VALUES (?, ?)", found)
        filled += len(found)
        tell()
    return filled


def check_records(reader: sqlite3.Connection) -> None:
    """See that all records can be read: of the others the index may be the last that is known.

    Raises JournalCorrupt, which names the first that cannot be, or is gone.
    """
    last, newest = 0, None
    try:
        newest = reader.execute("SELECT coalesce(max(n), 0) FROM heads").fetchone()[0]
        for n, _ in reader.execute("SELECT n, max(instr(header, ?), 0) FROM records ORDER BY n", (_KEY,)):
            if n != last + 1:
                break
            last = n
        else:
            if last >= newest:
                return
    except sqlite3.DatabaseError as error:
        if not _damaged(error):
            raise
    what = f"record {last + 1}" if newest is not None else "what was signed of records"
    raise errors.JournalCorrupt(
        f"{what} cannot be read, or is gone, so the index of sessions is left as it is: it would "
        "lose calls; see `sandboxd journal verify`, and restore the journal from a backup",
        record=last + 1,
    )


def _readable(reader: sqlite3.Connection) -> bool:
    """Whether the index, if there is one, can be read."""
    try:
        if indexed(reader):
            reader.execute("SELECT count(*) FROM session_records").fetchone()
    except sqlite3.DatabaseError as error:
        if not _damaged(error):
            raise
        return False
    return True


def _damaged(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT


def _scan(connection: sqlite3.Connection) -> Iterator[list[tuple[str, int]]]:
    """Session and number of all records that name one, in steps; those that can be read."""
    first, damaged = 1, 0
    while True:
        try:
            found, last = _step(connection, first, STEP)
        except sqlite3.DatabaseError as error:
            damaged += 1
            if not _damaged(error):
                raise
            if damaged > _DAMAGED_STEPS:
                return
            found, last = [], first + STEP - 1
            for n in range(first, last + 1):
                with suppress(sqlite3.DatabaseError):
                    found += _step(connection, n, 1, most=n)[0]
        if last is None:
            return
        yield found
        first = last + 1


def _step(
    connection: sqlite3.Connection, first: int, limit: int, *, most: int = 2**62
) -> tuple[list[tuple[str, int]], int | None]:
    """What is found among records from a number on, and the number of the last; None where there is none."""
    found, last = [], None
    rows = connection.execute(
        "SELECT n, CASE WHEN instr(header, ?) THEN header END FROM records"
        " WHERE n >= ? AND n <= ? ORDER BY n LIMIT ?",
        (_KEY, first, most, limit),
    )
    for n, header in within(rows, _MOST):
        last = n
        session = None if header is None else session_of(header)
        if session is not None:
            found.append((session, n))
    return found, last


def calls_of(
    connection: sqlite3.Connection, session: str, *, above: int
) -> tuple[list[SessionCall], int | None]:
    """The next calls of a session above a number, and the number to go on from; None at the end.

    Records whose headers do not say that they are of this session are left out.
    """
    rows = connection.execute(
        "SELECT r.n, r.id, r.header, i.id IS NOT NULL AND i.doc IS NULL FROM session_records AS s"
        " JOIN records AS r ON r.n = s.n LEFT JOIN invocations AS i ON i.id = r.id"
        " WHERE s.session = ? AND s.n > ? ORDER BY s.n LIMIT ?",
        (session, above, STEP),
    )
    found, last = [], None
    for n, id_, header, pruned in within(rows, _MOST):
        last = n
        said = _object(header)
        if said.get("session") == session:
            before, after = said.get("checkpoint_before"), said.get("checkpoint_after")
            found.append(SessionCall(id_, before, after, bool(pruned)))
    return found, last


def numbers_of(connection: sqlite3.Connection, session: str) -> list[tuple[int, str]]:
    """Numbers and ids of the records of a session, in order.

    Without an index, or with one that cannot be read, all headers are looked at.
    """
    numbers = None
    if indexed(connection):
        with suppress(sqlite3.DatabaseError):
            rows = connection.execute(
                "SELECT n FROM session_records WHERE session = ? ORDER BY n", (session,)
            )
            numbers = [n for (n,) in rows]
    if numbers is None:
        numbers = [n for step in _scan(connection) for named, n in step if named == session]
    found = []
    for n in numbers:
        row = connection.execute("SELECT id, header FROM records WHERE n = ?", (n,)).fetchone()
        if row is not None and session_of(row[1]) == session:
            found.append((n, row[0]))
    return found


class Check:
    """Compares the index with the headers of a chain, as they are gone through from the first on.

    Sums of hashes are compared, with a key that is new in each process; only where they differ is each record
    looked for.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._indexed = indexed(connection)
        self._count = self._sum = 0

    def one(self, n: int, header: bytes) -> None:
        """The next record."""
        session = session_of(header) if self._indexed else None
        if session is not None:
            self._count += 1
            self._sum += hash((session, n))

    def rest(self, last: int) -> Iterator[tuple[int, str]]:
        """Records that the index has not, or has wrongly, up to the last that was gone through, and how.

        Raises sqlite3.Error.
        """
        if not self._indexed or self._same(last):
            return
        query = "SELECT 1 FROM session_records WHERE session = ? AND n = ?"
        for step in _scan(self._connection):
            for session, n in step:
                if n <= last and self._connection.execute(query, (session, n)).fetchone() is None:
                    yield n, f"the index of sessions does not have it among those of session {session}"
        rows = self._connection.execute(
            "SELECT s.session, s.n, r.header FROM session_records AS s LEFT JOIN records AS r ON r.n = s.n"
            " WHERE s.n <= ? OR r.n IS NULL",
            (last,),
        )
        for session, n, header in rows:
            if header is None:
                yield n, f"the index of sessions has it for session {session}, and there is no such record"
            elif session_of(header) != session:
                yield n, f"the index of sessions has it for session {session}, which it does not name"

    def _same(self, last: int) -> bool:
        count = total = highest = 0
        for session, n in self._connection.execute("SELECT session, n FROM session_records"):
            highest = max(highest, n)
            if n <= last:
                count += 1
                total += hash((session, n))
        newest = self._connection.execute("SELECT coalesce(max(n), 0) FROM records").fetchone()[0]
        return (count, total) == (self._count, self._sum) and highest <= newest
