"""Running a recorded call again: what is asked for then, and what of its end is the same.

Theory of operation: a replay is a call like any other, with a record of its own, made of the recorded
request with its contents, the recorded policy (kept by digest) and image, in a fresh container. A recorded
policy that is no longer in force has to be within the floors of now, and is for operators to run: nobody
gets back by a replay what was taken away. A call of a session runs in a fork of it at the checkpoint before,
which is removed afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandboxd import errors, models
from sandboxd.models.request import MAX_LABELS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.policy import Policy

__all__ = ["LABEL", "compared", "prepared", "replayable"]

LABEL = "replay-of"


def prepared(request: models.Request, recorded: models.Invocation, policy: str) -> models.Request:
    """What is asked for: the recorded request, by nobody's key, within no deadline, and told to nobody."""
    labels = request.labels if len(request.labels) >= MAX_LABELS else request.labels | {LABEL: recorded.id}
    return request.model_copy(
        update={
            "key": None,
            "deadline": None,
            "callback": None,
            "session": None,
            "policy": policy,
            "labels": labels,
            "stdin": "none" if request.stdin == "stream" else request.stdin,
        }
    )


def replayable(recorded: models.Invocation) -> None:
    """Raise what keeps a call from being run again: StateConflict, Pruned."""
    if recorded.state is not models.State.ENDED:
        raise errors.StateConflict(
            f"call {recorded.id!r} has not ended; there is nothing to compare with yet"
        )
    if recorded.pruned is not None:
        raise errors.Pruned(
            f"what was asked for call {recorded.id!r} was removed by retention", pruned=recorded.pruned
        )


def compared(
    recorded: models.Invocation,
    replayed: models.Invocation,
    request: models.Request,
    policy: Policy | None,
    *,
    files: tuple[models.SessionDiff | None, models.SessionDiff | None] = (None, None),
) -> models.Replay:
    """What is the same and what differs. ``policy`` is that of the recorded call, if it is known.

    ``files`` are what both changed in their sessions.
    """
    before, after = _facts(recorded), _facts(replayed)
    old, new = files
    if old is not None and new is not None:
        before |= _files(old)
        after |= _files(new)
    found = models.Replay(recorded=recorded.id, replayed=replayed)
    for what in [*before, *(name for name in after if name not in before)]:
        if before.get(what) == after.get(what):
            found.same.append(what)
        else:
            found.differs.append(
                models.Difference(what=what, recorded=before.get(what), replayed=after.get(what))
            )
    found.not_captured = list(_not_captured(recorded, request, policy))
    if recorded.session is not None:
        found.not_captured += list(_not_compared(old, new))
    return found


def _facts(call: models.Invocation) -> dict[str, Any]:
    """What is compared, by name."""
    outcome = call.outcome
    facts: dict[str, Any] = {
        "policy": call.policy.digest,
        "image": call.image.digest,
        "plan": call.plan,
        "cause": None if outcome is None else outcome.cause.value,
        "exit_code": None if outcome is None else outcome.exit_code,
        "signal": None if outcome is None else outcome.signal_name,
        "errno": None if outcome is None else outcome.errno,
        "error": None if outcome is None or outcome.error is None else outcome.error.code,
        "stdout": _stream(call.stdout),
        "stderr": _stream(call.stderr),
        "limits_reached": sorted(reached.limit for reached in call.limits_reached),
        "denials": sorted(f"{denial.kind} {denial.name}" for denial in call.denials),
        "withheld": sorted(f"{one.path}: {one.reason}" for one in call.withheld),
    }
    facts |= {f"artifact {file.path}": file.digest for file in call.artifacts}
    return facts


def _files(diff: models.SessionDiff) -> dict[str, Any]:
    """What a call changed in its session, by name. Times and owners are no difference."""
    facts = {}
    for one in diff.changes:
        now = one.new
        fact: dict[str, Any] = {"change": one.change}
        if now is not None:
            fact |= {"kind": now.kind, "mode": now.mode, "digest": now.digest, "target": now.target}
            fact |= {"size": now.size} if now.kind == "file" else {}
        facts[f"file {one.path}"] = fact
    return facts


def _not_compared(old: models.SessionDiff | None, new: models.SessionDiff | None) -> Iterator[str]:
    if old is None or new is None:
        yield "files: what the call changed in its session is not kept any more, and was not compared"
    elif old.truncated or new.truncated or old.unnamed or new.unnamed:
        yield "files: the call changed more in its session than is compared"


def _stream(content: models.Content | None) -> dict[str, Any] | None:
    return None if content is None else {"digest": content.digest, "size": content.size}


def _not_captured(
    recorded: models.Invocation, request: models.Request, policy: Policy | None
) -> Iterator[str]:
    yield "time: clocks go on, and how long things take is never the same"
    yield "randomness: what the kernel and the tool drew is not recorded"
    yield "scheduling: in what order threads and processes ran, and how the two streams were interleaved"
    if policy is None or (policy.spec.network is not None and not policy.spec.network.reaches_nothing):
        yield "network: what servers answered is not recorded; the servers of now were asked"
    if policy is None or policy.spec.mounts:
        yield "mounts: what the host lends is not recorded; it was as it is now"
    if recorded.secrets:
        yield "secrets: their values are not recorded; those that are stored now were given"
    if request.stdin == "stream":
        yield "standard input: it was streamed and is not recorded; the replay had none"
    if recorded.session is not None:
        yield "the session: only the files of its checkpoint; what ran on between its calls is not there"
    if recorded.attempts > 1:
        yield "retries: the recorded outcome is that of the last of several attempts"
    if recorded.outcome is not None and recorded.outcome.cause in {
        models.Cause.CANCELLED,
        models.Cause.FAILED,
    }:
        yield "the end: it came from outside of the tool, which a replay does not repeat"
