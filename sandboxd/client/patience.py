"""How long a client looks for a daemon that went away. Standard library only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RECONNECT", "Patience"]

RECONNECT = 60.0
"""Seconds; a daemon that is stopped gives what runs half of that."""
FIRST, LONGEST = 0.05, 1.0
PASSING = frozenset({"lost", "refused", "absent", "timeout"})


class Patience:
    """Of one exchange that is taken up again, for so many seconds since it last went on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: float | None = None
        self._pause = FIRST
        self.waited = False
        """Whether ``wait`` has waited before."""

    def renew(self) -> None:
        """It went on."""
        self._until, self._pause = None, FIRST

    def pause(self, error: errors.SandboxdError) -> float:
        """Seconds to wait before the next try. Raises the error if it does not pass, or not in time."""
        passing = isinstance(error, errors.Draining) or (
            isinstance(error, errors.Unavailable) and error.details.get("reason") in PASSING
        )
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._seconds
        if not passing or now >= self._until:
            raise error
        pause, self._pause = self._pause, min(LONGEST, self._pause * 2)
        return min(pause, self._until - now)

    def wait(self, error: errors.SandboxdError, say: Callable[[str], None]) -> None:
        """Wait for the next try, and the first time say why. Raises as ``pause`` does."""
        pause = self.pause(error)
        if not self.waited:
            say("the daemon went away; waiting for it")
        self.waited = True
        time.sleep(pause)
