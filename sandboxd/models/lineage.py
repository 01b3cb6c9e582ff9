"""Where an artifact comes from."""

from __future__ import annotations

from pydantic import Field

from sandboxd.models.invocation import DigestRef
from sandboxd.models.wire import Wire

__all__ = ["Lineage", "Release"]


class Release(Wire):
    """A call that released a file of this content."""

    id: str
    n: int
    """The number of its record."""
    uid: int
    at: int
    """When it ended."""
    paths: list[str]
    """Under which names."""
    policy: DigestRef
    image: DigestRef
    plan: str
    inputs: list[str] | None = None
    """The digests of its inputs; None where only an earlier daemon knew them."""
    tar: str | None = None


class Lineage(Wire):
    """The calls that released a content, newest first; at most 100, fewer where their records are large."""

    digest: str
    size: int
    calls: list[Release] = Field(default_factory=list)
