"""What a call did with its network, and what was refused to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sandboxd.models.wire import Counted, Wire

__all__ = ["NetworkEvent", "NetworkRefusal", "NetworkUse", "SessionNetwork"]


class NetworkRefusal(Wire):
    """What was refused, told apart by where it was to go and why."""

    protocol: str = Field(max_length=32)
    target: str = Field(max_length=1024)
    port: int | None = Field(default=None, ge=0, le=65535)
    why: str = Field(max_length=4096)
    rule: str | None = Field(default=None, max_length=8192)
    count: Counted = Field(ge=1)


class NetworkUse(Wire):
    """What a call did with its network, in sum."""

    refusals: list[NetworkRefusal] = Field(default_factory=list, max_length=1000)
    limits: list[Annotated[str, Field(max_length=32)]] = Field(default_factory=list, max_length=16)
    """Of ``network.budget``, those that were reached."""
    connections: Counted = 0
    requests: Counted = 0
    """Of HTTP, where rules look into it."""
    bytes_in: Counted = 0
    bytes_out: Counted = 0
    whole: bool = True
    """False: a process that counted has died, and what it had not told yet is missing."""


class SessionNetwork(Wire):
    """What the calls of a session that have ended did with their networks, in sum.

    Of a call that ended with its daemon it is all that it might have used of its session's budget.
    """

    bytes: Counted = 0
    """In both directions together."""
    bytes_in: Counted = 0
    bytes_out: Counted = 0
    connections: Counted = 0
    requests: Counted = 0


class NetworkEvent(Wire):
    """A connection that has ended, or one, or a name, that was refused."""

    verdict: Literal["allowed", "denied", "failed", "limit"]
    """failed: the policy allowed it, and the network did not let it happen; limit: a budget ended it."""
    direction: Literal["out", "in"] = "out"
    """in: the caller's, to a port that the policy exposes."""
    protocol: str = Field(default="", max_length=32)
    """``tcp``; ``dns`` of a question for a name; ``http`` or ``https`` of a request in a connection; another
    one only where it was refused."""
    name: str | None = Field(default=None, max_length=1024)
    """What the program asked the resolver for; None: it gave the address itself."""
    address: str = Field(default="", max_length=64)
    """What the program connected to; of a name, the address that stands for it in its container."""
    port: int = Field(default=0, ge=0, le=65535)
    upstream: str | None = Field(default=None, max_length=64)
    """The address that was connected to outside."""
    why: str = Field(default="", max_length=4096)
    rule: str | None = Field(default=None, max_length=8192)
    """File and line of the rule that decided."""
    bytes_out: Counted = 0
    bytes_in: Counted = 0
    duration: Counted = 0
    method: str = Field(default="", max_length=32)
    """Of a request, where rules look into HTTP; its bytes are those of the bodies."""
    path: str = Field(default="", max_length=4096)
    """Of a request, without the query."""
    status: int = Field(default=0, ge=0, le=999)
    """Of the answer; 0: there was none."""
    secrets: list[Annotated[str, Field(max_length=160)]] = Field(default_factory=list, max_length=64)
    """Those that were put into the request, as NAME@VERSION."""
