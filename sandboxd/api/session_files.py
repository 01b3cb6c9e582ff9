"""The routes of the files of sessions: decode, call the service, encode."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from sandboxd import models
from sandboxd.api import body, queries
from sandboxd.api.invocations import caller_of, json_response
from sandboxd.api.openapi import OCTETS, Doc
from sandboxd.api.sessions import named
from sandboxd.api.streams import StreamResponse
from sandboxd.errors import InvalidRequest
from sandboxd.workspace.edit import Condition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from sandboxd.api.service import Service
    from sandboxd.room import Room

__all__ = ["SessionFiles"]

TAR = "application/x-tar"
CONDITIONS = (
    ("If-Match", 'the digest that the file must have, in quotes: `"sha256:…"`'),
    ("If-None-Match", "`*`: nothing may be there"),
)
_ETAG = re.compile(r'"(sha256:[0-9a-f]{64})"')


class SessionFiles:
    """The handlers, and the service that they call. ``bodies`` bounds what all of them hold."""

    def __init__(self, service: Service, bodies: Room) -> None:
        self.service = service
        self.bodies = bodies
        http = service.config.http
        self.bounds = body.Bounds(http.body, http.body_time)

    async def list(self, request: Request) -> Response:
        """What a directory of the session has, one page of it."""
        asked = body.query(request, queries.FilesQuery)
        found = await self.service.session_files.list(
            caller_of(request),
            named(request),
            asked.path,
            checkpoint=asked.checkpoint,
            after=asked.after,
            limit=asked.limit,
        )
        return json_response(found)

    async def read(self, request: Request) -> Response:
        """The bytes of a file; its digest is the ``ETag``."""
        asked = body.query(request, queries.CheckpointQuery)
        stack = AsyncExitStack()
        size, digest, pieces = await stack.enter_async_context(
            self.service.session_files.opened(
                caller_of(request), named(request), _path(request), checkpoint=asked.checkpoint
            )
        )
        headers = {
            "content-length": str(size),
            "content-disposition": "attachment",  # a tool made it: no browser shall render it
            "etag": f'"{digest}"',
        }
        return StreamResponse(_until_sent(pieces, stack), OCTETS, headers=headers, gone=stack.aclose)

    async def write(self, request: Request) -> Response:
        """Write a file, whose content is the body; directories on the way are made."""
        asked = body.query(request, queries.WriteQuery)
        caller, condition = caller_of(request), _condition(request)
        with self.bodies.held(caller.uid) as held:
            data = await body.read(request, self.bounds, held)
            written, created = await self.service.session_files.write(
                caller, named(request), _path(request), data, mode=asked.number(), condition=condition
            )
        return json_response(written, 201 if created else 200, {"etag": f'"{written.digest}"'})

    async def remove(self, request: Request) -> Response:
        """Remove a file, or a directory: one that is not empty with ``recursive=1``."""
        asked = body.query(request, queries.RemoveQuery)
        removed = await self.service.session_files.remove(
            caller_of(request),
            named(request),
            _path(request),
            recursive=asked.recursive,
            condition=_condition(request),
        )
        return json_response(removed)

    async def diff(self, request: Request) -> Response:
        """What differs between two checkpoints; else between the first and where the session stands."""
        asked = body.query(request, queries.DiffQuery)
        found = await self.service.session_files.diff(
            caller_of(request),
            named(request),
            old=asked.old,
            new=asked.new,
            text=asked.text,
            limit=asked.limit,
        )
        return json_response(found)

    async def export(self, request: Request) -> Response:
        """A tar of the files, or of what changed since a checkpoint, in the format of a layer of an image."""
        asked = body.query(request, queries.ExportQuery)
        stack = AsyncExitStack()
        pieces = await stack.enter_async_context(
            self.service.session_files.exported(
                caller_of(request), named(request), checkpoint=asked.checkpoint, since=asked.since
            )
        )
        headers = {"content-disposition": "attachment"}
        return StreamResponse(_until_sent(pieces, stack), TAR, headers=headers, gone=stack.aclose)

    async def take_in(self, request: Request) -> Response:
        """Unpack a tar over the files: what it has is put there, what its whiteouts name is removed."""
        body.query(request, queries.NoQuery)
        caller = caller_of(request)
        with self.bodies.held(caller.uid) as held:
            data = await body.read(request, self.bounds, held)
            found = await self.service.session_files.take_in(caller, named(request), data)
        return json_response(found)

    def routes(self) -> Sequence[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation of each route."""
        one = "/v1/sessions/{session}"
        file = one + "/files/{path:artifact}"
        return [
            ("GET", one + "/files", self.list,
             Doc("What a directory has", query=queries.FilesQuery, answer=models.FileList)),
            ("GET", file, self.read, Doc("One file", query=queries.CheckpointQuery, raw_answer=True)),
            ("PUT", file, self.write,
             Doc("Write a file", query=queries.WriteQuery, raw_body=True, answer=models.FileWritten,
                 also={201: "The file is new"}, headers=CONDITIONS)),
            ("DELETE", file, self.remove,
             Doc("Remove a file", query=queries.RemoveQuery, answer=models.FileWritten, headers=CONDITIONS)),
            ("GET", one + "/diff", self.diff,
             Doc("What differs", query=queries.DiffQuery, answer=models.SessionDiff)),
            ("GET", one + "/export", self.export,
             Doc("The files as a tar", query=queries.ExportQuery, raw_answer=True)),
            ("POST", one + "/import", self.take_in,
             Doc("Unpack a tar over the files", raw_body=True, answer=models.LayerImported)),
        ]  # fmt: skip


def _path(request: Request) -> str:
    path: str = request.path_params["path"]
    return path


def _condition(request: Request) -> Condition:
    match, absent = request.headers.get("if-match"), request.headers.get("if-none-match")
    if absent not in {None, "*"}:
        raise InvalidRequest("If-None-Match is * or not given", field="If-None-Match")
    if match is None:
        return Condition(absent=absent is not None)
    found = _ETAG.fullmatch(match.strip())
    if found is None or absent is not None:
        raise InvalidRequest('If-Match is one digest in quotes, such as "sha256:…", alone', field="If-Match")
    return Condition(match=found[1])


async def _until_sent(pieces: AsyncIterator[bytes], stack: AsyncExitStack) -> AsyncIterator[bytes]:
    async with stack:
        async for piece in pieces:
            yield piece
