"""What the sessions of each caller hold of the disk, and whether there is room for more.

What a call is about to keep is counted before it is, or calls that end at once would all find the same room.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from sandboxd import errors, units

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd.config import SessionShare

__all__ = ["Shares", "refuse"]


class Shares:
    """Bytes and entries by uid. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._size: Counter[int] = Counter()
        self._inodes: Counter[int] = Counter()

    def start(self, held: Mapping[int, tuple[int, int]]) -> None:
        """Begin with what there is: bytes and entries by uid."""
        with self._lock:
            self._size = Counter({uid: size for uid, (size, _) in held.items()})
            self._inodes = Counter({uid: inodes for uid, (_, inodes) in held.items()})

    def size_of(self, uid: int) -> int:
        """Bytes that are counted."""
        with self._lock:
            return self._size[uid]

    def take(self, uid: int, size: int, inodes: int, share: SessionShare) -> None:
        """Count what is about to be kept. Raises QuotaExceeded; then it is not counted."""
        with self._lock:
            size, inodes = self._size[uid] + size, self._inodes[uid] + inodes
            if size > share.size:
                refuse("sessions.size", size, share.size)
            if inodes > share.inodes:
                refuse("sessions.inodes", inodes, share.inodes)
            self._size[uid], self._inodes[uid] = size, inodes

    def charge(self, uid: int, size: int, inodes: int) -> None:
        """Count what is there whatever the share is: what comes next may find no room."""
        with self._lock:
            self._size[uid] += size
            self._inodes[uid] += inodes

    def give(self, uid: int, size: int, inodes: int) -> None:
        """What was counted is gone, or was not kept after all."""
        with self._lock:
            self._size[uid] -= size
            self._inodes[uid] -= inodes


def refuse(quota: str, asked: int, allowed: int) -> None:
    """Raises QuotaExceeded for files that are not kept."""
    show = units.format_size if quota.endswith("size") else units.format_count
    whose = "all sessions of its caller" if quota.startswith("sessions.") else "the session"
    raise errors.QuotaExceeded(
        f"the call's files are not kept: with them {whose} would have {show(asked)}"
        f"{' ' + quota.rpartition('.')[2] if show is units.format_count else ''}, more than the "
        f"{show(allowed)} of its quota",
        quota=quota,
        asked=asked,
        allowed=allowed,
    )
