"""Invocations as the journal gets them, for tests of it that run no call."""

from __future__ import annotations

from journals import new_id

from sandboxd import canonical, models

__all__ = ["DIGEST", "call", "ended"]

DIGEST = "sha256:" + "ab" * 32


def call(*, uid: int = 1, key: str | None = None) -> models.Invocation:
    """A call that is about to be accepted."""
    return models.Invocation(
        id=new_id(),
        state=models.State.ACCEPTED,
        caller=models.CallerInfo(uid=uid, gid=uid, role="agent"),
        policy=models.DigestRef(name="default", digest=DIGEST),
        image=models.DigestRef(name="host", digest=DIGEST),
        plan=DIGEST,
        argv=["true"],
        key=key,
        times=models.Times(accepted=1_700_000_000_000_000),
    )


def ended(
    invocation: models.Invocation, cause: models.Cause = models.Cause.EXITED, text: str = "out\n"
) -> models.Invocation:
    """The call with an outcome."""
    stream = models.Content(text=text, size=len(text), digest=canonical.digest_bytes(text.encode()))
    return invocation.model_copy(
        update={
            "state": models.State.ENDED,
            "outcome": models.Outcome(cause=cause, message="It ended."),
            "stdout": stream,
            "times": invocation.times.model_copy(update={"ended": 1_700_000_000_500_000}),
        }
    )
