"""Directories that callers have passed, until a request names them: each once, by a text nobody guesses.

Whoever passed a descriptor says how long its close takes, so it is closed in a thread of ``lanes``, and
counts until that has returned.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.workspace.checkout import Owner

__all__ = ["Handed", "Handles"]

MOST = 16
"""Directories of one uid that wait, or are being closed."""


@dataclass
class Handed:
    """A directory and who passed it. A context manager that closes the descriptor, and blocks in that."""

    directory: int
    owner: Owner
    closed: Callable[[], None] | None = None
    """Called in the same thread when it is closed."""

    def __enter__(self) -> int:
        return self.directory

    def __exit__(self, *_: object) -> None:
        try:
            os.close(self.directory)
        finally:
            if self.closed is not None:
                self.closed()


@dataclass
class Handles:
    """For one event loop; what they give may be closed in threads. Nothing here closes a descriptor."""

    _waiting: dict[str, Handed] = field(default_factory=dict)
    _open: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, handed: Handed) -> str:
        """A handle for a directory. Raises QueueFull where its uid has too many; then it stays yours."""
        uid = handed.owner.uid
        with self._lock:
            if self._open[uid] >= MOST:
                raise errors.QueueFull(
                    f"{MOST} directories of yours wait for a request that names them, or to be closed",
                    retry_after=1,
                )
            self._open[uid] += 1
        handed.closed = lambda: self._closed(uid)
        handle = secrets.token_urlsafe(24)
        self._waiting[handle] = handed
        return handle

    def take(self, handle: str, uid: int) -> Handed:
        """The directory, yours to close now. Raises NotFound for another uid's handle, or a used one."""
        found = self._waiting.get(handle)
        if found is None or found.owner.uid != uid:
            raise errors.NotFound(
                "no directory waits under this handle; it is used once, by who passed the directory, "
                "while the connection is open that passed it",
                field="checkout",
            )
        return self._waiting.pop(handle)

    def drop(self, handle: str) -> Handed | None:
        """A directory that nobody has taken, yours to close now."""
        return self._waiting.pop(handle, None)

    def _closed(self, uid: int) -> None:
        with self._lock:
            self._open[uid] -= 1
            if not self._open[uid]:
                del self._open[uid]
