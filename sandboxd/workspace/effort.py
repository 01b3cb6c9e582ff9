"""What one operation on files may cost: whoever asks for more is told, and whoever has gone is not served."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from sandboxd import errors, units

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ENDLESS", "Effort"]

SECONDS = 120.0
DIGESTED = 2 << 30

T = TypeVar("T")


class Effort:
    """Looked at by every loop over what a tool made. Threads may share it; ``stop`` may be called in any."""

    def __init__(self, seconds: float = SECONDS, *, digested: int = DIGESTED) -> None:
        """``seconds`` from the start of each piece of work, ``digested`` bytes in all."""
        self._seconds = seconds
        self._digested = digested
        self._until: float | None = None
        self._is_stopped = False

    def within(self, work: Callable[[], T]) -> T:
        """Do a piece of work; its time begins now."""
        self._until = time.monotonic() + self._seconds
        self.step()
        return work()

    def stop(self) -> None:
        """Nobody waits for it any more: the next ``step`` raises."""
        self._is_stopped = True

    def step(self) -> None:
        """Raises RequestTimeout when the time is over."""
        if self._is_stopped:
            raise errors.RequestTimeout("whoever asked for this has gone")
        if self._until is not None and time.monotonic() > self._until:
            raise errors.RequestTimeout(
                f"the session's files took more than {units.format_duration(int(self._seconds * 1e6))}; ask "
                "for fewer, or for those of one directory"
            )

    def may_digest(self, size: int) -> bool:
        """Whether a file may be digested; its bytes are counted then."""
        if size > self._digested:
            return False
        self._digested -= size
        return True


class _Endless(Effort):
    def step(self) -> None:
        """Never raises."""


ENDLESS = _Endless()
"""Of what nobody waits for."""
