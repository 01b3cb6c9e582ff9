"""The route of batches: many requests in one, and what came of each as it comes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pydantic_core
from pydantic import ValidationError

from sandboxd import models
from sandboxd.api import body, problem, queries
from sandboxd.api.invocations import caller_of, summary_of
from sandboxd.api.openapi import NDJSON, Doc
from sandboxd.api.streams import StreamResponse
from sandboxd.errors import Refused, SandboxdError
from sandboxd.room import Held

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from sandboxd.api.identity import Caller
    from sandboxd.api.service import Service
    from sandboxd.room import Room

__all__ = ["Batches"]


class _Run:
    """One batch: its requests are submitted in order, so many at a time, and end in any order."""

    def __init__(self, service: Service, caller: Caller, batch: models.Batch, held: Held) -> None:
        self._service = service
        self._caller = caller
        self._batch = batch
        self._tied: set[str] = set()
        self._held = held
        self._gone = False

    async def lines(self) -> AsyncIterator[bytes]:
        """A line for each request."""
        done: asyncio.Queue[models.BatchResult] = asyncio.Queue(1)  # a turn lasts until its line is taken
        turns = asyncio.Semaphore(self._batch.parallel)
        requests: list[Any] = self._batch.requests

        async def one(index: int) -> None:
            async with turns:
                if not self._gone:
                    asked, requests[index] = requests[index], None
                    await done.put(await self._one(index, asked))

        tasks = [asyncio.create_task(one(index)) for index in range(len(requests))]
        try:
            for _ in tasks:
                yield pydantic_core.to_json(await done.get(), exclude_none=True) + b"\n"
        finally:
            self._held.release()
            if any(not task.done() for task in tasks):
                await self.leave()

    async def leave(self) -> None:
        """Whoever asked has gone: what has no key ends, and nothing more begins."""
        self._gone = True
        self._held.release()
        for id_ in list(self._tied):
            await self._service.cancel(self._caller, id_)

    async def _one(self, index: int, asked: Any) -> models.BatchResult:
        summary: dict[str, Any] = {}
        try:
            try:
                request = models.Request.model_validate(asked)
            except ValidationError as error:
                raise problem.invalid(error) from None
            summary = summary_of(request)
            tied = request.key is None
            found = await self._service.submit(self._caller, request, tied=tied)
            del request, asked
            if tied:
                self._tied.add(found.id)
                if self._gone:
                    await self._service.cancel(self._caller, found.id)
            found = await self._service.wait(self._caller, found.id)
            self._tied.discard(found.id)
            return models.BatchResult(index=index, invocation=found)
        except SandboxdError as error:
            if isinstance(error, Refused):
                await self._service.refused(self._caller, error, summary)
            return models.BatchResult(index=index, problem=problem.of(error))
        except Exception as error:  # noqa: BLE001 - a bug of ours for one request is no end of the others
            return models.BatchResult(index=index, problem=problem.of_fault(error))


class Batches:
    """The handler, and the service that it calls."""

    def __init__(self, service: Service, bodies: Room) -> None:
        self.service = service
        self.bodies = bodies
        http = service.config.http
        self.bounds = body.Bounds(http.body, http.body_time)

    async def create(self, request: Request) -> Response:
        """Run many requests; each is accepted, or refused, alone."""
        caller = caller_of(request)
        body.query(request, queries.NoQuery)
        held = Held(self.bodies, caller.uid)
        try:
            batch = await body.decode(request, models.Batch, self.bounds, held)
        except BaseException as error:
            held.release()
            if isinstance(error, Refused):
                await self.service.refused(caller, error, {})
            raise
        run = _Run(self.service, caller, batch, held)
        return StreamResponse(run.lines(), NDJSON, gone=run.leave)

    def routes(self) -> Sequence[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation."""
        create = Doc(
            "Run many requests: a line for each, a BatchResult, as it ends",
            body=models.Batch,
            lines=models.BatchResult,
        )
        return [("POST", "/v1/batches", self.create, create)]
