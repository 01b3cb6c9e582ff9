"""One call at a time in each session, in the order in which they came."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Turns"]


@dataclass
class _Line:
    taken: bool = False
    calls: int = 0
    readers: int = 0
    unread: anyio.Event = field(default_factory=anyio.Event)
    waiting: deque[anyio.Event] = field(default_factory=deque)


class Turns:
    """For one event loop. A call is in a session from its acceptance on, and has a turn while it runs."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def enter(self, session: str) -> None:
        """A call is about to be in this session, until it has left."""
        self._lines.setdefault(session, _Line()).calls += 1

    def leave(self, session: str) -> None:
        """The call is no longer in it."""
        line = self._lines[session]
        line.calls -= 1
        self._forget(session, line)

    @contextmanager
    def reading(self, session: str) -> Iterator[None]:
        """Somebody reads what the session has, which does not go meanwhile."""
        line = self._lines.setdefault(session, _Line())
        line.readers += 1
        try:
            yield
        finally:
            line.readers -= 1
            if not line.readers:
                line.unread.set()
                line.unread = anyio.Event()
            self._forget(session, line)

    def _forget(self, session: str, line: _Line) -> None:
        if not line.calls and not line.readers:
            del self._lines[session]

    def readers(self, session: str) -> int:
        """How many read it."""
        line = self._lines.get(session)
        return 0 if line is None else line.readers

    async def unread(self, session: str) -> None:
        """Wait until nobody reads it."""
        while (line := self._lines.get(session)) is not None and line.readers:
            await line.unread.wait()

    def inside(self, session: str) -> int:
        """How many calls are in a session, running or waiting."""
        line = self._lines.get(session)
        return 0 if line is None else line.calls

    async def take(self, session: str, *, first: bool = False) -> None:
        """Wait for the turn, in a session that was entered; ``first``: before all who wait already."""
        line = self._lines[session]
        if not line.taken and not line.waiting:
            line.taken = True
            return
        mine = anyio.Event()
        if first:
            line.waiting.appendleft(mine)
        else:
            line.waiting.append(mine)
        try:
            await mine.wait()
        except BaseException:
            if mine.is_set():
                self.give(session)
            else:
                line.waiting.remove(mine)
            raise

    def give(self, session: str) -> None:
        """Let the next have the turn."""
        line = self._lines[session]
        if line.waiting:
            line.waiting.popleft().set()
        else:
            line.taken = False
