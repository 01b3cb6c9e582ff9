"""The calls of the API that are about what is recorded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NotRequired, TypedDict

from sandboxd import models
from sandboxd.client import wire
from sandboxd.client.calls.call import Call, one

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

__all__ = ["SearchFields", "lineage", "prune", "replay", "replay_event", "replay_session", "search"]


class SearchFields(TypedDict):
    """Which calls are looked among: of a policy, a caller, a cause, an image's digest, a time (µs).

    ``before`` is the ``next`` of the page before; ``limit`` is how many a page has.
    """

    policy: NotRequired[str | None]
    uid: NotRequired[int | None]
    cause: NotRequired[str | None]
    image: NotRequired[str | None]
    since: NotRequired[int | None]
    until: NotRequired[int | None]
    before: NotRequired[int | None]
    limit: NotRequired[int | None]


def search(q: str, **fields: Unpack[SearchFields]) -> Call[models.SearchResults]:
    """A page of calls that fit."""
    return Call(wire.Exchange("GET", wire.target("search", q=q or None, **fields)), one(models.SearchResults))


def lineage(digest: str) -> Call[models.Lineage]:
    """Where a content comes from."""
    return Call(wire.Exchange("GET", wire.target("artifacts", digest, "lineage")), one(models.Lineage))


def replay(id: str, policy: str | None) -> Call[models.Replay]:  # noqa: A002
    """Run a recorded call again."""
    body = json.dumps({} if policy is None else {"policy": policy}).encode()
    return Call(
        wire.Exchange("POST", wire.invocation_target(id, "replay"), body, waits=True), one(models.Replay)
    )


def replay_session(session: str, policy: str | None, *, keep: bool) -> wire.Exchange:
    """Run the calls of a session again."""
    body = json.dumps(
        ({} if policy is None else {"policy": policy}) | ({"keep": True} if keep else {})
    ).encode()
    return wire.Exchange("POST", wire.target("sessions", session, "replay"), body, waits=True)


replay_event: Callable[[bytes], models.ReplayEvent] = one(models.ReplayEvent)
"""Decodes one line of the answer to that."""


def prune(age: int | None, size: int | None) -> Call[models.Pruning]:
    """Remove the oldest bodies and files now."""
    body = json.dumps({k: v for k, v in (("age", age), ("size", size)) if v is not None}).encode()
    return Call(wire.Exchange("POST", wire.target("prune"), body, waits=True), one(models.Pruning))
