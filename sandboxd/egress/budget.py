"""How much of the network one call may use."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import anyio

from sandboxd.egress.relay import Cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Budget"]

BURST = 0.05  # seconds of bandwidth that may go at once


def _nobody() -> None:
    """Nobody is told."""


class Budget:
    """The limits of a policy's ``network.budget``, by name, and what of them was used.

    ``left``: what the calls of its session before have left of that one's, by the same names. ``on_use`` is
    called whenever something was used.
    """

    def __init__(self, limits: Mapping[str, int], left: Mapping[str, int] | None = None) -> None:
        self._limits = limits
        self._left = left or {}
        self.on_use: Callable[[], None] = _nobody
        self.connections = self.requests = 0
        self.used = {"in": 0, "out": 0}
        self.reached: set[str] = set()
        """Those that something was cut for."""
        self._begun: list[float] = []
        self._free_at = 0.0

    def connect(self) -> str | None:
        """Count a connection; returns the limit that is in its way."""
        if (over := self._over("connections", self.connections)) is not None:
            return over
        rate = self._limits.get("connection_rate")
        if rate is not None:
            now = time.monotonic()
            self._begun = [at for at in self._begun if at > now - 1]
            if len(self._begun) >= rate:
                self.reached.add("connection_rate")
                return "connection_rate"
            self._begun.append(now)
        self.connections += 1
        self.on_use()
        return None

    def request(self) -> str | None:
        """Count a request of HTTP; returns the limit that is in its way."""
        if (over := self._over("requests", self.requests)) is not None:
            return over
        self.requests += 1
        self.on_use()
        return None

    def _bounds(self, name: str) -> Iterator[tuple[str, int]]:
        """The limits of something, the call's and its session's, with their names."""
        if (most := self._limits.get(name)) is not None:
            yield name, most
        if (most := self._left.get(name)) is not None:
            yield f"session.{name}", most

    def _over(self, name: str, used: int) -> str | None:
        """Which of the limits of something is used up, and so was reached."""
        for limit, most in self._bounds(name):
            if used >= most:
                self.reached.add(limit)
                return limit
        return None

    async def take(self, way: Literal["in", "out"], asked: int) -> int:
        """Take up to so many bytes, at least one; waits where a bandwidth says so. Raises Cut.

        What does not go is given back, before anything else is awaited.
        """
        rate = self._limits.get("bandwidth")
        if rate is not None:
            while (wait := self._free_at - time.monotonic()) > 0:  # noqa: ASYNC110  (the other way spends too)
                await anyio.sleep(wait)
            asked = max(1, min(asked, int(rate * BURST)))
        for name, used in (("bytes", sum(self.used.values())), (f"bytes_{way}", self.used[way])):
            for limit, most in self._bounds(name):
                if used >= most:
                    raise Cut(limit)
                asked = min(asked, most - used)
        self._spend(way, asked)
        return asked

    def give_back(self, way: Literal["in", "out"], count: int) -> None:
        """Bytes that were taken and did not go."""
        self._spend(way, -count)

    def _spend(self, way: Literal["in", "out"], count: int) -> None:
        self.used[way] += count
        self.on_use()
        if rate := self._limits.get("bandwidth"):
            self._free_at = max(self._free_at, time.monotonic()) + count / rate
