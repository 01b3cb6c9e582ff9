"""The query parameters and the small bodies of the API, as models."""

from __future__ import annotations

import signal as signals
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from sandboxd import units
from sandboxd.models import Cause, State

__all__ = [
    "LONGEST_WAIT",
    "CheckBody",
    "EventsQuery",
    "GetQuery",
    "ListQuery",
    "NoQuery",
    "PageQuery",
    "PruneBody",
    "ReplayBody",
    "SearchQuery",
    "SessionReplayBody",
    "SignalBody",
    "StdinQuery",
    "StreamQuery",
]

LONGEST_WAIT = 3600.0
REPEATED = {"repeated": True}
HIGHEST_SIGNAL = 64  # SIGRTMAX of Linux, signal(7)


def _flag(value: object) -> object:
    """``1``, ``0``, ``true`` and ``false`` of a query string."""
    return {"1": True, "true": True, "0": False, "false": False}.get(value, value) if isinstance(
        value, str
    ) else value  # fmt: skip


def _duration(value: object) -> object:
    return units.parse_duration(value) if isinstance(value, str) else value


def _size(value: object) -> object:
    return units.parse_size(value) if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_flag), Field(strict=True)]
Number = Annotated[int, Field(ge=0, le=units.MAX)]


class Parameters(BaseModel):
    """The base of all: an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoQuery(Parameters):
    """Of routes that take no parameters."""


class GetQuery(Parameters):
    """Whether to wait for the end of an invocation, and for how many seconds."""

    wait: Annotated[float, Field(ge=0, le=LONGEST_WAIT, allow_inf_nan=False)] = 0.0


class ListQuery(Parameters):
    """Filters of the list of invocations."""

    policy: Annotated[str, Field(max_length=128)] | None = None
    cause: Cause | None = None
    state: State | None = None
    key: Annotated[str, Field(max_length=256)] | None = None
    """The caller's own call with this key."""
    label: Annotated[list[Annotated[str, Field(max_length=1200, pattern="^[^=]+=")]],
                     Field(max_length=64, json_schema_extra=REPEATED)] = []  # fmt: skip
    """``KEY=VALUE``; may be repeated, and then all must hold."""
    before: Annotated[str, Field(max_length=64)] | None = None
    """The ``next`` of the page before."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100

    def labels(self) -> dict[str, str]:
        """The labels that an invocation must have."""
        return {key: value for key, _, value in (text.partition("=") for text in self.label)}


class PageQuery(Parameters):
    """Which page of a list."""

    before: Annotated[str, Field(max_length=64)] | None = None
    """The ``next`` of the page before."""
    limit: Annotated[int, Field(ge=1, le=500)] = 100


class SearchQuery(Parameters):
    """What is searched for; all that is given must hold."""

    q: Annotated[str, Field(max_length=1000)] = ""
    """Words, in the language of SQLite's FTS5."""
    policy: Annotated[str, Field(max_length=128)] | None = None
    uid: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    cause: Cause | None = None
    image: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    since: Number | None = None
    """Microseconds since the epoch, as the two are."""
    until: Number | None = None
    before: Number | None = None
    """The ``next`` of the page before."""
    limit: Annotated[int, Field(ge=1, le=500)] = 50


class PruneBody(Parameters):
    """What is to go: what ended longer ago than ``age``, and the oldest beyond ``size`` bytes."""

    age: Annotated[int, BeforeValidator(_duration), Field(ge=0, le=units.MAX)] | None = None
    size: Annotated[int, BeforeValidator(_size), Field(ge=0, le=units.MAX)] | None = None


class ReplayBody(Parameters):
    """Under which policy; without one, that of the record."""

    policy: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class SessionReplayBody(ReplayBody):
    """And whether the session that the calls run in is kept."""

    keep: bool = False


class EventsQuery(Parameters):
    """Where a stream of events resumes, and whether it goes on to ``ended``."""

    after: Number = 0
    follow: Flag = False


class StreamQuery(Parameters):
    """Where the bytes of a stream start, and whether they go on to the end of the call."""

    offset: Number = 0
    follow: Flag = False


class StdinQuery(Parameters):
    """Where the bytes go, and whether standard input is closed after them."""

    offset: Number = 0
    eof: Flag = True


class SignalBody(Parameters):
    """A signal by number or by name, such as 15, ``SIGTERM`` or ``TERM``."""

    signal: int | str

    @field_validator("signal", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if isinstance(value, str):
            name = value.upper() if value.upper().startswith("SIG") else f"SIG{value.upper()}"
            if name not in signals.Signals.__members__:
                raise ValueError("not the name of a signal")
            return int(signals.Signals[name])
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= HIGHEST_SIGNAL:
            raise ValueError(f"a signal is a name or a number from 1 to {HIGHEST_SIGNAL}")
        return value


class CheckBody(Parameters):
    """The text of a policy file, and the name to check it under."""

    text: str
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
