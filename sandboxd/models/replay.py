"""What came of running a recorded call again."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sandboxd.models.invocation import Invocation
from sandboxd.models.wire import Wire

__all__ = ["Difference", "Replay"]


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
