"""Checking a journal: its chain, the heads that were signed, and on request the files that it names.

Theory of operation: the chain is one line, so the first record that differs ends the check of it. Files are
each on their own: all that are damaged are named, with their call, and the check goes on. So is what differs
of the index by which the calls of a session are found, of what was asked (``besides``), and each table and
index of the database in which SQLite finds damage (``btrees``).
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from sandboxd import canonical, errors
from sandboxd.journal import besides, btrees, chain, sessioncalls, signing
from sandboxd.journal.chain import GENESIS, Broken, Head
from sandboxd.journal.evidence import Evidence
from sandboxd.journal.upkeep import within

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

__all__ = ["Damage", "VerifyReport", "verify"]

_STEP = 500
_MOST = 16 << 20  # bytes of one step, from where it ends: a document may have 34 MiB
_MAX_DAMAGE = 1000
_OF_THE_QUEUE = "; a daemon that starts saves what it can, and calls that it cannot end as interrupted"
_QUERY = (
    "SELECT r.n, r.id, r.digest, r.header, i.id, i.state, i.doc, {pruned}, i.uid, i.key, i.cause"
    " FROM records AS r"
    " LEFT JOIN invocations AS i ON i.id = r.id "
)


@dataclass(frozen=True)
class Damage:
    """What is beside a record and not as it was, such as a file that it names: of which record, and what.

    0: of none.
    """

    n: int
    id: str
    what: str


@dataclass
class VerifyReport:
    """What checking the chain found. ``problem`` is None when all is as it was recorded."""

    head: Head = field(default_factory=lambda: Head(0, GENESIS))
    records: int = 0
    """Records that were checked, up to the first that differs."""
    pruned: int = 0
    """Records whose body was pruned: their headers still hold."""
    signed: int = 0
    """The newest record that a head vouches for that is signed with a key that is believed; 0: none is."""
    key: str | None = None
    """The id of the key that signed that head."""
    at: int | None = None
    """The number of the first record that differs."""
    problem: str | None = None
    files: int = 0
    """Streams and artifacts that were read, with ``deep``."""
    layers: int = 0
    """Layers of sessions that were read, of which ``unknown`` have no digest: see ``workspace.audit``."""
    unknown: int = 0
    note: str = ""
    """Why there are none."""
    remakable: bool = False
    """Whether an index is damaged that may be made again of its table or of the records."""
    damaged: list[Damage] = field(default_factory=list)
    """Streams and artifacts that differ or are gone, with ``deep``, records that the index of sessions has
    not, or has wrongly, and what differs of rows and requests; at most 1,000."""

    @property
    def ok(self) -> bool:
        """Whether the chain holds, and all that was looked at beside it."""
        return self.problem is None and not self.damaged


def verify(
    connection: sqlite3.Connection,
    expected: str | None = None,
    *,
    keys: Collection[str] = (),
    deep: Path | None = None,
) -> VerifyReport:
    """Check every record, that signed heads are in the chain, and that an exported head is.

    ``expected`` is a signed head (JSON), or a head as text (``N:sha256:…`` or ``sha256:…``). ``keys`` are
    the ids of the keys that heads may be signed with. ``deep`` is the state directory, whose streams and
    artifacts are then read too. Reads in steps, with constant memory. Raises InvalidRequest for a head that
    is none.
    """
    report = VerifyReport()
    wanted = _wanted(expected, keys)
    sessions = sessioncalls.Check(connection)
    try:
        _follow(connection, report, sessions, wanted, heads=_heads(connection, keys), deep=deep)
        _check_strays(connection, report.head.n)
    except Broken as broken:
        report.at, report.problem = broken.n, str(broken)
    except sqlite3.DatabaseError as error:  # heads, or what else is asked of calls
        if not btrees.is_damage(error):
            raise
        report.problem = f"the database is damaged ({error}), and not all could be checked"
    _look_at_database(connection, report, deep=deep is not None)
    _look_at_sessions(connection, sessions, report)
    _look_at_requests(connection, report)
    return report


def _follow(
    connection: sqlite3.Connection,
    report: VerifyReport,
    sessions: sessioncalls.Check,
    expected: tuple[tuple[int | None, str], bool, str | None],
    *,
    heads: dict[int, signing.SignedHead],
    deep: Path | None,
) -> None:
    """Go through the chain. Raises Broken at the first record that differs."""
    wanted, seen, signer = expected
    for n, id_, digest, data, row, state, body, pruned, *columns in _rows(connection, report):
        named = chain.follow(report.head, n, id_, digest, data)
        _check_row(n, id_, row, state)
        _check_body(n, named, body, pruned)
        if (vouched := heads.pop(n, None)) is not None:
            _check_signed(n, digest, vouched)
            report.signed, report.key = n, vouched.key
        report.head, report.records = Head(n, digest), n
        sessions.one(n, data)
        if differs := besides.differing(data, body, *columns):
            _note(report, Damage(n, id_, f"its row was changed: {differs} is not as in its record"))
        report.pruned += body is None
        if digest == wanted[1] and wanted[0] in {None, n}:
            seen = True
            if signer is not None:
                report.signed, report.key = n, signer
        if deep is not None and body is not None:
            _look(Evidence(deep), n, json.loads(data), report)
    last = report.head.n
    if not seen:
        head = wanted[1] if wanted[0] is None else str(Head(wanted[0], wanted[1]))
        raise Broken(
            last + 1, f"the head {head} is not in the chain: its newest records were cut off or replaced"
        )
    if heads:
        raise Broken(last + 1, f"the head of record {max(heads)} was signed: the newest records were cut off")


def _wanted(expected: str | None, keys: Collection[str]) -> tuple[tuple[int | None, str], bool, str | None]:
    """The head to look for, whether it is there anyway (genesis is in every chain), and who signed it."""
    if expected is None:
        return (None, ""), True, None
    signer = None
    if expected.lstrip().startswith("{"):
        signed = signing.SignedHead.parse(expected.encode())
        signed.check(keys)
        wanted: tuple[int | None, str] = signed.head.n, signed.head.digest
        signer = signed.key
    else:
        wanted = chain.parse_head(expected)
    return wanted, wanted[1] == GENESIS and wanted[0] in {None, 0}, signer


def _heads(connection: sqlite3.Connection, keys: Collection[str]) -> dict[int, signing.SignedHead]:
    """The heads that were signed on this node, each of which has to be in the chain."""
    heads = {}
    try:
        rows = connection.execute("SELECT n, signed FROM heads ORDER BY n").fetchall()
    except sqlite3.OperationalError:  # written before there were any
        return {}
    for n, data in rows:
        try:
            signed = signing.SignedHead.parse(data)
            signed.check(keys)
        except errors.SandboxdError as error:
            raise Broken(n, f"the signed head of record {n} does not hold: {error}") from None
        if signed.head.n != n:
            raise Broken(n, f"the signed head of record {n} is of record {signed.head.n}")
        heads[n] = signed
    return heads


def _query(connection: sqlite3.Connection) -> str:
    """What is read of records; an older version's journal does not say what was pruned, for nothing was."""
    columns = {row[1] for row in connection.execute("PRAGMA table_info(invocations)")}
    return _QUERY.format(pruned="i.pruned" if "pruned" in columns else "NULL")


def _rows(connection: sqlite3.Connection, report: VerifyReport) -> Iterator[tuple[Any, ...]]:
    """All records in order, in short reads: a long one would keep the write-ahead log from shrinking."""
    last, query = -(2**62), _query(connection)
    while True:
        try:
            found = connection.execute(query + "WHERE r.n > ? ORDER BY r.n LIMIT ?", (last, _STEP))
            rows = list(within(found, _MOST))
        except sqlite3.DatabaseError as error:
            yield from _one_by_one(connection, query, report, error)
            return
        if not rows:
            return
        yield from rows
        last = rows[-1][0]


def _one_by_one(
    connection: sqlite3.Connection, query: str, report: VerifyReport, error: sqlite3.DatabaseError
) -> Iterator[tuple[Any, ...]]:
    """What can still be read up to the damaged page, so that it is said which record is on it."""
    while True:
        n = report.head.n + 1
        try:
            row = connection.execute(query + "WHERE r.n = ?", (n,)).fetchone()
        except sqlite3.DatabaseError as damage:
            raise Broken(
                n, f"record {n}, or its call, cannot be read: the database is damaged there ({damage})"
            ) from error
        if row is None:
            raise Broken(n, f"the database is damaged: no more than {n - 1} records can be read ({error})")
        yield row


def _check_row(n: int, id_: str, row: str | None, state: str | None) -> None:
    if row is None:
        raise Broken(n, f"record {n} has lost its invocation {id_}")
    if state != "ended":
        raise Broken(n, f"invocation {id_} of record {n} was set back to {state}")


def _check_body(n: int, named: str, body: bytes | None, pruned: int | None) -> None:
    if body is None and pruned is None:
        raise Broken(n, f"the body of record {n} is gone, and it was not retention that took it")
    if body is not None and canonical.digest_bytes(body) != named:
        raise Broken(n, f"the body of record {n} was changed: it no longer has the digest in its header")


def _check_signed(n: int, digest: str, vouched: signing.SignedHead) -> None:
    if vouched.head.digest != digest:
        raise Broken(n, f"record {n} is not the one whose head was signed: the chain was replaced")


def _check_strays(connection: sqlite3.Connection, last: int) -> None:
    stray = connection.execute(
        "SELECT id FROM invocations AS i WHERE state = 'ended'"
        " AND NOT EXISTS (SELECT 1 FROM records WHERE id = i.id) LIMIT 1"
    ).fetchone()
    if stray:
        raise Broken(last + 1, f"invocation {stray[0]} has ended without a record in the chain")


def _look(evidence: Evidence, n: int, header: dict[str, Any], report: VerifyReport) -> None:
    """Read every file that a record names."""
    for what, problem in evidence.problems(header):
        report.files += 1
        if problem:
            _note(report, Damage(n, header["id"], f"{what} {problem}"))


def _note(report: VerifyReport, damage: Damage) -> None:
    if len(report.damaged) < _MAX_DAMAGE:
        report.damaged.append(damage)


def _look_at_database(connection: sqlite3.Connection, report: VerifyReport, *, deep: bool) -> None:
    found = list(btrees.checked(connection, deep=deep))
    for each in found:
        how = f"{each.why}{_OF_THE_QUEUE if each.name == 'queue' else ''}"
        _note(report, Damage(0, "", f"the {each} of the journal's database is damaged: {how}"))
    indexes = any(each.index for each in found)
    report.remakable = indexes and not any(each.name == "records" for each in found)


def _look_at_sessions(
    connection: sqlite3.Connection, check: sessioncalls.Check, report: VerifyReport
) -> None:
    """What differs of the index by which the calls of a session are found."""
    try:
        for n, problem in islice(check.rest(report.head.n), _MAX_DAMAGE):
            row = connection.execute("SELECT id FROM records WHERE n = ?", (n,)).fetchone()
            _note(report, Damage(n, row[0] if row else "", problem))
            report.remakable = report.remakable or report.problem is None
    except sqlite3.DatabaseError as error:
        _note(report, Damage(report.head.n, "", f"the index of sessions cannot be read: {error}"))
        report.remakable = report.remakable or report.problem is None


def _look_at_requests(connection: sqlite3.Connection, report: VerifyReport) -> None:
    """What differs of what was asked, also of calls that wait."""
    try:
        for id_, problem in islice(besides.requests_that_differ(connection), _MAX_DAMAGE):
            row = connection.execute("SELECT n FROM records WHERE id = ?", (id_,)).fetchone()
            _note(report, Damage(row[0] if row else 0, id_, problem if row else f"call {id_}: {problem}"))
    except sqlite3.DatabaseError as error:
        _note(report, Damage(0, "", f"what was asked cannot be read: {error}"))
