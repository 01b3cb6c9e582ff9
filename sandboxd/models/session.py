"""A session and its checkpoints, and what is asked of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sandboxd.models.container import SessionContainer
from sandboxd.models.network import SessionNetwork
from sandboxd.models.request import MAX_LABELS
from sandboxd.models.wire import Count, Duration, Size, Text, Wire

__all__ = [
    "CheckpointInfo",
    "CheckpointList",
    "SessionFork",
    "SessionInfo",
    "SessionLend",
    "SessionList",
    "SessionQuota",
    "SessionRequest",
    "SessionRollback",
]

UUID_LENGTH = 36


def _is_no_id(value: str) -> str:
    if len(value) == UUID_LENGTH and value.count("-") == 4:
        raise ValueError("looks like an id; a name must not")
    return value


SessionName = Annotated[
    str,
    Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    AfterValidator(_is_no_id),
]


class SessionQuota(Wire):
    """What the files of a session may be: bytes of what they hold, and entries. None: the caller's share."""

    size: Size | None = None
    inodes: Count | None = None


class SessionRequest(Wire):
    """What a caller asks for: a line of calls that share a workspace."""

    name: SessionName | None = None
    """Unique among the caller's sessions; its id does as well."""
    policy: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    """The only policy that calls in it run under; without it, any that the caller may use."""
    labels: Annotated[
        dict[Annotated[Text, Field(min_length=1, max_length=128)], Annotated[Text, Field(max_length=1024)]],
        Field(max_length=MAX_LABELS),
    ] = Field(default_factory=dict)
    ttl: Duration | None = None
    """After so long it is removed, whether or not it is used."""
    idle: Duration | None = None
    """So long after it was last used it is removed."""
    quota: SessionQuota = Field(default_factory=SessionQuota)
    checkout: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    """The handle of a directory that was passed over the socket for that: it is below all of the files."""


class SessionLend(Wire):
    """A session's directory again, after a restart of the daemon."""

    checkout: Annotated[Text, Field(min_length=1, max_length=64)]
    """The handle of the same directory, passed again."""


class SessionFork(SessionRequest):
    """A new session that begins with a checkpoint of another."""

    checkpoint: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    """Its id or digest; without it, where the other stands."""


class SessionRollback(Wire):
    """Where a session shall stand."""

    checkpoint: Annotated[Text, Field(min_length=1, max_length=128)]
    """The id or digest of one of its checkpoints."""


class CheckpointInfo(Wire):
    """A session's workspace as it stood after a call that committed."""

    id: str
    parent: str | None = None
    """The id of the one that it was made of."""
    digest: str
    """Of the parent's digest and of what the call changed."""
    size: int
    """Bytes that the call added or changed, without holes; and so are the entries."""
    inodes: int
    created: int
    call: str | None = None
    """The call; None for the first of a session."""
    head: bool = False
    """Whether the session stands on it."""


class CheckpointList(Wire):
    """A page of checkpoints, newest first; ``next`` is the ``before`` of the following page."""

    checkpoints: list[CheckpointInfo]
    next: str | None = None


class SessionInfo(Wire):
    """A session as it stands."""

    id: str
    name: str | None = None
    uid: int
    policy: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    created: int
    used: int
    """When a call in it ended last, or it was made, forked from, rolled back."""
    expires: int | None = None
    """When it is removed, if nothing uses it until then; a call in flight keeps it."""
    ttl: int | None = None
    idle: int | None = None
    quota: SessionQuota
    head: CheckpointInfo
    size: int
    """Bytes on disk that its layers hold, which is what its quota counts; and so are the entries."""
    inodes: int
    layers: int
    checkout: Literal["lent", "missing"] | None = None
    """Of a session on its caller's directory: whether the daemon has that, or has to be given it again."""
    lent: int | None = None
    """Since when such a session, or the one that it was forked from, stands on it."""
    container: SessionContainer | None = None
    """The container that it keeps (``isolation: session``), or has lost. ``head`` has nothing of it but by a
    checkpoint."""
    calls: int
    """Calls that ended in it."""
    network: SessionNetwork = Field(default_factory=SessionNetwork)
    in_flight: int = 0


class SessionList(Wire):
    """A page of sessions, newest first; ``next`` is the ``before`` of the following page."""

    sessions: list[SessionInfo]
    next: str | None = None
