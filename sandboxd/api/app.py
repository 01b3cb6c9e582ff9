"""The application and its server.

socket -> BoundedProtocol (identity, bounds) -> Edge (nobody gets in, nothing gets out)
       -> Starlette (routing) -> handlers (decode -> call -> encode) -> Service
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from sandboxd import models
from sandboxd.api import problem, queries
from sandboxd.api.batches import Batches
from sandboxd.api.catalogue import Catalogue
from sandboxd.api.files import Files
from sandboxd.api.identity import Identity
from sandboxd.api.invocations import JSON, Invocations, id_of, json_response
from sandboxd.api.openapi import ANY, document
from sandboxd.api.ports import Ports
from sandboxd.api.protocol import CALLER, ServerConfig
from sandboxd.api.records import Records
from sandboxd.api.secrets import Secrets
from sandboxd.api.sessions import Sessions, session_of
from sandboxd.errors import InvalidRequest, NotFound, NotIdentified, SandboxdError, TooLarge
from sandboxd.room import Room

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from pydantic import BaseModel
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from sandboxd.api.identity import Caller
    from sandboxd.api.service import Service
    from sandboxd.config import Config

__all__ = ["Edge", "build", "serve"]

VERSION = "1"
DOCUMENTED: set[type[BaseModel]] = {
    models.Request, models.Batch, models.BatchResult, models.Invocation, models.InvocationList,
    models.PolicyInfo, models.PolicyProblem, models.PlanDocument, models.ImageInfo, models.SlotInfo,
    models.Health, models.Artifact, models.Withheld,
    models.SecretInfo, models.SessionRequest, models.SessionFork, models.SessionRollback, models.SessionInfo,
    models.SessionList, models.CheckpointInfo, models.CheckpointList, models.SessionDiff,
    models.SessionLend, models.FileChange, models.FileInfo, models.FileList, models.FileWritten,
    models.SearchResults, models.Pruning, models.Lineage, models.Replay, queries.ReplayBody,
    models.ReplayEvent, queries.SessionReplayBody,
    queries.SignalBody, queries.CheckBody, queries.PruneBody,
}  # fmt: skip

log = structlog.get_logger(__name__)


class Edge:
    """The outermost layer: peers that are nobody stop here, and so does any fault that is left."""

    def __init__(self, app: Starlette, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        caller: Caller = scope["state"][CALLER]
        if caller.role == "none":
            error = NotIdentified(
                f"no rule of the configuration's `callers` matches uid {caller.uid}", uid=caller.uid
            )
            await self.service.refused(caller, error, {})
            await problem.respond(error)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        except Exception:  # noqa: BLE001  # logged and answered by _internal; the daemon serves on
            # If the answer had begun, uvicorn closes the connection without its end.
            return


def build(service: Service) -> Edge:
    """The ASGI application over a service."""
    bodies = Room(service.config.budget.inputs)
    routes = [
        *Invocations(service, bodies).routes(),
        *Batches(service, bodies).routes(),
        *Ports("/v1/invocations/{id}", id_of, service.entrance).routes(),
        *Ports("/v1/sessions/{session}", session_of, service.session_entrance).routes(),
        *Catalogue(service, bodies).routes(),
        *Secrets(service, bodies).routes(),
        *Sessions(service, bodies).routes(),
        *Files(service).routes(),
        *Records(service).routes(),
    ]

    @cache  # most daemons are never asked
    def described() -> bytes:
        return bytes(json_response(document(VERSION, routes, DOCUMENTED)).body)

    async def openapi(_: Request) -> Response:
        return Response(described(), media_type=JSON)

    served = [_route(method, path, handler) for method, path, handler, _ in routes]
    app = Starlette(
        routes=[*served, _route("GET", "/openapi.json", openapi)],
        exception_handlers={SandboxdError: _refused, HTTPException: _http, Exception: _internal},
    )
    app.router.redirect_slashes = False
    return Edge(app, service)


def _route(method: str, path: str, handler: Any) -> Route:
    route = Route(path, handler, methods=[method])
    # Starlette adds HEAD, which no other handler knows
    route.methods = None if method == ANY else {method}
    return route


async def _refused(_: Request, error: Exception) -> Response:
    if not isinstance(error, SandboxdError):
        raise error
    return problem.respond(error)


async def _http(request: Request, error: Exception) -> Response:
    """What routing refuses, and the statuses for which the errors have no class of their own."""
    if not isinstance(error, HTTPException):
        raise error
    kinds: dict[int, type[SandboxdError]] = {404: NotFound, 413: TooLarge}
    text = {
        404: f"there is nothing at {request.url.path[:200]!r}",
        405: f"{request.method[:20]} is not allowed here",
    }.get(error.status_code, error.detail)
    answer = problem.respond(kinds.get(error.status_code, InvalidRequest)(text), status=error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _internal(request: Request, error: Exception) -> Response:
    log.error("request failed", method=request.method, path=request.url.path[:200], exc_info=error)
    return problem.internal()


class Event(Protocol):
    """What ``asyncio.Event`` and ``anyio.Event`` have in common."""

    def set(self) -> object:
        """Set the event."""
        ...

    async def wait(self) -> Any:
        """Wait until it is set."""
        ...


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Event) -> None:
        super().__init__(config)
        self.ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the daemon."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.ready.set()


async def serve(app: Any, sock: socket.socket, config: Config, *, started: Event, stop: Event) -> None:
    """Serve on a listening Unix socket until ``stop`` is set; then requests have 5 s to end.

    ``started`` is set once connections are accepted. The socket is closed at the end.
    """
    server = _Server(ServerConfig(app, config.http, Identity(config.callers)), started)

    async def stopper() -> None:
        await stop.wait()
        server.should_exit = True

    task = asyncio.create_task(stopper())
    try:
        await server.serve(sockets=[sock])
    finally:
        task.cancel()
        sock.close()
