"""An attempt that did not decide its call's outcome, because the policy had another follow it."""

from __future__ import annotations

from pydantic import Field

from sandboxd.models.outcome import Cause, Denial, Failure, LimitReached
from sandboxd.models.wire import Wire

__all__ = ["FailedAttempt"]


class FailedAttempt(Wire):
    """One attempt of a call that was tried again. Its output stays in the call's streams and events."""

    number: int
    """From 1."""
    started: int | None = None
    """When its command was handed over, if it was."""
    ended: int
    cause: Cause
    message: str
    exit_code: int | None = None
    signal: int | None = None
    signal_name: str | None = None
    error: Failure | None = None
    plan: str
    """Digest of the plan that it ran by."""
    stdout: int = 0
    """Where its output ends and that of the next attempt begins: a byte offset in the stream."""
    stderr: int = 0
    pause: int = 0
    """Microseconds from its end to the next."""
    raised: dict[str, int] = Field(default_factory=dict)
    """Limits that the next attempt has instead."""
    denials: list[Denial] = Field(default_factory=list)
    limits_reached: list[LimitReached] = Field(default_factory=list)
