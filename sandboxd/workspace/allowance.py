"""What the calls of a session used of the network, in the journal's database: functions within a transaction.

Before a call may use anything, as much as it may use of its session's budget is *held* on disk: what is left
of that, as far as the call's own budget goes. With its outcome, what it used takes the place of that. What is
still held at a daemon's start was held for a call that ended with an earlier one: it counts as used, since
nobody knows better.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sandboxd import units

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

__all__ = ["NAMES", "Hold", "begun_with", "charge", "hold", "settle", "used_of"]

NAMES = ("bytes", "bytes_in", "bytes_out", "connections", "requests")
"""What is counted, as in a policy's ``network.budget.session``."""


class Hold(NamedTuple):
    """What a session has left for a call, and what of that the call's own budget lets it use."""

    left: dict[str, int]
    most: dict[str, int]


@dataclass(frozen=True)
class _Column:
    """As it is stored with a session, by name; ``held`` is for ``call``."""

    used: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    call: str = ""


def used_of(network: str | None) -> dict[str, int]:
    """What a session's column says that was used, by name."""
    return _read(network).used


def begun_with(network: str | None) -> str | None:
    """The column of a fork, which begins with what its source has used."""
    found = _read(network)
    return json.dumps(asdict(_Column(found.used)), sort_keys=True) if found.used else None


def hold(
    connection: sqlite3.Connection,
    session: str,
    call: str,
    limits: Mapping[str, int],
    before: Mapping[str, int],
) -> Hold:
    """Hold for a call what it may use.

    ``limits`` are those of its policy's ``network.budget``; ``before``: what its earlier attempts used.
    """
    used = _used_but_by(connection, session, call)
    left = {
        name: max(0, limits[f"session.{name}"] - used.get(name, 0) - before.get(name, 0))
        for name in NAMES
        if f"session.{name}" in limits
    }
    most = {name: min(value, limits.get(name, value)) for name, value in left.items()}
    _store(connection, session, _Column(used, _sum(before, most), call))
    return Hold(left, most)


def settle(connection: sqlite3.Connection, session: str, call: str, used: Mapping[str, int]) -> None:
    """Put what a call used in the place of what was held for it."""
    _store(connection, session, _Column(_sum(_used_but_by(connection, session, call), used)))


def charge(connection: sqlite3.Connection) -> None:
    """Count what is held as used, of all sessions: the calls that it was held for are gone."""
    rows = connection.execute("SELECT id, network FROM sessions WHERE network IS NOT NULL").fetchall()
    for session, network in rows:
        found = _read(network)
        if found.held:
            _store(connection, session, _Column(_sum(found.used, found.held)))


def _used_but_by(connection: sqlite3.Connection, session: str, call: str) -> dict[str, int]:
    """What was used before a call; with what is held for another, whose outcome was not written with it."""
    row = connection.execute("SELECT network FROM sessions WHERE id = ?", (session,)).fetchone()
    found = _read(None if row is None else row[0])
    return found.used if found.call == call else _sum(found.used, found.held)


def _read(network: str | None) -> _Column:
    return _Column() if network is None else _Column(**json.loads(network))


def _store(connection: sqlite3.Connection, session: str, column: _Column) -> None:
    document = json.dumps(asdict(column), separators=(",", ":"), sort_keys=True)
    connection.execute("UPDATE sessions SET network = ? WHERE id = ?", (document, session))


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    # a process that was taken over says what it likes
    sums = {name: min(units.MAX, sum(part.get(name, 0) for part in parts)) for name in NAMES}
    return {name: total for name, total in sums.items() if total}
