"""What commands that have ended left writing: read, so that it goes on, and thrown away.

A server in the background has the output pipes of the call that started it. Nobody reads its words any
more; closed, they would kill it, and full, they would stop it. So they are emptied now and then, a bounded
amount at a time: who writes faster waits. They are bounded in number too; beyond that the oldest are closed.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque

__all__ = ["Drain"]

PIPES = 16
PAUSE = 0.2  # seconds between two times
CHUNK = 256 * 1024
AT_ONCE = 4  # chunks of one pipe at a time


class Drain:
    """For one event loop. Owns the descriptors that it takes, which do not block, until ``close``."""

    def __init__(self) -> None:
        self._pipes: deque[int] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def take(self, pipe: int | None) -> None:
        """Empty this one too, from now on; None: there is nothing left of it."""
        if pipe is None:
            return
        self._pipes.append(pipe)
        while len(self._pipes) > PIPES:
            os.close(self._pipes.popleft())
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._empty)

    def _empty(self) -> None:
        self._timer = None
        for _ in range(len(self._pipes)):
            pipe = self._pipes.popleft()
            if _emptied(pipe):
                self._pipes.append(pipe)
            else:
                os.close(pipe)
        if self._pipes:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._empty)

    def close(self) -> None:
        """Close them all. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._pipes:
            os.close(self._pipes.popleft())


def _emptied(pipe: int) -> bool:
    """Read a bounded amount; whether anybody may write more."""
    for _ in range(AT_ONCE):
        try:
            if not os.read(pipe, CHUNK):
                return False
        except BlockingIOError:
            break
    return True
