"""The calls of a session in the order in which they ended, read from the headers of their records.

A header stays when its body goes, so what was pruned is in the line too. No index has them: all records are
looked at, in steps that hold up nobody for long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

__all__ = ["STEP", "SessionCall", "calls_of"]

STEP = 20_000
"""Records that are looked at in one read."""


@dataclass(frozen=True, slots=True)
class SessionCall:
    """One call; ``before`` and ``after`` are digests of checkpoints, ``before`` None if it had no turn."""

    id: str
    before: str | None
    after: str | None
    pruned: bool


def calls_of(
    connection: sqlite3.Connection, session: str, *, above: int
) -> tuple[list[SessionCall], int | None]:
    """Those among the ``STEP`` records above a number, and the number to go on from; None at the end."""
    last = connection.execute("SELECT max(n) FROM records").fetchone()[0]
    end = above + STEP
    rows = connection.execute(
        "WITH part AS (SELECT r.n, r.id, CAST(r.header AS TEXT) AS header, i.doc IS NULL AS pruned"
        " FROM records AS r JOIN invocations AS i ON i.id = r.id WHERE r.n > ?1 AND r.n <= ?2),"
        # What is no JSON is for `verify` to find.
        " sound AS (SELECT * FROM part WHERE instr(header, ?3) AND json_valid(header))"
        " SELECT id, json_extract(header, '$.checkpoint_before'),"
        " json_extract(header, '$.checkpoint_after'), pruned"
        " FROM sound WHERE json_extract(header, '$.session') = ?3 ORDER BY n",
        (above, end, session),
    )
    found = [SessionCall(id_, before, after, bool(pruned)) for id_, before, after, pruned in rows]
    return found, None if last is None or end >= last else end
