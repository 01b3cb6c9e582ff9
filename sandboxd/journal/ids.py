"""Ids of calls, sessions and checkpoints."""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from typing import TYPE_CHECKING

import uuid6

if TYPE_CHECKING:
    import sqlite3

__all__ = ["Ids", "largest"]

_MAX = 2**48 - 2**32  # milliseconds: what is later is damage, and has too few after it
_QUERY = (
    "SELECT max(id) FROM (SELECT max(id) AS id FROM invocations WHERE id < 'g'"
    " UNION ALL SELECT max(id) FROM sessions WHERE id < 'g'"
    " UNION ALL SELECT max(id) FROM checkpoints WHERE id < 'g')"
)


class Ids:
    """Makes UUIDv7 (RFC 9562), unique across hosts; text order is the order in which they were made.

    The queue and lists go by that order, so it holds where the clock goes back too, also between two daemons:
    time is in milliseconds, and goes on from the newest id. Safe in any thread.
    """

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()

    def new(self) -> str:
        """An id that is larger than all before."""
        with self._lock:
            at = self._last = max(time.time_ns() // 10**6, self._last + 1)
        return str(uuid6.UUID(int=at << 80 | secrets.randbits(76), version=7))

    def after(self, id_: str | None) -> None:
        """Make only ids that are larger than this one. What is none of ours says nothing."""
        try:
            found = uuid.UUID(id_ or "")
        except ValueError:
            return
        with self._lock:
            if found.version == 7 and (at := found.int >> 80) < _MAX:
                self._last = max(self._last, at)


def largest(connection: sqlite3.Connection) -> str | None:
    """The largest id in a journal."""
    found: str | None = connection.execute(_QUERY).fetchone()[0]
    return found
