"""What came of running a recorded call again."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sandboxd.models.invocation import Invocation
from sandboxd.models.operating import Problem
from sandboxd.models.wire import Wire

__all__ = ["Difference", "Replay", "ReplayEvent", "ReplayedCall", "SessionReplay"]


class Difference(Wire):
    """Something that is not as it was recorded."""

    what: str
    recorded: Any = None
    replayed: Any = None


class Replay(Wire):
    """A call, run again: what is the same, what differs, and what nobody can promise."""

    recorded: str
    """The id of the call."""
    replayed: Invocation
    """The call that ran in its stead."""
    same: list[str] = Field(default_factory=list)
    differs: list[Difference] = Field(default_factory=list)
    not_captured: list[str] = Field(default_factory=list)
    """What the record does not have, each as a sentence: a difference may come from there."""


class ReplayedCall(Wire):
    """One call of a session that was run again: with a replay, or why there is none."""

    recorded: str
    """The id of the call."""
    replay: Replay | None = None
    skipped: str | None = None
    """Why it was not to be run."""
    problem: Problem | None = None
    """Why it was refused."""


class SessionReplay(Wire):
    """What came of a session's calls: how many ended the same, and how many did not."""

    recorded: str
    """The id of the session."""
    kept: list[str] = Field(default_factory=list)
    """The sessions that they ran in, if they were to be kept: a further one for each change from outside."""
    same: int = 0
    differing: int = 0
    skipped: int = 0
    failed: int = 0
    not_captured: list[str] = Field(default_factory=list)


class ReplayEvent(Wire):
    """One line of a session's replay: a call, and in the end what came of all."""

    call: ReplayedCall | None = None
    ended: SessionReplay | None = None
