"""The routes of the files of sessions: decode, call the service, encode."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import anyio.to_thread
from pydantic import Field
from starlette.responses import Response

from sandboxd import models
from sandboxd.api import body
from sandboxd.api.conditions import HEADERS, condition_of, etag_of
from sandboxd.api.invocations import caller_of, json_response
from sandboxd.api.openapi import Doc
from sandboxd.api.queries import Flag, Parameters
from sandboxd.api.representation import DOCUMENTED, HEADED, represented
from sandboxd.api.sessions import session_of
from sandboxd.api.streams import StreamResponse, until_gone, while_there
from sandboxd.errors import InvalidRequest, RequestTimeout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
    from contextlib import AbstractAsyncContextManager

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from sandboxd.api.service import Service
    from sandboxd.workspace.layertar import Export

__all__ = ["Files"]

T = TypeVar("T")

LAYER = "application/vnd.oci.image.layer.v1.tar"

Named = Annotated[str, Field(min_length=1, max_length=128)]
Limit = Annotated[int, Field(ge=1, le=10_000)]


class DiffQuery(Parameters):
    """Between which checkpoints; without them, from the session's first to where it stands."""

    since: Named = "origin"
    to: Named | None = None
    text: Flag = False
    limit: Limit = 1000


class FilesQuery(Parameters):
    """Of which directory, at which checkpoint."""

    path: Annotated[str, Field(max_length=16_384)] = ""
    checkpoint: Named | None = None
    recursive: Flag = False
    digest: Flag = False
    after: Annotated[str, Field(max_length=16_384)] | None = None
    limit: Limit = 1000


class FileQuery(Parameters):
    """At which checkpoint."""

    checkpoint: Named | None = None


class PutQuery(Parameters):
    """What is made: a file of the body, with permission bits in octal, or a directory."""

    mode: Annotated[str, Field(pattern="^[0-7]{3,4}$")] | None = None
    directory: Flag = False


class RemoveQuery(Parameters):
    """Whether a directory goes with all that it has."""

    recursive: Flag = False


class ExportQuery(Parameters):
    """Of what a layer is made: of all that a checkpoint has, or of what differs since another."""

    since: Named | None = None
    to: Named | None = None
    times: Flag = False


class ImportQuery(Parameters):
    """With ``own`` all that comes in is the session's owner's, whatever the archive says."""

    own: Flag = False


class Files:
    """The handlers, and the service that they call."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def diff(self, request: Request) -> Response:
        """What differs between two checkpoints, with text diffs if asked."""
        asked = body.query(request, DiffQuery)
        work = self.service.files.diff(
            caller_of(request),
            session_of(request),
            since=asked.since,
            to=asked.to,
            text=asked.text,
            limit=asked.limit,
        )
        return await _wanted(request, work)

    async def list(self, request: Request) -> Response:
        """The files in a directory of a session, or all beneath it."""
        asked = body.query(request, FilesQuery)
        work = self.service.files.list(
            caller_of(request),
            session_of(request),
            asked.path,
            checkpoint=asked.checkpoint,
            recursive=asked.recursive,
            digest=asked.digest,
            after=asked.after,
            limit=asked.limit,
        )
        return await _wanted(request, work)

    async def get(self, request: Request) -> Response:
        """The bytes of a file, or a range of them; its digest is the ETag."""
        asked = body.query(request, FileQuery)
        work = self.service.files.read(
            caller_of(request), session_of(request), request.path_params["path"], checkpoint=asked.checkpoint
        )

        async def answer(
            found: tuple[models.FileInfo, Callable[[int, int], AsyncIterator[bytes]]],
        ) -> Response:
            info, pieces = found
            return await represented(request, info.size, info.digest, pieces)

        return await _held(request, work, answer)

    async def put(self, request: Request) -> Response:
        """Write a file of the body, on a condition if one is given, or make a directory."""
        asked, condition = body.query(request, PutQuery), condition_of(request)
        caller, named, path = caller_of(request), session_of(request), request.path_params["path"]
        if asked.directory:
            made = await self.service.files.make_directory(caller, named, path, condition=condition)
            return json_response(made, 201)
        made = await self.service.files.write(
            caller,
            named,
            path,
            body.chunks(request),
            condition=condition,
            mode=None if asked.mode is None else int(asked.mode, 8),
        )
        return json_response(made, 201 if made.created else 200, {"etag": etag_of(made.digest or "")})

    async def remove(self, request: Request) -> Response:
        """Remove a file or a directory, on a condition if one is given."""
        asked = body.query(request, RemoveQuery)
        work = self.service.files.remove(
            caller_of(request),
            session_of(request),
            request.path_params["path"],
            condition=condition_of(request),
            recursive=asked.recursive,
        )
        return await _wanted(request, work)

    async def export(self, request: Request) -> Response:
        """A layer of the OCI image format."""
        asked = body.query(request, ExportQuery)
        work = self.service.files.export(
            caller_of(request), session_of(request), since=asked.since, to=asked.to, times=asked.times
        )

        async def answer(found: tuple[Export, AsyncIterator[bytes]]) -> Response:
            made, chunks = found
            return StreamResponse(chunks, LAYER, headers={"sandboxd-omitted": str(made.unfit)})

        return await _held(request, work, answer)

    async def bring(self, request: Request) -> Response:
        """Put a layer of the OCI image format over what the session has."""
        asked = body.query(request, ImportQuery)
        condition = condition_of(request)
        if condition.unlike is not None:
            raise InvalidRequest(
                "If-None-Match says nothing of an import, which is put over what is there; If-Match has the "
                "digest of the checkpoint that the session must stand on",
                field="If-None-Match",
            )
        made = await self.service.files.bring(
            caller_of(request),
            session_of(request),
            body.chunks(request),
            # it always stands on one
            match=condition.match if isinstance(condition.match, frozenset) else None,
            own=asked.own,
        )
        return json_response(made, 201)

    def routes(self) -> Sequence[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation of each route."""
        one = "/v1/sessions/{session}"
        file = one + "/files/{path:artifact}"
        return [
            ("GET", one + "/diff", self.diff,
             Doc("What differs between checkpoints", query=DiffQuery, answer=models.SessionDiff)),
            ("GET", one + "/files", self.list,
             Doc("The files of a session", query=FilesQuery, answer=models.FileList)),
            ("GET", file, self.get, Doc("One file", query=FileQuery, **DOCUMENTED)),
            ("HEAD", file, self.get, Doc("Size and digest of one file", query=FileQuery, **HEADED)),
            ("PUT", file, self.put,
             Doc("Write a file", query=PutQuery, raw_body=True, answer=models.FileWritten,
                 also={201: "it was not there before"}, headers=HEADERS)),
            ("DELETE", file, self.remove,
             Doc("Remove a file", query=RemoveQuery, answer=models.FileWritten, headers=HEADERS)),
            ("GET", one + "/export", self.export,
             Doc("A layer of a session's files", query=ExportQuery, raw_answer=True)),
            ("POST", one + "/import", self.bring,
             Doc("Put a layer over a session's files", query=ImportQuery, raw_body=True,
                 answer=models.CheckpointInfo, status=201,
                 headers=(("If-Match", "ETags: the digest of a checkpoint that it must stand on"),))),
        ]  # fmt: skip


class _HeldResponse(Response):
    """An answer that lets go of what it reads when it has ended."""

    def __init__(self, answer: Response, held: AsyncExitStack) -> None:
        self.answer = answer
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with self.held:
            await self.answer(scope, receive, send)


async def _held(
    request: Request,
    work: AbstractAsyncContextManager[T],
    answer: Callable[[T], Awaitable[Response]],
) -> Response:
    """The answer that is made of what is held until it has been sent; all ends when the peer goes away."""
    async with AsyncExitStack() as stack, until_gone(request.receive):
        made = await answer(await stack.enter_async_context(work))
        return _HeldResponse(made, stack.pop_all())
    raise RequestTimeout("the peer has gone")


async def _wanted(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """What it returns, as JSON; it is cancelled when the peer goes away."""
    return await anyio.to_thread.run_sync(json_response, await while_there(request.receive, work))
