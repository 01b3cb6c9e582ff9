"""The routes of invocations: decode, call the service, encode."""

from __future__ import annotations

import re
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import anyio
import pydantic_core
from starlette.convertors import Convertor, register_url_convertor
from starlette.responses import Response

from sandboxd import models
from sandboxd.api import body, queries
from sandboxd.api.openapi import NDJSON, OCTETS, Doc
from sandboxd.api.protocol import CALLER
from sandboxd.api.ranges import cut
from sandboxd.api.representation import DOCUMENTED, HEADED, represented
from sandboxd.api.streams import StreamResponse, begun, until_gone, while_there
from sandboxd.errors import Draining, HostFailed, NotFound, Refused

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from starlette.requests import Request

    from sandboxd.api.identity import Caller
    from sandboxd.api.service import Service
    from sandboxd.room import Room

__all__ = ["JSON", "Invocations", "caller_of", "id_of", "json_response", "summary_of"]

JSON = "application/json"
SMALL = 4096  # bytes of a body that holds next to nothing
MAX_REPORTED = 128  # characters of a field in the record of a refusal
PARTIAL = {"range", "if-match", "if-none-match"}  # headers that ask for less than a whole, or for none
SHORT = 0.1  # seconds that the head of an answer waits for its body
_WAIT = re.compile(r"wait\s*=\s*\"?([0-9]{1,9}(?:\.[0-9]{1,6})?)\"?")
_ID = re.compile(r"[0-9A-Za-z_.-]{1,64}")


class ArtifactPath(Convertor[str]):
    """The rest of a path, newlines included: Starlette's ``path`` stops at one, or leaves it off the end."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        """The text itself."""
        return value

    def to_string(self, value: str) -> str:
        """The text itself."""
        return value


register_url_convertor("artifact", ArtifactPath())


def caller_of(request: Request) -> Caller:
    """Who sent the request."""
    caller: Caller = request.scope["state"][CALLER]
    return caller


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A model, or plain data that holds models, as JSON without the members that are null."""
    return Response(pydantic_core.to_json(value, exclude_none=True), status, headers, media_type=JSON)


def id_of(request: Request) -> str:
    found: str = request.path_params["id"]
    if not _ID.fullmatch(found):
        raise NotFound("there is no such invocation")
    return found


class Invocations:
    """The handlers, and the service that they call. ``bodies`` bounds what all of them hold."""

    def __init__(self, service: Service, bodies: Room) -> None:
        self.service = service
        self.bodies = bodies
        http = service.config.http
        self.bounds = body.Bounds(http.body, http.body_time)
        self.small = body.Bounds(SMALL, http.body_time)

    async def create(self, request: Request) -> Response:
        """Run a call: wait for its outcome, stream its events, or only accept it."""
        caller = caller_of(request)
        summary: dict[str, Any] = {}
        asynchronous, seconds = _preferred(request)
        try:
            body.query(request, queries.NoQuery)
            with self.bodies.held(caller.uid) as held:
                asked = await body.decode(request, models.Request, self.bounds, held)
                summary = summary_of(asked)
                tied = not asynchronous and seconds is None and asked.key is None
                found = await self.service.submit(caller, asked, tied=tied)
                del asked  # or this frame keeps its inputs for as long as the call runs
        except Refused as error:
            await self.service.refused(caller, error, summary)
            raise
        where = {"location": f"/v1/invocations/{found.id}"}
        if seconds is not None and NDJSON not in request.headers.get("accept", ""):
            with suppress(Draining):  # it waits for the next daemon, and is accepted all the same
                found = await self._within(request, caller, found.id, seconds)
            applied = f"respond-async, wait={seconds:g}" if asynchronous else f"wait={seconds:g}"
            status = 200 if found.state is models.State.ENDED else 202
            return json_response(found, status, where | {"preference-applied": applied})
        if asynchronous:
            return json_response(found, 202, where | {"preference-applied": "respond-async"})

        async def gone() -> None:
            if tied:
                with suppress(HostFailed):  # it has ended, and that cannot be recorded yet
                    await self.service.cancel(caller, found.id)

        if NDJSON in request.headers.get("accept", ""):
            return StreamResponse(await self._told(caller, found), NDJSON, headers=where, gone=gone)
        if found.state is not models.State.ENDED:
            async with until_gone(request.receive) as watched:
                with anyio.move_on_after(SHORT):
                    found = await self.service.wait(caller, found.id)
            if watched.cancelled_caught:
                await gone()
            elif found.state is not models.State.ENDED:
                # the head goes ahead, so that a caller whose connection breaks knows which call was its own
                return StreamResponse(self._outcome(caller, found.id), JSON, headers=where, gone=gone)
        return json_response(found, 200, where)

    async def _told(self, caller: Caller, found: models.Invocation) -> AsyncGenerator[bytes]:
        """The events of a call; of one that has ended, what keeps them from being read is raised."""
        lines = _lines(self.service.events(caller, found.id, after=0, follow=True))
        return await _begun(lines) if found.state is models.State.ENDED else lines

    async def _outcome(self, caller: Caller, id_: str) -> AsyncIterator[bytes]:
        yield pydantic_core.to_json(await self.service.wait(caller, id_), exclude_none=True)

    async def _within(self, request: Request, caller: Caller, id_: str, seconds: float) -> models.Invocation:
        """The invocation when it has ended, or as it stands after so many seconds."""
        async with until_gone(request.receive):
            with anyio.move_on_after(seconds):
                return await self.service.wait(caller, id_)
        return await self.service.get(caller, id_)

    async def list(self, request: Request) -> Response:
        """A page of invocations, newest first."""
        asked = body.query(request, queries.ListQuery)
        found = await self.service.list(
            caller_of(request),
            policy=asked.policy,
            cause=asked.cause,
            state=asked.state,
            key=asked.key,
            label=asked.labels(),
            before=asked.before,
            limit=asked.limit,
        )
        return json_response(found)

    async def get(self, request: Request) -> Response:
        """One invocation as it stands, or when it has ended."""
        asked, caller, found = body.query(request, queries.GetQuery), caller_of(request), id_of(request)
        shown = await self.service.get(caller, found)
        if asked.wait and shown.state is not models.State.ENDED:
            shown = await self._within(request, caller, found, asked.wait)
        return json_response(shown)

    async def events(self, request: Request) -> Response:
        """The events of a call, one JSON object on each line."""
        asked, caller, found = body.query(request, queries.EventsQuery), caller_of(request), id_of(request)
        await self.service.readable(caller, found)  # what is refused must be before the first byte is sent
        return StreamResponse(
            _lines(self.service.events(caller, found, after=asked.after, follow=asked.follow)), NDJSON
        )

    async def stdout(self, request: Request) -> Response:
        """The raw bytes of standard output."""
        return await self._stream(request, "stdout")

    async def stderr(self, request: Request) -> Response:
        """The raw bytes of standard error."""
        return await self._stream(request, "stderr")

    async def _stream(self, request: Request, name: Literal["stdout", "stderr"]) -> Response:
        asked, caller, found = body.query(request, queries.StreamQuery), caller_of(request), id_of(request)
        await self.service.readable(caller, found)
        if PARTIAL & set(request.headers) and not asked.follow and not asked.offset:
            return await self._part_of_stream(request, name)
        pieces = self.service.stream(caller, found, name, offset=asked.offset, follow=asked.follow)
        if not asked.follow:
            pieces = await while_there(request.receive, begun(pieces))
        return StreamResponse(pieces, OCTETS)

    async def _part_of_stream(self, request: Request, name: Literal["stdout", "stderr"]) -> Response:
        """A stream on conditions, or a range of it: all that is there now is the whole."""
        caller, id_ = caller_of(request), id_of(request)
        call = await self.service.get(caller, id_)
        content = call.stdout if name == "stdout" else call.stderr
        size = 0 if content is None else content.size
        digest = content.digest if content is not None and call.state is models.State.ENDED else None

        def pieces(start: int, length: int) -> AsyncIterator[bytes]:
            found = self.service.stream(caller, id_, name, offset=start, length=length, follow=False)
            return cut(found, length)

        return await while_there(request.receive, represented(request, size, digest, pieces, headers={}))

    async def stdin(self, request: Request) -> Response:
        """Write the body to standard input."""
        asked = body.query(request, queries.StdinQuery)
        offset = await self.service.write_stdin(
            caller_of(request),
            id_of(request),
            offset=asked.offset,
            chunks=body.chunks(request),
            eof=asked.eof,
        )
        return json_response({"offset": offset})

    async def signal(self, request: Request) -> Response:
        """Send a signal to the tool."""
        body.query(request, queries.NoQuery)
        asked = await body.decode(request, queries.SignalBody, self.small)
        await self.service.signal(caller_of(request), id_of(request), int(asked.signal))
        return Response(status_code=204)

    async def cancel(self, request: Request) -> Response:
        """End the call, whatever its state; a body is read and means nothing."""
        body.query(request, queries.NoQuery)
        await body.read(request, self.small)
        return json_response(await self.service.cancel(caller_of(request), id_of(request)))

    async def callback(self, request: Request) -> Response:
        """What became of the callback of a call."""
        body.query(request, queries.NoQuery)
        return json_response(await self.service.callback(caller_of(request), id_of(request)))

    async def artifacts(self, request: Request) -> Response:
        """The files that were released from the call, and those that were not."""
        body.query(request, queries.NoQuery)
        found = await self.service.get(caller_of(request), id_of(request))
        return json_response({"artifacts": found.artifacts, "withheld": found.withheld})

    async def artifact(self, request: Request) -> Response:
        """The bytes of a released file."""
        body.query(request, queries.NoQuery)
        found = await self.service.artifact(caller_of(request), id_of(request), request.path_params["path"])
        pieces = partial(self.service.blob, found.digest, found.size)
        return await while_there(request.receive, represented(request, found.size, found.digest, pieces))

    def routes(self) -> Sequence[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation of each route."""
        one = "/v1/invocations/{id}"
        listing = {
            "type": "object",
            "required": ["artifacts", "withheld"],
            "properties": {
                "artifacts": {"type": "array", "items": {"$ref": "#/components/schemas/Artifact"}},
                "withheld": {"type": "array", "items": {"$ref": "#/components/schemas/Withheld"}},
            },
        }
        offset = {"type": "object", "required": ["offset"], "properties": {"offset": {"type": "integer"}}}
        create = Doc(
            "Run a command, and wait for its outcome",
            body=models.Request,
            answer=models.Invocation,
            events=True,
            also={202: "Accepted, with `Prefer: respond-async`, or `wait=N` and it has not ended"},
            headers=(("Prefer", "`respond-async`: answer once accepted; `wait=N`: within N seconds"),),
        )
        return [
            ("POST", "/v1/invocations", self.create, create),
            ("GET", "/v1/invocations", self.list,
             Doc("List invocations", query=queries.ListQuery, answer=models.InvocationList)),
            ("GET", one, self.get, Doc("One invocation", query=queries.GetQuery, answer=models.Invocation)),
            ("GET", one + "/events", self.events,
             Doc("The events of a call", query=queries.EventsQuery, events=True)),
            ("GET", one + "/stdout", self.stdout,
             Doc("Raw standard output", query=queries.StreamQuery, **DOCUMENTED)),
            ("GET", one + "/stderr", self.stderr,
             Doc("Raw standard error", query=queries.StreamQuery, **DOCUMENTED)),
            ("POST", one + "/stdin", self.stdin,
             Doc("Write to standard input", query=queries.StdinQuery, raw_body=True, answer=offset)),
            ("POST", one + "/signal", self.signal,
             Doc("Send a signal", body=queries.SignalBody, status=204)),
            ("POST", one + "/cancel", self.cancel, Doc("End a call", answer=models.Invocation)),
            ("GET", one + "/callback", self.callback,
             Doc("What became of a call's callback", answer=models.CallbackState)),
            ("GET", one + "/artifacts", self.artifacts, Doc("The files of a call", answer=listing)),
            ("GET", one + "/artifacts/{path:artifact}", self.artifact, Doc("One file", **DOCUMENTED)),
            ("HEAD", one + "/artifacts/{path:artifact}", self.artifact,
             Doc("Size and digest of one file", **HEADED)),
        ]  # fmt: skip


def _preferred(request: Request) -> tuple[bool, float | None]:
    """What ``Prefer`` (RFC 7240) says: whether to answer at once, and within how many seconds."""
    wanted = ",".join(request.headers.getlist("prefer")).lower()
    parts = [part.strip() for part in re.split("[,;]", wanted)]
    waits = [found for part in parts if (found := _WAIT.fullmatch(part))]
    seconds = min(float(waits[0][1]), queries.LONGEST_WAIT) if waits else None
    return "respond-async" in parts, seconds


async def _lines(events: AsyncIterator[models.Event]) -> AsyncGenerator[bytes]:
    async for event in events:
        yield pydantic_core.to_json(event, exclude_none=True) + b"\n"


async def _begun(lines: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The same, the first of them made already. Raises what keeps it from that."""
    first = await anext(lines, b"")

    async def all_of_them() -> AsyncGenerator[bytes]:
        async with aclosing(lines):
            yield first
            async for line in lines:
                yield line

    return all_of_them()


def summary_of(asked: models.Request) -> dict[str, Any]:
    """What the record of a refusal says of the request: names, never content."""
    first = asked.argv[0]
    return {
        "policy": asked.policy,
        "argv0": (first if isinstance(first, str) else first.decode().decode(errors="replace"))[
            :MAX_REPORTED
        ],
        "argc": len(asked.argv),
        "key": asked.key,
        "session": asked.session,
        "labels": {key: value[:MAX_REPORTED] for key, value in asked.labels.items()},
    }
