"""What a search through the records finds."""

from __future__ import annotations

from pydantic import Field

from sandboxd.models.outcome import Cause
from sandboxd.models.wire import Wire

__all__ = ["Hit", "Pruning", "SearchResults"]


class Hit(Wire):
    """A call that fits, as the index knows it; ``GET /v1/invocations/{id}`` has all of it."""

    n: int
    """The number of its record."""
    id: str
    at: int
    """When it ended."""
    uid: int
    policy: str
    cause: Cause
    image: str
    """The image's digest."""
    command: str
    """The head of the command, quoted as a shell would want it."""
    snippet: str = ""
    """Around the first place that fits, with ``[`` and ``]`` around what was looked for."""


class SearchResults(Wire):
    """A page of calls that fit, newest first; ``next`` is the ``before`` of the following page."""

    hits: list[Hit] = Field(default_factory=list)
    next: int | None = None
    indexed: int = 0
    """Records up to this one are in the index; those that ended a moment ago may be missing."""


class Pruning(Wire):
    """What was removed."""

    calls: int = 0
    bytes: int = 0
    """Of bodies and output; artifacts go once nothing names them."""
