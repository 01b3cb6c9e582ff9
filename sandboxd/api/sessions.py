"""The routes of sessions: decode, call the service, encode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.responses import Response

from sandboxd import models
from sandboxd.api import body, queries
from sandboxd.api.invocations import caller_of, json_response
from sandboxd.api.openapi import Doc
from sandboxd.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request

    from sandboxd.api.service import Service
    from sandboxd.room import Room

__all__ = ["Sessions", "session_of"]

MAX_BODY = 1024 * 1024
MAX_NAME = 128


class Sessions:
    """The handlers, and the service that they call. ``bodies`` bounds what all of them hold."""

    def __init__(self, service: Service, bodies: Room) -> None:
        self.service = service
        self.bodies = bodies
        self.bounds = body.Bounds(MAX_BODY, service.config.http.body_time)

    async def create(self, request: Request) -> Response:
        """A new session, without files."""
        body.query(request, queries.NoQuery)
        caller = caller_of(request)
        with self.bodies.held(caller.uid) as held:
            asked = await body.decode(request, models.SessionRequest, self.bounds, held)
        return _made(await self.service.sessions.create(caller, asked))

    async def list(self, request: Request) -> Response:
        """The caller's sessions, newest first; everybody's for an operator."""
        asked = body.query(request, queries.PageQuery)
        return json_response(
            await self.service.sessions.list(caller_of(request), before=asked.before, limit=asked.limit)
        )

    async def get(self, request: Request) -> Response:
        """One session, by its id or name."""
        body.query(request, queries.NoQuery)
        return json_response(await self.service.sessions.get(caller_of(request), session_of(request)))

    async def delete(self, request: Request) -> Response:
        """Remove a session in which no call runs. What forks of it stand on stays."""
        body.query(request, queries.NoQuery)
        await self.service.sessions.delete(caller_of(request), session_of(request))
        return Response(status_code=204)

    async def checkpoints(self, request: Request) -> Response:
        """The checkpoints of a session, newest first."""
        asked = body.query(request, queries.PageQuery)
        found = await self.service.sessions.checkpoints(
            caller_of(request), session_of(request), before=asked.before, limit=asked.limit
        )
        return json_response(found)

    async def fork(self, request: Request) -> Response:
        """A new session that begins with a checkpoint of this one; both go on apart."""
        body.query(request, queries.NoQuery)
        caller = caller_of(request)
        with self.bodies.held(caller.uid) as held:
            asked = await body.decode(request, models.SessionFork, self.bounds, held)
        return _made(await self.service.sessions.fork(caller, session_of(request), asked))

    async def lend(self, request: Request) -> Response:
        """Give a session the directory that it stands on, which a restart took from it."""
        body.query(request, queries.NoQuery)
        caller = caller_of(request)
        with self.bodies.held(caller.uid) as held:
            asked = await body.decode(request, models.SessionLend, self.bounds, held)
        return json_response(await self.service.sessions.lend(caller, session_of(request), asked.checkout))

    async def checkpoint(self, request: Request) -> Response:
        """Make a checkpoint of the files in the container that the session keeps; it waits for its turn."""
        body.query(request, queries.NoQuery)
        await body.read(request, self.bounds)
        return json_response(await self.service.sessions.checkpoint(caller_of(request), session_of(request)))

    async def end(self, request: Request) -> Response:
        """End the container that the session keeps, after a checkpoint of its files, or discarding them."""
        body.query(request, queries.NoQuery)
        caller = caller_of(request)
        with self.bodies.held(caller.uid) as held:
            asked = await body.decode(request, models.SessionEnd, self.bounds, held)
        found = await self.service.sessions.end(caller, session_of(request), discard=asked.discard)
        return json_response(found)

    async def rollback(self, request: Request) -> Response:
        """Let the session stand on another of its checkpoints; the later ones stay, to go forward again."""
        body.query(request, queries.NoQuery)
        caller = caller_of(request)
        with self.bodies.held(caller.uid) as held:
            asked = await body.decode(request, models.SessionRollback, self.bounds, held)
        return json_response(
            await self.service.sessions.rollback(caller, session_of(request), asked.checkpoint)
        )

    async def discard(self, request: Request) -> Response:
        """Forget the checkpoints that the session does not stand on, as a rollback left them."""
        body.query(request, queries.NoQuery)
        await body.read(request, self.bounds)
        return json_response(await self.service.sessions.discard(caller_of(request), session_of(request)))

    def routes(self) -> Sequence[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation of each route."""
        one, info = "/v1/sessions/{session}", models.SessionInfo
        page = queries.PageQuery
        return [
            ("POST", "/v1/sessions", self.create,
             Doc("Make a session", body=models.SessionRequest, answer=info, status=201)),
            ("GET", "/v1/sessions", self.list, Doc("Sessions", query=page, answer=models.SessionList)),
            ("GET", one, self.get, Doc("One session", answer=info)),
            ("DELETE", one, self.delete, Doc("Remove a session", status=204)),
            ("GET", one + "/checkpoints", self.checkpoints,
             Doc("The checkpoints of a session", query=page, answer=models.CheckpointList)),
            ("POST", one + "/checkpoint", self.checkpoint,
             Doc("Checkpoint the container that a session keeps", answer=models.CheckpointInfo)),
            ("POST", one + "/end", self.end,
             Doc("End the container that a session keeps", body=models.SessionEnd, answer=info)),
            ("POST", one + "/fork", self.fork,
             Doc("Fork a session", body=models.SessionFork, answer=info, status=201)),
            ("POST", one + "/rollback", self.rollback,
             Doc("Move a session to a checkpoint", body=models.SessionRollback, answer=info)),
            ("POST", one + "/checkout", self.lend,
             Doc("Lend a session its directory again", body=models.SessionLend, answer=info)),
            ("POST", one + "/discard", self.discard,
             Doc("Forget what a session does not stand on", answer=info)),
        ]  # fmt: skip


def session_of(request: Request) -> str:
    """The name or id of the session that a path speaks of. Raises NotFound."""
    name: str = request.path_params["session"]
    if len(name) > MAX_NAME:
        raise NotFound("there is no such session")
    return name


def _made(info: models.SessionInfo) -> Response:
    return json_response(info, 201, {"location": f"/v1/sessions/{quote(info.id)}"})
