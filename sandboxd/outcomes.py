"""The outcomes that the daemon gives a call itself, and the header of a call's record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandboxd import units
from sandboxd.journal import records
from sandboxd.models import Cause, Event, FailedAttempt, Failure, LimitReached, Outcome, State
from sandboxd.supervisor.result import Result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd import plan
    from sandboxd.journal.spool import Part, Spool
    from sandboxd.models import Invocation
    from sandboxd.retries import Again
    from sandboxd.supervisor.ending import Deadline

__all__ = ["cancelled", "cancelled_with_its_caller", "followed", "header", "ours", "too_late"]


def header(done: Invocation, made: plan.Plan, events: Mapping[str, Part] | None) -> dict[str, Any]:
    """The header of an ended call that ran by this plan; ``events`` as ``Spool.told`` has them."""
    inputs = [item.digest for item in made.inputs]
    return records.outcome_header(done, inputs=inputs, tar=made.tar, events=events)


def ours(code: str, message: str) -> Outcome:
    """A fault of ours."""
    return Outcome(cause=Cause.FAILED, message=message, error=Failure(code=code, message=message))


def cancelled() -> Outcome:
    """For a call that had not started."""
    return Outcome(cause=Cause.CANCELLED, message="The call was cancelled before it started.")


def cancelled_with_its_caller() -> Outcome:
    """For a call that waited in the queue of a daemon that ended, and whose caller waited for it."""
    message = (
        "The daemon ended before the call started, and with it the connection of the caller that waited."
    )
    return Outcome(cause=Cause.CANCELLED, message=message)


def too_late(deadline: Deadline | None) -> Result:
    """For a call whose deadline passed before it started."""
    asked = 0 if deadline is None else deadline.asked
    message = f"The call's deadline of {units.format_duration(asked)} passed while it waited in the queue."
    return Result(
        Outcome(cause=Cause.WALL_TIME, message=message, evidence={"deadline": asked}),
        limits_reached=[LimitReached(limit="deadline", value=asked, ended=True)],
    )


def followed(
    invocation: Invocation, spool: Spool, result: Result, again: Again, *, ended: int
) -> FailedAttempt:
    """Note in a call, and in its events, the attempt that ended so and that another follows.

    Its output stays, and the next one's begins after it. Raises HostFailed.
    """
    outcome = result.outcome
    failed = FailedAttempt(
        number=invocation.attempts,
        started=invocation.times.started,
        ended=ended,
        cause=outcome.cause,
        message=outcome.message,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        signal_name=outcome.signal_name,
        error=outcome.error,
        plan=invocation.plan,
        stdout=spool.size("stdout"),
        stderr=spool.size("stderr"),
        pause=again.pause,
        raised=again.raised,
        denials=result.denials,
        limits_reached=result.limits_reached,
    )
    invocation.retried = [*invocation.retried, failed]
    invocation.state, invocation.times.started = State.QUEUED, None
    invocation.plan = again.plan.digest
    spool.add(Event(seq=0, at=ended, type="retry", retry=failed))
    return failed
