"""What follows an attempt: the outcome, or another attempt, by the policy's ``retry``. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sandboxd.models import Cause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.models import FailedAttempt, Outcome
    from sandboxd.plan import Plan
    from sandboxd.policy.retry import Raise, Retry, RetryCause

__all__ = ["Again", "Retries"]

RAISED = ("memory", "wall", "cpu_time", "stdout", "stderr")
OF_A_SIGNAL = frozenset({Cause.EXITED, Cause.SIGNALLED})
"""What may have come of a signal that the caller sent."""


@dataclass(frozen=True)
class Again:
    """Another attempt: by which plan, after how many microseconds, and which limits it has instead."""

    plan: Plan
    pause: int
    raised: dict[str, int]


@dataclass(frozen=True)
class Retries:
    """Of a policy; None tries nothing again."""

    rule: Retry | None

    def after(
        self,
        outcome: Outcome,
        plan: Plan,
        before: Sequence[FailedAttempt],
        *,
        handed_over: bool,
        signalled: bool = False,
    ) -> Again | None:
        """What follows an attempt that ended so, after those ``before`` it; None: that is the outcome.

        ``handed_over``: whether its command may have run. A call that reaches a network is then tried again
        only where the policy says that this is safe, and one whose input was streamed not at all.
        ``signalled``: whether its caller sent it a signal. How it exited, or which signal ended it, is then
        what the caller asked for.
        """
        rule = self.rule
        if rule is None:
            return None
        shape = plan.shape
        reaches = shape.network is not None or shape.host_network
        if handed_over and ((reaches and not rule.safe) or plan.command.stdin == "stream"):
            return None
        raised: dict[str, int] = {}
        if outcome.cause is Cause.FAILED:
            times = rule.failed if outcome.error is not None and rule.covers(outcome.error.code) else 0
        else:
            own = self._own(outcome)
            if own is None or "deadline" in outcome.evidence:
                return None
            if signalled and outcome.cause in OF_A_SIGNAL:
                return None
            times = own.times
            found = _raised(own.raise_, plan)
            if found is None:
                return None
            raised = found
        if sum(each.cause is outcome.cause for each in before) >= times:
            return None
        return Again(_with(plan, raised), rule.pause(len(before)), raised)

    def resumed(self, plan: Plan, before: Sequence[FailedAttempt]) -> Plan:
        """The plan of the next attempt after those ``before`` it, which an earlier daemon ran.

        What they were raised to holds as far as the policy that is in force now still raises to it.
        """
        for each in before:
            own = self._own(each)
            allowed = None if own is None else _raised(own.raise_, plan)
            if allowed:
                held = {name: min(each.raised.get(name, 0), value) for name, value in allowed.items()}
                above = {name: value for name, value in held.items() if value > getattr(plan.limits, name)}
                plan = _with(plan, above)
        return plan

    def _own(self, ended: Outcome | FailedAttempt) -> RetryCause | None:
        """What is said of an end that is the tool's own."""
        own = None if self.rule is None else self.rule.of(ended.cause.value)
        return own if own is not None and own.covers(ended.exit_code, ended.signal_name) else None


def _with(plan: Plan, raised: dict[str, int]) -> Plan:
    """The plan with other limits."""
    if not raised:
        return plan
    up: dict[str, Any] = {**raised}
    shape = replace(plan.shape, limits=replace(plan.shape.limits, **up))
    return replace(plan, shape=shape, limits=replace(plan.limits, **up))


def _raised(asked: Raise, plan: Plan) -> dict[str, int] | None:
    """The limits that are raised; None where the request itself asked for less: that is its word."""
    found: dict[str, int] = {}
    for name in RAISED:
        value, limit = getattr(asked, name), getattr(plan.limits, name)
        if value is None or limit is None or value <= limit:
            continue
        if limit != getattr(plan.shape.limits, name):
            return None
        found[name] = value
    return found
