"""The route of batches: many requests in one, and what came of each as it comes."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic_core
from pydantic import ValidationError

from sandboxd import errors, models
from sandboxd.api import body, problem, queries
from sandboxd.api.invocations import caller_of, summary_of
from sandboxd.api.openapi import NDJSON, Doc
from sandboxd.api.streams import StreamResponse
from sandboxd.errors import Draining, Refused, SandboxdError
from sandboxd.room import Held

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from sandboxd.api.identity import Caller
    from sandboxd.api.service import Service
    from sandboxd.room import Room

__all__ = ["Batches"]

T = TypeVar("T")


class _Door:
    """Where the requests of a batch wait that the queue has no room for: one tries, the others stand in line.

    Whoever waits here has no place in the queue, and takes nobody's. It tries again when a call of the batch
    has ended, and after the time that it was told.
    """

    def __init__(self) -> None:
        self._line = asyncio.Lock()
        self._bell = asyncio.Event()
        self._closed = False

    def ring(self) -> None:
        """There may be room."""
        self._bell.set()

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closed = True
        self._bell.set()

    async def through(self, submit: Callable[[], Awaitable[T]], deadline: float | None) -> T:
        """What a request gives once there is room, at most ``deadline`` seconds after it was refused first.

        Raises QueueFull then, and what else ``submit`` raises.
        """
        full: errors.QueueFull | None = None
        if not self._line.locked():
            try:
                return await submit()
            except errors.QueueFull as error:
                full = error
        loop = asyncio.get_running_loop()
        until = math.inf if deadline is None else loop.time() + deadline
        try:
            async with asyncio.timeout_at(None if deadline is None else until):
                await self._line.acquire()
        except TimeoutError:
            raise full or errors.QueueFull("others of its batch wait for room", retry_after=1) from None
        try:
            while True:
                self._bell.clear()
                if self._closed:
                    raise full or errors.QueueFull("its caller has gone")
                try:
                    return await submit()
                except errors.QueueFull as error:
                    if loop.time() >= until:
                        raise
                    full = error
                    pause = float(error.details.get("retry_after", 1))
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(min(until, loop.time() + pause)):
                        await self._bell.wait()
        finally:
            self._line.release()


class _Run:
    """One batch: its requests are submitted in order, so many at a time, and end in any order."""

    def __init__(self, service: Service, caller: Caller, batch: models.Batch, held: Held) -> None:
        self._service = service
        self._caller = caller
        self._batch = batch
        self._own = frozenset(batch.tied)
        self._tied: dict[str, bool] = {}
        """Ids of calls that end with their caller, and whether they outlive the daemon."""
        self._held = held
        self._door = _Door()
        self._gone = False

    async def lines(self) -> AsyncIterator[bytes]:
        """A line for each request."""
        done: asyncio.Queue[models.BatchResult] = asyncio.Queue()
        turns = asyncio.Semaphore(self._batch.parallel)
        requests: list[Any] = self._batch.requests

        async def one(index: int) -> None:
            await turns.acquire()
            if not self._gone:
                asked, requests[index] = requests[index], None
                done.put_nowait(await self._one(index, asked))

        tasks = [asyncio.create_task(one(index)) for index in range(len(requests))]
        try:
            for _ in tasks:
                yield pydantic_core.to_json(await done.get(), exclude_none=True) + b"\n"
                turns.release()  # a turn lasts until its line is taken
        finally:
            self._held.release()
            if any(not task.done() for task in tasks):
                await self.leave()
                for _ in tasks:
                    turns.release()

    async def leave(self) -> None:
        """Whoever asked has gone: what has no key of the caller's ends, and nothing more begins."""
        self._gone = True
        self._door.close()
        self._held.release()
        await asyncio.gather(*(self._end(id_, lasting=lasting) for id_, lasting in self._tied.items()))

    async def _end(self, id_: str, *, lasting: bool) -> None:
        """End a call whose caller has gone, and not one that is asked for again of the next daemon."""
        if not (lasting and self._service.health().status == "draining"):
            with suppress(SandboxdError):  # it was cancelled, whether or not that is on disk yet
                await self._service.cancel(self._caller, id_)

    async def _one(self, index: int, asked: Any) -> models.BatchResult:
        summary: dict[str, Any] = {}
        try:
            try:
                request = models.Request.model_validate(asked)
            except ValidationError as error:
                raise problem.invalid(error) from None
            summary = summary_of(request)
            keyed = request.key is not None
            tied = not keyed or index in self._own
            deadline = None if request.deadline is None else request.deadline / 1e6
            submit = partial(self._service.submit, self._caller, request, tied=not keyed)
            found = await self._door.through(submit, deadline)
            del request, asked, submit
            if tied:
                self._tied[found.id] = keyed
                if self._gone:
                    await self._end(found.id, lasting=keyed)
            found = await self._service.wait(self._caller, found.id)
            self._tied.pop(found.id, None)
            self._door.ring()
            return models.BatchResult(index=index, invocation=found)
        except Draining as error:  # no record of it for each of ten thousand
            return models.BatchResult(index=index, problem=problem.of(error))
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
            if self.service.health().status == "draining":
                raise Draining("the daemon finishes what runs and takes nothing new")
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
