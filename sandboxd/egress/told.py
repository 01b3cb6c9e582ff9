"""What the daemon is told of a container's connections, questions and refused attempts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd.excerpt import excerpt

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Connection", "Told"]

MAX_EVENTS = 1000  # of a call, for refusals and for connections each; the rest is counted only
MAX_KINDS = 256  # of refusals that are told apart
MAX_WHY = 384  # characters of each; all of it fits into one message, also where each needs six bytes


@dataclass
class Connection:
    """What an event says of a connection, or of a request in one."""

    name: str | None
    address: str
    port: int
    protocol: str = "tcp"
    upstream: str | None = None
    rule: str | None = None
    begun: float = 0.0
    sent: int = 0
    received: int = 0
    method: str = ""
    path: str = ""
    status: int = 0
    secrets: tuple[str, ...] = ()


class Told:
    """``say`` takes each message."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._events = {"refusals": 0, "connections": 0}
        self._refusals: dict[tuple[str, str, int | None, str], dict[str, Any]] = {}

    @property
    def refusals(self) -> list[dict[str, Any]]:
        """Each once, with a count."""
        return list(self._refusals.values())

    def emit(self, verdict: str, connection: Connection, why: str) -> None:
        """An event of it, as long as there have not been too many."""
        why = excerpt(why, MAX_WHY)
        if verdict == "denied":
            self._count_refusal(connection, why)
        kind = "refusals" if verdict == "denied" else "connections"  # a flood of those does not hide these
        if self._events[kind] >= MAX_EVENTS:
            return
        self._events[kind] += 1
        self._say(
            "event",
            verdict=verdict,
            protocol=connection.protocol,
            name=connection.name,
            address=connection.address,
            port=connection.port,
            upstream=connection.upstream,
            why=why,
            rule=connection.rule,
            bytes_out=connection.sent,
            bytes_in=connection.received,
            method=connection.method,
            path=connection.path,
            status=connection.status,
            secrets=connection.secrets,
            duration=int((time.monotonic() - connection.begun) * 1e6) if connection.begun else 0,
        )

    def _count_refusal(self, connection: Connection, why: str) -> None:
        what = connection.name or connection.address
        key = (connection.protocol, what, connection.port or None, why)
        if key not in self._refusals and len(self._refusals) >= MAX_KINDS:
            key = (connection.protocol, "others", None, "")
        found = self._refusals.setdefault(
            key,
            {
                "protocol": key[0],
                "target": key[1],
                "port": key[2],
                "why": key[3],
                "rule": connection.rule,
                "count": 0,
            },
        )
        found["count"] += 1
