"""The routes of what has ended: search, pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandboxd import models
from sandboxd.api import body, queries
from sandboxd.api.invocations import SMALL, caller_of, json_response
from sandboxd.api.openapi import Doc
from sandboxd.journal.search import Query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from sandboxd.api.service import Service

__all__ = ["Records"]


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
            ("POST", "/v1/prune", self.prune,
             Doc("Remove old bodies and files", body=queries.PruneBody, answer=models.Pruning)),
        ]  # fmt: skip
