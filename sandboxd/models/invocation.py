"""An accepted call, and the events of its life."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from sandboxd.models.container import ContainerUse
from sandboxd.models.network import NetworkEvent
from sandboxd.models.outcome import Denial, Failure, LimitReached, Outcome, Usage
from sandboxd.models.receipt import Receipt
from sandboxd.models.retry import FailedAttempt
from sandboxd.models.wire import Bytes, Content, Wire

__all__ = [
    "Artifact",
    "CallerInfo",
    "DigestRef",
    "Event",
    "Invocation",
    "InvocationList",
    "SecretUse",
    "State",
    "Times",
    "Withheld",
]


class State(StrEnum):
    """Where an invocation is."""

    ACCEPTED = "accepted"
    HELD = "held"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    COLLECTING = "collecting"
    ENDED = "ended"


class DigestRef(Wire):
    """A name and the digest that it stood for at the time."""

    name: str
    digest: str


class CallerInfo(Wire):
    """Who asked, as the kernel told it."""

    uid: int
    gid: int
    role: str


class Times(Wire):
    """When the invocation entered each state, if it did."""

    accepted: int
    started: int | None = None
    ended: int | None = None


class Artifact(Wire):
    """A file released from a call, content-addressed. Non-UTF-8 names are percent-encoded."""

    path: str
    size: int
    digest: str
    executable: bool = False


class Withheld(Wire):
    """A file that matched an artifact pattern and was not released, and why."""

    path: str
    reason: str
    detail: str = ""


class SecretUse(Wire):
    """A secret that a call was given: which version, and how."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str
    version: int
    as_: Annotated[Literal["env", "file", "proxy"], Field(alias="as")]


class Invocation(Wire):
    """One accepted call."""

    id: str
    state: State
    caller: CallerInfo
    policy: DigestRef
    image: DigestRef
    plan: str
    """Digest of the plan, of the last attempt's."""
    argv: list[str | Bytes]
    labels: dict[str, str] = Field(default_factory=dict)
    key: str | None = None
    times: Times
    outcome: Outcome | None = None
    stdout: Content | None = None
    stderr: Content | None = None
    receipt: Receipt | None = None
    stdin_taken: int | None = None
    """Bytes that were taken of the standard input that was sent while it ran; None: none was to be sent."""
    usage: Usage | None = None
    denials: list[Denial] = Field(default_factory=list)
    limits_reached: list[LimitReached] = Field(default_factory=list)
    artifacts: list[Artifact] = Field(default_factory=list)
    withheld: list[Withheld] = Field(default_factory=list)
    secrets: list[SecretUse] = Field(default_factory=list)
    """The secrets that its command was given."""
    attempts: int = 0
    """How many there were; all but the last are in ``retried``."""
    retried: list[FailedAttempt] = Field(default_factory=list)
    session: str | None = None
    """The id of the session that it ran in."""
    checkpoint_before: str | None = None
    """The digest of the session's files that it began with."""
    checkpoint_after: str | None = None
    """And of those that it left, where they were kept: the same where it changed nothing."""
    container: ContainerUse | None = None
    """Of a call in the container that its session keeps: which one that was."""
    pruned: int | None = None
    """When its body, output and artifacts were removed; what is left here is what its record's header has."""


class InvocationList(Wire):
    """A page of invocations, newest first; ``next`` is the ``before`` of the following page."""

    invocations: list[Invocation]
    next: str | None = None


class Event(Wire):
    """One numbered event of a call. ``offset`` is the byte offset of ``data`` in its stream."""

    seq: int
    at: int
    type: Literal[
        "accepted", "started", "output", "network", "denied", "limit", "retry", "unrecorded", "ended"
    ]
    """``unrecorded`` has the number of the event before it, and is not kept: who reads later is not told."""
    id: str | None = None
    stream: Literal["stdout", "stderr"] | None = None
    offset: int | None = None
    data: Bytes | None = None
    network: NetworkEvent | None = None
    denial: Denial | None = None
    limit: LimitReached | None = None
    retry: FailedAttempt | None = None
    """On ``retry``: the attempt that ended, and that is followed by another."""
    error: Failure | None = None
    """On ``unrecorded``: why the outcome is not told yet. It is as soon as it is on disk."""
    invocation: Invocation | None = None
    """On ``ended``: the invocation as ``GET`` would give it."""
