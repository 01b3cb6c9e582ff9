"""What operators see: policies, images, secrets, slots, health; and the document of an error."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandboxd.models.wire import Wire

__all__ = [
    "Health",
    "ImageInfo",
    "PlanDocument",
    "PolicyInfo",
    "PolicyProblem",
    "Problem",
    "SecretInfo",
    "SlotInfo",
]


class PolicyProblem(Wire):
    """One error of a policy file. Lines and columns count from 1."""

    file: str
    line: int
    column: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class PolicyInfo(Wire):
    """A policy as the daemon has it; ``problems`` are those of a later bad edit that is not in force."""

    name: str
    digest: str
    description: str
    file: str
    image: str
    resolved: dict[str, Any] | None = None
    problems: list[PolicyProblem] = Field(default_factory=list)


class PlanDocument(Wire):
    """The answer of ``POST /v1/plans``: what would run, exactly, and where each value came from."""

    digest: str
    plan: dict[str, Any]
    explain: list[dict[str, Any]]


class ImageInfo(Wire):
    """An image in the store."""

    name: str
    digest: str
    size: int
    created: int
    source: str
    architecture: str
    used_by: list[str] = Field(default_factory=list)


class SecretInfo(Wire):
    """A stored secret. Its value is never given back, nor what would tell something of it."""

    name: str
    version: int | None = None
    """Counts from 1; no number is used twice for a name. None where the record is damaged."""
    created: int | None = None
    rotated: int | None = None
    """When this version was stored."""
    problem: str | None = None
    """Why it cannot be used."""


class SlotInfo(Wire):
    """A container that the daemon holds. ``id`` is None while it is being created."""

    id: str | None = None
    state: Literal["creating", "waiting", "running", "destroying"]
    policy: str
    image: str
    shape: str
    """The digest of what it was made for; only a call of exactly this gets it."""
    since: int
    """Since when it waits, and else since when it is being made."""
    warm: bool = False
    """Made ahead of its call."""


class Health(Wire):
    """The answer of ``GET /v1/health``."""

    status: Literal["ready", "draining"]
    version: str
    engine: str
    runtime: str
    running: int
    queued: int
    problems: list[PolicyProblem] = Field(default_factory=list)


class Problem(BaseModel):
    """An RFC 9457 problem document; ``code`` is stable, the rest explains it."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
