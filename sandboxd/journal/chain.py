"""The chain of records: each header holds the digest of the one before it.

Theory of operation: a header is canonical JSON (RFC 8785). Its number ``n`` counts from 1 without
gaps; ``prev`` is the digest of the whole header before it, and of ``GENESIS`` for the first. A changed
header no longer has the digest that the next one names, a removed or moved one breaks the numbers, and
a body that was changed no longer has the digest in its header. Cutting off the newest records cannot
be seen from within; whoever exported an earlier head can.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd import canonical, errors

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

__all__ = ["GENESIS", "Head", "VerifyReport", "append", "read_head", "verify"]

GENESIS = "sha256:" + "0" * 64
_STEP = 500
_HEAD = re.compile(r"(?:(\d{1,15}):)?(sha256:[0-9a-f]{64})")


@dataclass(frozen=True)
class Head:
    """The newest record: its number (0: there is none yet) and its digest."""

    n: int
    digest: str

    def __str__(self) -> str:
        return f"{self.n}:{self.digest}"


@dataclass(frozen=True)
class VerifyReport:
    """What checking the chain found. ``problem`` is None when all is as it was recorded."""

    head: Head
    records: int
    """Records that were checked, up to the first that differs."""
    pruned: int
    """Records whose body was pruned: their headers still hold."""
    at: int | None = None
    """The number of the first record that differs."""
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the chain holds."""
        return self.problem is None


def read_head(connection: sqlite3.Connection) -> Head:
    """The newest record of a journal."""
    row = connection.execute("SELECT n, digest FROM records ORDER BY n DESC LIMIT 1").fetchone()
    return Head(*row) if row else Head(0, GENESIS)


def append(connection: sqlite3.Connection, head: Head, header: dict[str, Any], body: bytes) -> Head:
    """Add a record after ``head`` and return the new head. ``header`` gets ``n``, ``prev`` and ``body``."""
    whole = {**header, "n": head.n + 1, "prev": head.digest, "body": canonical.digest_bytes(body)}
    data = canonical.canonical(whole)
    new = Head(head.n + 1, canonical.digest_bytes(data))
    connection.execute(
        "INSERT INTO records (n, id, digest, header) VALUES (?, ?, ?, ?)",
        (new.n, header["id"], new.digest, data),
    )
    return new


def _rows(connection: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """All records in order, in short reads: a long one would keep the write-ahead log from shrinking."""
    last = -(2**62)
    while True:
        rows = connection.execute(
            "SELECT r.n, r.id, r.digest, r.header, i.id, i.state, i.doc FROM records AS r"
            " LEFT JOIN invocations AS i ON i.id = r.id WHERE r.n > ? ORDER BY r.n LIMIT ?",
            (last, _STEP),
        ).fetchall()
        yield from rows
        if len(rows) < _STEP:
            return
        last = rows[-1][0]


def _header_problem(
    head: Head, n: int, id_: str, digest: str, data: bytes
) -> tuple[str | None, dict[str, Any]]:
    if n != head.n + 1:
        return f"record {head.n + 1} is missing: record {n} follows {head.n}", {}
    if canonical.digest_bytes(data) != digest:
        return f"record {n} was changed: its header no longer has its digest", {}
    try:
        header = json.loads(data)
    except ValueError:
        return f"record {n} is no JSON", {}
    if not isinstance(header, dict) or header.get("n") != n or header.get("id") != id_:
        return f"record {n} is not the record of its place: it was moved or changed", {}
    if header.get("prev") != head.digest:
        return f"record {n} does not follow record {head.n}: one of them was changed, moved or replaced", {}
    return None, header


def verify(connection: sqlite3.Connection, expected: str | None = None) -> VerifyReport:
    """Check every record, and that an exported head (``N:sha256:…`` or ``sha256:…``) is in the chain.

    Reads in steps, with constant memory. Raises InvalidRequest for a head that is none.
    """
    wanted = _HEAD.fullmatch(expected) if expected is not None else None
    if expected is not None and wanted is None:
        raise errors.InvalidRequest("a head is N:sha256:<64 hex digits>", field="head")
    # Genesis is in every chain: a head exported before the first record.
    seen = wanted is None or (wanted[2] == GENESIS and wanted[1] in {None, "0"})
    head, pruned = Head(0, GENESIS), 0
    for n, id_, digest, data, row, state, body in _rows(connection):
        problem, header = _header_problem(head, n, id_, digest, data)
        if problem is None and row is None:
            problem = f"record {n} has lost its invocation {id_}"
        if problem is None and state != "ended":
            problem = f"invocation {id_} of record {n} was set back to {state}"
        if problem is None and body is not None and canonical.digest_bytes(body) != header.get("body"):
            problem = f"the body of record {n} was changed: it no longer has the digest in its header"
        if problem is not None:
            return VerifyReport(head, head.n, pruned, head.n + 1, problem)
        head = Head(n, digest)
        pruned += body is None
        if wanted is not None and digest == wanted[2] and wanted[1] in {None, str(n)}:
            seen = True
    if not seen:
        problem = f"the head {expected} is not in the chain: its newest records were cut off or replaced"
        return VerifyReport(head, head.n, pruned, head.n + 1, problem)
    stray = connection.execute(
        "SELECT id FROM invocations AS i WHERE state = 'ended'"
        " AND NOT EXISTS (SELECT 1 FROM records WHERE id = i.id) LIMIT 1"
    ).fetchone()
    if stray:
        problem = f"invocation {stray[0]} has ended without a record in the chain"
        return VerifyReport(head, head.n, pruned, head.n + 1, problem)
    return VerifyReport(head, head.n, pruned)
