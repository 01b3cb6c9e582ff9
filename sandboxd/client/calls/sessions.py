"""The calls of the API that are about sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from sandboxd import models
from sandboxd.client import wire
from sandboxd.client.calls.call import Call, body_of, nothing, one, valid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

__all__ = [
    "PageFields",
    "SessionFields",
    "checkpoint_session",
    "checkpoints",
    "create_session",
    "delete_session",
    "discard_session",
    "end_session",
    "fork_session",
    "rollback_session",
    "session",
    "sessions",
]


class SessionFields(TypedDict):
    """What a session is given: a policy, the only one of its calls; labels; when it goes; its quota.

    It is removed after ``ttl``, and ``idle`` after its last use: microseconds, or a text with a unit
    (``"1h"``). ``size`` is bytes, or ``"64MiB"``; ``inodes`` is how many files.
    """

    policy: NotRequired[str | None]
    labels: NotRequired[Mapping[str, str] | None]
    ttl: NotRequired[int | str | None]
    idle: NotRequired[int | str | None]
    size: NotRequired[int | str | None]
    inodes: NotRequired[int | str | None]


class PageFields(TypedDict):
    """Which page: ``before`` is the ``next`` of the page before, ``limit`` how many it has."""

    before: NotRequired[str | None]
    limit: NotRequired[int | None]


def _given(name: str | None, fields: SessionFields, **more: str | None) -> dict[str, Any]:
    """The body of a new session, with no more than was given."""
    labels = fields.get("labels")
    quota = {key: fields[key] for key in ("size", "inodes") if fields.get(key) is not None}
    rest = {key: value for key, value in fields.items() if key not in {"size", "inodes"}}
    given = {"name": name, **rest, "labels": labels and dict(labels), "quota": quota, **more}
    return {key: value for key, value in given.items() if value is not None and value != {}}


def create_session(
    name: str | None, checkout: str | None = None, **fields: Unpack[SessionFields]
) -> Call[models.SessionInfo]:
    """A new session; ``checkout`` is the handle of a directory that was lent."""
    asked = valid(models.SessionRequest, _given(name, fields, checkout=checkout))
    return Call(wire.Exchange("POST", wire.target("sessions"), body_of(asked)), one(models.SessionInfo))


def fork_session(
    session: str, name: str | None, checkpoint: str | None, **fields: Unpack[SessionFields]
) -> Call[models.SessionInfo]:
    """A new session that begins with a checkpoint of another."""
    body = body_of(valid(models.SessionFork, _given(name, fields, checkpoint=checkpoint)))
    return Call(
        wire.Exchange("POST", wire.target("sessions", session, "fork"), body), one(models.SessionInfo)
    )


def sessions(**fields: Unpack[PageFields]) -> Call[models.SessionList]:
    """A page of sessions."""
    return Call(wire.Exchange("GET", wire.target("sessions", **fields)), one(models.SessionList))


def session(named: str) -> Call[models.SessionInfo]:
    """One of them."""
    return Call(wire.Exchange("GET", wire.target("sessions", named)), one(models.SessionInfo))


def delete_session(named: str) -> Call[None]:
    """Remove one."""
    return Call(wire.Exchange("DELETE", wire.target("sessions", named)), nothing)


def checkpoints(named: str, **fields: Unpack[PageFields]) -> Call[models.CheckpointList]:
    """A page of the checkpoints of one."""
    target = wire.target("sessions", named, "checkpoints", **fields)
    return Call(wire.Exchange("GET", target), one(models.CheckpointList))


def rollback_session(named: str, checkpoint: str) -> Call[models.SessionInfo]:
    """Move one to a checkpoint."""
    body = body_of(valid(models.SessionRollback, {"checkpoint": checkpoint}))
    return Call(
        wire.Exchange("POST", wire.target("sessions", named, "rollback"), body), one(models.SessionInfo)
    )


def checkpoint_session(named: str) -> Call[models.CheckpointInfo]:
    """Make a checkpoint of one's container."""
    return Call(
        wire.Exchange("POST", wire.target("sessions", named, "checkpoint"), b""), one(models.CheckpointInfo)
    )


def end_session(named: str, *, discard: bool) -> Call[models.SessionInfo]:
    """End one's container."""
    body = body_of(valid(models.SessionEnd, {"discard": discard}))
    return Call(wire.Exchange("POST", wire.target("sessions", named, "end"), body), one(models.SessionInfo))


def discard_session(named: str) -> Call[models.SessionInfo]:
    """Forget what one does not stand on."""
    return Call(
        wire.Exchange("POST", wire.target("sessions", named, "discard"), b""), one(models.SessionInfo)
    )
