"""Which sessions keep a container, in the journal's database: plain functions, within a transaction.

A row comes with the outcome of the first call in a container and goes with the transaction that ends it. So
what a daemon finds at its start is what an earlier one had and did not end: it is lost, and the row says so
until the session's next call has said it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd.models import ContainerLost

if TYPE_CHECKING:
    import sqlite3

__all__ = ["Entry", "find", "forget", "lose", "lose_all", "note"]


@dataclass(frozen=True)
class Entry:
    """A container by the call that it was made for; ``calls`` ran in it, under ``policy``."""

    since: str
    calls: int
    policy: str

    def lost(self, at: int, why: str) -> ContainerLost:
        """What is told of it when it is gone."""
        return ContainerLost(since=self.since, calls=self.calls, policy=self.policy, at=at, why=why)


def note(connection: sqlite3.Connection, session: str, entry: Entry) -> None:
    """The session keeps this container."""
    connection.execute(
        "INSERT OR REPLACE INTO containers (session, since, calls, policy) VALUES (?, ?, ?, ?)",
        (session, entry.since, entry.calls, entry.policy),
    )


def lose(connection: sqlite3.Connection, session: str, lost: ContainerLost) -> None:
    """The session has lost it."""
    connection.execute(
        "INSERT OR REPLACE INTO containers (session, since, calls, policy, lost, why)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (session, lost.since, lost.calls, lost.policy, lost.at, lost.why),
    )


def lose_all(connection: sqlite3.Connection, at: int, why: str) -> int:
    """Every session has lost what it kept; how many had something."""
    return connection.execute(
        "UPDATE containers SET lost = ?, why = ? WHERE lost IS NULL", (at, why)
    ).rowcount


def find(connection: sqlite3.Connection, session: str) -> ContainerLost | None:
    """What a session has lost, and no call has said yet."""
    row = connection.execute(
        "SELECT since, calls, policy, lost, why FROM containers WHERE session = ? AND lost IS NOT NULL",
        (session,),
    ).fetchone()
    return None if row is None else Entry(*row[:3]).lost(row[3], row[4])


def forget(connection: sqlite3.Connection, session: str) -> None:
    """It has ended, and everybody knows."""
    connection.execute("DELETE FROM containers WHERE session = ?", (session,))
