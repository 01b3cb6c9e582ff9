"""The index of the records: full text over commands and the heads of output, with filters.

Theory of operation: a database of its own, ``search.sqlite3``, written by one thread after calls have ended,
so that no call waits for it. All of it can be made again from the records: what is damaged, of another
journal or of another version, is thrown away. Each caller's texts are in a table of their own, so that what
others ran decides neither what a caller finds nor how long that takes. A filter is a word of the column
``facts``, so that SQLite's FTS5 narrows by it before it looks at a row; a caller's words never reach that
column. FTS5 looks at no clock while it passes over rows that do not fit: that is bounded by the number of
words and of the caller's rows. It has a snippet function too, whose time grows with the square of what is
found in a row, so snippets are made here. Times of rows never go back, so that a range of time is a range of
rows even where the host's clock was set back.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
import sqlite3
import threading
import time
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from sandboxd import errors, models
from sandboxd.journal.schema import keep_private

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

__all__ = ["Entry", "Query", "SearchIndex", "command_text"]

VERSION = 2
HEAD = 2048  # bytes of a command or a stream that are indexed
MAX_QUERY = 1000
MAX_WORDS = 32  # each costs time at each row
MAX_WITH_PREFIX = 8  # of them beside a ``word*``, for which all rows are asked at once: see ``_matching``
SECONDS = 5.0  # that one search may take
_STEPS = 100  # of SQLite's machine between two looks at the clock: one that asks FTS5 can take 100 ms
_SNIPPET = 24  # words
_BEFORE = 4  # of them before the first that was found
_WORD = re.compile(r"[^\W_]+")
_SCHEMA = (
    """CREATE TABLE calls (
        n INTEGER PRIMARY KEY, id TEXT NOT NULL, at INTEGER NOT NULL, ended INTEGER NOT NULL,
        uid INTEGER NOT NULL, policy TEXT NOT NULL, cause TEXT NOT NULL, image TEXT NOT NULL,
        texts INTEGER NOT NULL DEFAULT TRUE
    ) STRICT""",
    "CREATE INDEX calls_times ON calls (at)",
    "CREATE TABLE callers (uid INTEGER PRIMARY KEY) STRICT",
)
_TEXTS = "CREATE VIRTUAL TABLE {} USING fts5(command, stdout, stderr, facts, tokenize = 'unicode61')"

log = structlog.get_logger(__name__)


class Entry(NamedTuple):
    """What is indexed of a call."""

    n: int
    id: str
    ended: int
    uid: int
    policy: str
    cause: str
    image: str
    command: str
    stdout: str
    stderr: str

    def facts(self) -> str:
        """The words of the filters that it fits."""
        return " ".join(Query(policy=self.policy, cause=self.cause, image=self.image).facts())


@dataclass(frozen=True)
class Query:
    """What is looked for; all that is given must hold. ``text`` is in the language of SQLite's FTS5.

    ``since`` and ``until`` are microseconds since the epoch; ``before`` is the number of a record.
    """

    text: str = ""
    uid: int | None = None
    policy: str | None = None
    cause: str | None = None
    image: str | None = None
    since: int | None = None
    until: int | None = None
    before: int | None = None
    limit: int = 100

    def facts(self) -> list[str]:
        """The words of the filters."""
        return [
            _word(kind, value)
            for kind, value in (("p", self.policy), ("c", self.cause), ("i", self.image))
            if value is not None
        ]


def _word(kind: str, value: str) -> str:
    return kind + hashlib.sha256(value.encode()).hexdigest()[:20]


def _texts(uid: int) -> str:
    """The name of the table of a caller's texts."""
    return f"texts_{uid:d}"


def command_text(argv: Sequence[str | models.Bytes]) -> str:
    """The head of a command as one text."""
    words = (word if isinstance(word, str) else word.decode().decode("utf-8", "replace") for word in argv)
    return readable(shlex.join(words).encode("utf-8", "replace")[:HEAD])


def readable(data: bytes) -> str:
    """Bytes of a tool as text that can be indexed and shown: no control characters but new lines and tabs."""
    text = data[:HEAD].decode("utf-8", "replace")
    return "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)


class _TooLongError(Exception):
    """Raised when the time of a search is over."""


def _too_long() -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"this search takes more than {SECONDS:.0f} s; narrow it by a word, a policy or a time", field="q"
    )


class SearchIndex:
    """All of it may be called from any thread, and blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing = threading.RLock()
        self._writer: sqlite3.Connection | None = None

    @property
    def last(self) -> tuple[int, str]:
        """The newest record that is in it: its number and id. Raises what SQLite does."""
        with self._writing:
            row = self._open().execute("SELECT n, id FROM calls ORDER BY n DESC LIMIT 1").fetchone()
        return (row[0], row[1]) if row else (0, "")

    def _open(self) -> sqlite3.Connection:
        if self._writer is None:
            try:
                self._writer = self._prepared()
            except sqlite3.DatabaseError as error:
                log.warning("the index of the records is made again", reason=str(error))
                self.remove()
                self._writer = self._prepared()
        return self._writer

    def _prepared(self) -> sqlite3.Connection:
        keep_private(self._path)
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=5.0, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in {0, VERSION}:
                raise sqlite3.DatabaseError(f"it is of version {version}")
            if version == 0:
                connection.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.execute("COMMIT")
            connection.execute("SELECT max(at) FROM calls").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def remove(self) -> None:
        """Throw all of it away."""
        with self._writing:
            self.close()
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Close it. Safe to call twice."""
        with self._writing:
            writer, self._writer = self._writer, None
            if writer is not None:
                with contextlib.suppress(sqlite3.Error):
                    writer.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def after(self, n: int, limit: int) -> list[tuple[int, str]]:
        """Numbers and ids of the calls whose texts are in it, after number ``n``. Raises what SQLite does."""
        with self._writing:
            return self._open().execute(
                "SELECT n, id FROM calls WHERE n > ? AND texts ORDER BY n LIMIT ?", (n, limit)
            ).fetchall()  # fmt: skip

    def add(self, entries: Iterable[Entry], without: Collection[int] = ()) -> None:
        """Index calls, in the order of their records, in one transaction. Raises what SQLite does.

        Those of the numbers ``without`` are passed over; the newest stays as the place where it goes on.
        """
        with self._transaction() as connection:
            high = connection.execute("SELECT at FROM calls ORDER BY n DESC LIMIT 1").fetchone()
            at = high[0] if high else 0
            for entry in entries:
                at = max(at, entry.ended)
                connection.execute(
                    "INSERT INTO calls (n, id, at, ended, uid, policy, cause, image)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (entry.n, entry.id, at, *entry[2:7]),
                )
                table = _texts(entry.uid)
                if connection.execute("INSERT OR IGNORE INTO callers VALUES (?)", (entry.uid,)).rowcount:
                    connection.execute(_TEXTS.format(table))
                if entry.n not in without:
                    connection.execute(
                        f"INSERT INTO {table} (rowid, command, stdout, stderr, facts)"  # noqa: S608
                        " VALUES (?, ?, ?, ?, ?)",
                        (entry.n, entry.command, entry.stdout, entry.stderr, entry.facts()),
                    )
            self._forget(connection, without)

    def forget(self, numbers: Sequence[int]) -> None:
        """Take the texts of calls out; that they were there stays. Raises what SQLite does."""
        with self._transaction() as connection:
            self._forget(connection, numbers)

    @staticmethod
    def _forget(connection: sqlite3.Connection, numbers: Collection[int]) -> None:
        for n in numbers:
            row = connection.execute(
                "UPDATE calls SET texts = FALSE WHERE n = ? RETURNING uid", (n,)
            ).fetchone()
            if row is not None:
                (uid,) = row
                connection.execute(f"DELETE FROM {_texts(uid)} WHERE rowid = ?", (n,))  # noqa: S608
            connection.execute("DELETE FROM calls WHERE n = ? AND n < (SELECT max(n) FROM calls)", (n,))

    def find(self, query: Query) -> models.SearchResults:
        """A page of calls that fit, newest first. Blocks.

        Raises InvalidRequest for a text that is none of FTS5's, and for a search that takes too long;
        HostFailed where the index cannot be read.
        """
        match = _match(query)
        if not self._path.exists():  # it is being made
            return models.SearchResults()
        try:
            with contextlib.closing(
                sqlite3.connect(self._path, isolation_level=None, timeout=5.0, check_same_thread=False)
            ) as connection:
                connection.execute("PRAGMA query_only = ON")
                until = time.monotonic() + SECONDS
                connection.set_progress_handler(lambda: time.monotonic() > until, _STEPS)
                return _page(connection, query, match, until)
        except _TooLongError:
            raise _too_long() from None
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
                raise _too_long() from None
            if "no such table" in str(error):  # as above
                return models.SearchResults()
            raise errors.HostFailed(f"the index of the records cannot be read: {error}") from error
        except sqlite3.DatabaseError as error:
            raise errors.HostFailed(
                f"the index of the records is damaged ({error}) and will be made again"
            ) from error


def _match(query: Query) -> str | None:
    """The expression of FTS5: the filters, and what the caller wrote if that is an expression by itself."""
    facts = " AND ".join(query.facts())
    words = query.text.strip()
    if not words:
        return f"facts : ({facts})" if facts else None
    if len(words) > MAX_QUERY or "\0" in words:
        raise errors.InvalidRequest(f"a search has at most {MAX_QUERY} characters, and no NUL", field="q")
    most = MAX_WITH_PREFIX if "*" in words else MAX_WORDS
    if len(_WORD.findall(words)) > most:
        raise errors.InvalidRequest(
            f"a search has at most {MAX_WORDS} words, and {MAX_WITH_PREFIX} if one of them is word*",
            field="q",
        )
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        # By itself, so that no parenthesis in it can end ours; and where no column has the filters.
        connection.execute("CREATE VIRTUAL TABLE texts USING fts5(command, stdout, stderr)")
        try:
            connection.execute("SELECT 1 FROM texts WHERE texts MATCH ?", (words,)).fetchall()
        except sqlite3.Error as error:
            reason = str(error).removeprefix("fts5: ")
            raise errors.InvalidRequest(
                f"q is no search: {reason}; write words, AND, OR, NOT, word*, or put text that has other "
                'characters into double quotes, such as "a-b.txt"',
                field="q",
            ) from None
    text = f"{{command stdout stderr}} : ({words})"
    return f"facts : ({facts}) AND {text}" if facts else text


def _page(
    connection: sqlite3.Connection, query: Query, match: str | None, until: float
) -> models.SearchResults:
    connection.execute("BEGIN")
    indexed = connection.execute("SELECT max(n) FROM calls").fetchone()[0] or 0
    first, last = _range(connection, query)
    limit = max(1, min(query.limit, 500))
    newest: list[tuple[int, int]] = []
    """Numbers of the newest calls that fit, and whose they are."""
    for (uid,) in connection.execute("SELECT uid FROM callers").fetchall():
        if query.uid in {None, uid}:
            if time.monotonic() > until:
                raise _TooLongError
            low = newest[limit][0] if len(newest) > limit else first
            found = _numbers(connection, uid, match, (low, min(last, indexed), limit + 1))
            newest = sorted([*newest, *((n, uid) for n in found)], reverse=True)[: limit + 1]
    rows = [_row(connection, uid, n) for n, uid in newest]
    places = _Found(query.text)
    hits = [
        models.Hit(
            n=row[0], id=row[1], at=row[2], uid=row[3], policy=row[4], cause=models.Cause(row[5]),
            image=row[6],
            command=row[7], snippet=places.snippet(row[7:10]),
        )
        for row in rows[:limit]
    ]  # fmt: skip
    return models.SearchResults(hits=hits, next=hits[-1].n if len(rows) > limit else None, indexed=indexed)


def _numbers(
    connection: sqlite3.Connection, uid: int, match: str | None, bounds: tuple[int, int, int]
) -> list[int]:
    """Of the newest calls of one caller that fit: ``bounds`` are the first and the last, and how many."""
    table = _texts(uid)
    statement = f"SELECT rowid FROM {table} WHERE rowid BETWEEN ? AND ?"  # noqa: S608
    values: tuple[int | str, ...] = bounds[:2]
    if match is not None:
        statement, values = f"{statement} AND {table} MATCH ?", (*values, match)
    found = connection.execute(f"{statement} ORDER BY rowid DESC LIMIT ?", (*values, bounds[2]))
    return [n for (n,) in found]


def _row(connection: sqlite3.Connection, uid: int, n: int) -> tuple[Any, ...]:
    statement = (
        "SELECT c.n, c.id, c.ended, c.uid, c.policy, c.cause, c.image, t.command, t.stdout, t.stderr"  # noqa: S608
        f" FROM calls AS c JOIN {_texts(uid)} AS t ON t.rowid = c.n WHERE c.n = ?"
    )
    row: tuple[Any, ...] = connection.execute(statement, (n,)).fetchone()
    return row


class _Found:
    """Shows where the words of a search are in a text."""

    def __init__(self, query: str) -> None:
        self._words = {_folded(word) for word in _WORD.findall(query)} - {""}
        self._prefixes = tuple(_folded(word) for word in re.findall(r"([^\W_]+)[\"\s]*\*", query))

    def _is(self, word: str) -> bool:
        folded = _folded(word)
        return folded in self._words or folded.startswith(self._prefixes)

    def snippet(self, texts: Sequence[str]) -> str:
        """Some words around the first one that was found, with those that were in brackets."""
        for text in texts if self._words else ():
            words = list(_WORD.finditer(text))
            at = next((number for number, word in enumerate(words) if self._is(word[0])), None)
            if at is None:
                continue
            first = max(0, at - _BEFORE)
            part = words[first : first + _SNIPPET]
            shown, position = ["…" if first else ""], part[0].start() if first else 0
            for word in part:
                shown += [text[position : word.start()], f"[{word[0]}]" if self._is(word[0]) else word[0]]
                position = word.end()
            shown.append("…" if first + len(part) < len(words) else text[position:])
            return "".join(shown)
        return ""


def _folded(word: str) -> str:
    """A word as FTS5 compares it: without case and diacritics."""
    if word.isascii():
        return word.lower()
    parts = unicodedata.normalize("NFKD", word.casefold())
    return "".join(char for char in parts if not unicodedata.combining(char))


def _range(connection: sqlite3.Connection, query: Query) -> tuple[int, int]:
    """The first and last number that a time and a page allow."""
    first, last = 0, 2**62
    if query.since is not None:
        row = connection.execute(
            "SELECT n FROM calls WHERE at >= ? ORDER BY at, n LIMIT 1", (query.since,)
        ).fetchone()
        first = row[0] if row else last
    if query.until is not None:
        row = connection.execute(
            "SELECT n FROM calls WHERE at <= ? ORDER BY at DESC, n DESC LIMIT 1", (query.until,)
        ).fetchone()
        last = row[0] if row else -1
    return first, last if query.before is None else min(last, query.before - 1)
