"""The container that a session keeps over its calls (``isolation: session``)."""

from __future__ import annotations

from typing import Literal

from sandboxd.models.wire import Wire

__all__ = ["ContainerLost", "ContainerUse", "SessionContainer", "SessionEnd"]


class ContainerLost(Wire):
    """A container that ended by itself: what its calls changed that the session's checkpoint has not is gone.

    That is nothing of its files, where ``why`` says that they were kept.
    """

    since: str
    """The call that it was made for."""
    calls: int
    """How many had run in it."""
    policy: str
    at: int
    """When it was found out."""
    why: str


class ContainerUse(Wire):
    """The container of its session that a call ran in."""

    since: str
    """The call that it was made for."""
    number: int
    """Which of the calls in it this one was; the first is 1."""
    ended: str | None = None
    """Why it ended with this call. What its calls had changed since the session's checkpoint went with it."""
    lost: ContainerLost | None = None
    """The one that the session had before, of which this call found nothing."""


class SessionContainer(Wire):
    """The container that a session keeps, or has lost since its last call."""

    state: Literal["live", "lost"]
    since: str
    policy: str
    calls: int
    started: int | None = None
    used: int | None = None
    """When a call in it ended last."""
    expires: int | None = None
    """When it is ended, as by ``end``: it was not used for so long then, or has had its time."""
    memory: int | None = None
    """Bytes of the daemon's budget that it holds; and so are the CPUs, in thousandths."""
    cpus: int | None = None
    denied: int = 0
    """System calls that were denied to what calls left running, after their ends."""
    lost: ContainerLost | None = None


class SessionEnd(Wire):
    """How the container of a session shall end."""

    discard: bool = False
    """Whether its files are thrown away that no checkpoint has."""
