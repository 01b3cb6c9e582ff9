"""Memory, or disk, that the daemon holds for its callers: bounded, and shared so that nobody takes it all.

A caller gets more as long as what it would hold is at most four times what would be left. So one alone
gets up to four fifths, and however many fill up their parts, there is always some for one more.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sandboxd import errors, units

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Held", "Room", "fits", "share"]

FACTOR = 4
RETRY_AFTER = 1  # seconds


def fits(own: int, left: int) -> bool:
    """Whether a caller may hold ``own`` when that leaves ``left`` to all others."""
    return left >= 0 and own <= FACTOR * left + FACTOR


def share(left: int) -> int:
    """The most that a caller may hold of what all others leave: the greatest that ``fits``."""
    return min(left, (FACTOR * left + FACTOR) // (FACTOR + 1))


class Held:
    """What one request or call holds; grows piece by piece, and is given back as a whole."""

    def __init__(self, room: Room, uid: int) -> None:
        self._room = room
        self._uid = uid
        self._size = 0

    def grow(self, size: int) -> None:
        """Hold ``size`` bytes more. Raises QueueFull."""
        self._room.take(self._uid, size)
        self._size += size

    def release(self) -> None:
        """Give it back. Safe to call twice."""
        self._room.give_back(self._uid, self._size)
        self._size = 0


class Room:
    """A number of bytes for all callers. For one event loop; nothing here blocks."""

    def __init__(self, size: int, what: str = "inputs for calls that wait or run") -> None:
        """``what`` is held, in the words of the error."""
        self._size = size
        self._what = what
        self._held: Counter[int] = Counter()
        self._total = 0

    def take(self, uid: int, size: int) -> None:
        """Hold bytes for a caller. Raises QueueFull; but for whoever holds nothing beside nobody."""
        own, total = self._held[uid] + size, self._total + size
        if self._total and not fits(own, self._size - total):
            raise errors.QueueFull(
                f"the daemon holds {units.format_size(self._total)} of {self._what}; try again later",
                retry_after=RETRY_AFTER,
                limit=self._size,
            )
        self._held[uid], self._total = own, total

    def give_back(self, uid: int, size: int) -> None:
        """Give bytes back that were taken."""
        self._held[uid] -= size
        self._total -= size
        if not self._held[uid]:
            del self._held[uid]

    @contextmanager
    def held(self, uid: int) -> Iterator[Held]:
        """Something that grows within a block and is given back at its end."""
        held = Held(self, uid)
        try:
            yield held
        finally:
            held.release()
