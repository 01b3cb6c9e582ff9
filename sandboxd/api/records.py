"""The routes of what has ended: search, artifacts by digest, pruning."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pydantic_core
from starlette.responses import Response

from sandboxd import models
from sandboxd.api import body, queries
from sandboxd.api.invocations import SMALL, caller_of, id_of, json_response
from sandboxd.api.openapi import NDJSON, Doc
from sandboxd.api.representation import DOCUMENTED, HEADED, represented
from sandboxd.api.sessions import session_of
from sandboxd.api.streams import StreamResponse, until_gone, while_there
from sandboxd.journal.search import Query

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from starlette.requests import Request

    from sandboxd.api.service import Service

__all__ = ["Records"]


async def _lines(events: AsyncGenerator[models.ReplayEvent]) -> AsyncIterator[bytes]:
    """A line for each."""
    async with aclosing(events):
        async for event in events:
            yield (
                await anyio.to_thread.run_sync(partial(pydantic_core.to_json, event, exclude_none=True))
                + b"\n"
            )


class Records:
    """The handlers, and the service that they call."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.small = body.Bounds(SMALL, service.config.http.body_time)

    async def search(self, request: Request) -> Response:
        """A page of calls that fit, newest first."""
        asked = body.query(request, queries.SearchQuery)
        query = Query(
            text=asked.q,
            uid=asked.uid,
            policy=asked.policy,
            cause=None if asked.cause is None else asked.cause.value,
            image=asked.image,
            since=asked.since,
            until=asked.until,
            before=asked.before,
            limit=asked.limit,
        )
        return json_response(await self.service.search(caller_of(request), query))

    async def artifact(self, request: Request) -> Response:
        """A content that a call of the caller's released, or a range of it."""
        body.query(request, queries.NoQuery)
        found = await self.service.lineage(caller_of(request), request.path_params["digest"])
        pieces = partial(self.service.blob, found.digest, found.size)
        return await while_there(request.receive, represented(request, found.size, found.digest, pieces))

    async def lineage(self, request: Request) -> Response:
        """Which calls released a content, and what they were made of."""
        body.query(request, queries.NoQuery)
        return json_response(await self.service.lineage(caller_of(request), request.path_params["digest"]))

    async def replay(self, request: Request) -> Response:
        """Run a recorded call again; who goes away cancels it."""
        body.query(request, queries.NoQuery)
        asked = await body.decode(request, queries.ReplayBody, self.small)
        found: models.Replay | None = None
        async with until_gone(request.receive) as watched:
            found = await self.service.replay(caller_of(request), id_of(request), asked.policy)
        del watched
        return json_response(found)

    async def replay_session(self, request: Request) -> Response:
        """Run the calls of a session again; who goes away ends it."""
        body.query(request, queries.NoQuery)
        asked = await body.decode(request, queries.SessionReplayBody, self.small)
        named = session_of(request)
        pieces: AsyncIterator[bytes] | None = None
        async with until_gone(request.receive) as watched:
            asking = self.service.replay_session(caller_of(request), named, asked.policy, keep=asked.keep)
            pieces = _lines(await asking)
        del watched
        if pieces is None:  # nobody is there any more
            return Response(status_code=204)
        return StreamResponse(pieces, NDJSON)

    async def prune(self, request: Request) -> Response:
        """Remove the oldest bodies and files now; for operators."""
        body.query(request, queries.NoQuery)
        asked = await body.decode(request, queries.PruneBody, self.small)
        return json_response(await self.service.prune(caller_of(request), age=asked.age, size=asked.size))

    def routes(self) -> Sequence[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation of each route."""
        return [
            ("GET", "/v1/search", self.search,
             Doc("Search ended calls", query=queries.SearchQuery, answer=models.SearchResults)),
            ("GET", "/v1/artifacts/{digest}", self.artifact, Doc("A content by its digest", **DOCUMENTED)),
            ("HEAD", "/v1/artifacts/{digest}", self.artifact, Doc("The size of a content", **HEADED)),
            ("GET", "/v1/artifacts/{digest}/lineage", self.lineage,
             Doc("Where a content comes from", answer=models.Lineage)),
            ("POST", "/v1/invocations/{id}/replay", self.replay,
             Doc("Run a recorded call again", body=queries.ReplayBody, answer=models.Replay)),
            ("POST", "/v1/sessions/{session}/replay", self.replay_session,
             Doc("Run the calls of a session again: a line for each, a ReplayEvent, as it ends",
                 body=queries.SessionReplayBody, lines=models.ReplayEvent)),
            ("POST", "/v1/prune", self.prune,
             Doc("Remove old bodies and files", body=queries.PruneBody, answer=models.Pruning)),
        ]  # fmt: skip
