"""What an attempt leaves, and the outcomes of what went wrong about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd.models import Cause, Failure, Outcome

if TYPE_CHECKING:
    from sandboxd import errors
    from sandboxd.models import Artifact, ContainerUse, Denial, LimitReached, Receipt, Usage, Withheld

__all__ = ["Result", "denied", "failed", "not_kept", "withdrawn"]


@dataclass
class Result:
    """What an attempt leaves. Only ``outcome`` is always there."""

    outcome: Outcome
    receipt: Receipt | None = None
    usage: Usage | None = None
    denials: list[Denial] = field(default_factory=list)
    limits_reached: list[LimitReached] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    withheld: list[Withheld] = field(default_factory=list)
    container: ContainerUse | None = None


def failed(error: errors.SandboxdError) -> Outcome:
    """For a fault of ours."""
    return _of(Cause.FAILED, f"{error}", error)


def denied(error: errors.SandboxdError) -> Outcome:
    """For a call that was accepted, and that what came since keeps from running."""
    return _of(Cause.DENIED, f"The call had been accepted, and cannot run now: {error}.", error)


def withdrawn(error: errors.SecretMissing) -> Outcome:
    """For one whose secret is no more."""
    return _of(Cause.DENIED, f"A secret was removed after the call had been accepted: {error}.", error)


def not_kept(error: errors.SandboxdError, ended: Outcome) -> Outcome:
    """The session's files are as they were: what the command said of its success is not so."""
    found = _of(Cause.DENIED, f"The command ended, but {error}; the session is as it was before.", error)
    evidence = {"cause": ended.cause.value, "exit_code": ended.exit_code, "signal": ended.signal}
    return found.model_copy(update={"evidence": evidence})


def _of(cause: Cause, message: str, error: errors.SandboxdError) -> Outcome:
    failure = Failure(code=error.code, message=str(error), details=error.details)
    return Outcome(cause=cause, message=message, error=failure)
