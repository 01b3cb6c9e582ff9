"""What goes into the journal: an acceptance, an outcome's header, a refusal."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd import errors, models, units

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd.journal.requests import Asked, Open
    from sandboxd.journal.spool import Part

__all__ = ["Accepted", "Existing", "Refusal", "body", "from_header", "outcome_header", "remains"]

VERSION = 1
_MAX_DETAIL = 2000
_MAX_REQUEST = 4000


@dataclass(frozen=True)
class Accepted:
    """A call that is about to be accepted; ``request_digest`` is of the request without its key."""

    invocation: models.Invocation
    request_digest: str
    request: Asked | None = None
    open: Open | None = None
    """What a later daemon has to know to run it."""
    callback: models.Callback | None = None
    """Who is told of its end."""


@dataclass(frozen=True)
class Existing:
    """The call that a caller's key stands for already."""

    id: str
    request_digest: str


@dataclass(frozen=True)
class Refusal:
    """A request that was refused before acceptance. Long texts are cut when it is stored."""

    at: int
    uid: int | None
    """None where the peer could not be identified."""
    code: str
    detail: str
    request: str = ""
    """The head of what was asked, for an operator who wonders."""

    def row(self) -> tuple[int, int | None, str, str, str]:
        """The stored form, bounded."""
        return (self.at, self.uid, _clean(self.code, 64), _clean(self.detail, _MAX_DETAIL),
                _clean(self.request, _MAX_REQUEST))  # fmt: skip


def _clean(text: str, most: int) -> str:
    """Text that SQLite takes: no lone surrogate, not too long."""
    return text[:most].encode("utf-8", "backslashreplace").decode()


def body(invocation: models.Invocation) -> bytes:
    """The stored JSON of an invocation: all of it, but its streams' heads are in its spool."""
    streams = {
        name: content.model_copy(update={"text": "", "base64": None, "complete": content.size == 0})
        for name in ("stdout", "stderr")
        if (content := getattr(invocation, name)) is not None
    }
    return invocation.model_copy(update=streams).model_dump_json(exclude_none=True).encode()


def from_header(header: bytes, policy: str, pruned: int) -> models.Invocation:
    """What the header of a pruned call still knows. Raises JournalCorrupt."""
    try:
        found = json.loads(header)
        return models.Invocation(
            id=found["id"],
            state=models.State.ENDED,
            caller=models.CallerInfo.model_validate(found["caller"]),
            policy=models.DigestRef(name=policy, digest=found["policy"]),
            image=models.DigestRef(name="", digest=found["image"]),
            plan=found["plan"],
            argv=[],
            times=models.Times(accepted=found["accepted"], ended=found["at"]),
            outcome=models.Outcome.model_validate(found["outcome"]),
            stdout=_known(found["stdout"]),
            stderr=_known(found["stderr"]),
            usage=None if found["usage"] is None else models.Usage.model_validate(found["usage"]),
            secrets=[models.SecretUse.model_validate(use) for use in found.get("secrets", [])],
            attempts=found["attempts"],
            pruned=pruned,
        )
    except (ValueError, KeyError, TypeError) as error:  # of pydantic too
        raise errors.JournalCorrupt("the header of a pruned call cannot be read") from error


def remains(id_: str, uid: int, policy: str) -> models.Invocation:
    """What is left of an accepted call whose document is damaged."""
    nothing = models.DigestRef(name="", digest="")
    return models.Invocation(
        id=id_,
        state=models.State.ACCEPTED,
        caller=models.CallerInfo(uid=uid, gid=uid, role="unknown"),
        policy=nothing.model_copy(update={"name": policy}),
        image=nothing,
        plan="",
        argv=[],
        times=models.Times(accepted=(uuid.UUID(id_).int >> 80) * 1000),  # RFC 9562: milliseconds
    )


def _known(stream: dict[str, Any] | None) -> models.Content | None:
    if stream is None:
        return None
    return models.Content(text="", size=stream["size"], digest=stream["digest"], complete=not stream["size"])


def _stream(content: models.Content | None) -> dict[str, Any] | None:
    return None if content is None else {"digest": content.digest, "size": content.size}


def _exact(value: Any) -> Any:
    """JSON that the canonical form can hold: counters of the kernel may be over 2**53, and become text."""
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return str(value) if isinstance(value, int) and abs(value) > units.MAX else value


def _retried(invocation: models.Invocation) -> dict[str, Any]:
    """The attempts before the last, where there were any."""
    if not invocation.retried:
        return {}
    shown = {"number", "started", "ended", "cause", "exit_code", "signal", "error", "plan", "raised"}
    found = [each.model_dump(mode="json", include=shown, exclude_none=True) for each in invocation.retried]
    return {"retried": _exact(found)}


def outcome_header(
    invocation: models.Invocation,
    *,
    inputs: Sequence[str] | None = None,
    tar: str | None = None,
    events: Mapping[str, Part] | None = None,
) -> dict[str, Any]:
    """The header of an ended invocation's record; the chain adds ``n``, ``prev`` and ``body``.

    ``inputs`` are the digests of its inputs in order, ``tar`` that of its tar; None for inputs that only an
    earlier daemon knew, which the digest of the plan still covers. ``events`` is what ``Spool.told`` gives:
    what was told of the call before its outcome. Raises ValueError for an
    invocation without an outcome.
    """
    if invocation.outcome is None:
        raise ValueError("an invocation without an outcome has no record")
    receipt, usage = invocation.receipt, invocation.usage
    return {
        "v": VERSION,
        "type": "outcome",
        "id": invocation.id,
        "at": invocation.times.ended or invocation.times.accepted,
        "accepted": invocation.times.accepted,
        "caller": invocation.caller.model_dump(),
        "policy": invocation.policy.digest,
        "image": invocation.image.digest,
        "plan": invocation.plan,
        "inputs": None if inputs is None else list(inputs),
        "tar": tar,
        "stdout": _stream(invocation.stdout),
        "stderr": _stream(invocation.stderr),
        "artifacts": [artifact.digest for artifact in invocation.artifacts],
        "receipt": None if receipt is None else receipt.digest(),
        "usage": None if usage is None else _exact(usage.model_dump()),
        "outcome": _exact(invocation.outcome.model_dump(mode="json", exclude_none=True)),
        "checkpoint_before": invocation.checkpoint_before,
        "checkpoint_after": invocation.checkpoint_after,
        "attempts": invocation.attempts,
        **({"events": {name: dict(part) for name, part in events.items()}} if events else {}),
        **({"session": invocation.session} if invocation.session else {}),
        **({"container": invocation.container.model_dump(exclude_none=True)} if invocation.container else {}),
        **_retried(invocation),
        **({"secrets": [use.model_dump() for use in invocation.secrets]} if invocation.secrets else {}),
    }
