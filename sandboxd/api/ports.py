"""The ports of containers: decide who may reach a server inside by the head of a request, and pass it on.

The connection of the request goes to a process without privileges, which reads what the server says and ends
the connection with the answer. Not a byte of either passes through here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import structlog
from starlette.responses import Response

from sandboxd.api.invocations import caller_of, json_response
from sandboxd.api.openapi import ANY, Doc
from sandboxd.api.protocol import DETACH
from sandboxd.errors import HostFailed, InvalidRequest, NotFound

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from sandboxd.api.identity import Caller
    from sandboxd.network.entrance import Entrance, Passage

__all__ = ["TUNNEL", "Ports"]

TUNNEL = "tcp"
"""The protocol that a tunnel is asked for as, in ``Upgrade``."""
PORT = re.compile(r"[1-9][0-9]{0,4}")
PARAMETER = re.compile(r"\{[a-z]+\}")
HIGHEST = 65535

log = structlog.get_logger(__name__)


class Ports:
    """The handlers. ``base`` is the path of what has a container, whose name in it ``named`` reads.

    ``find`` gives the way into it.
    """

    def __init__(
        self, base: str, named: Callable[[Request], str], find: Callable[[Caller, str], Awaitable[Entrance]]
    ) -> None:
        self.base = base
        self.named = named
        self.find = find

    async def list(self, request: Request) -> Response:
        """The ports that can be reached."""
        found = await self.find(caller_of(request), self.named(request))
        return json_response({"ports": found.ports})

    async def tunnel(self, request: Request) -> Response:
        """A connection to a server: after status 101 bytes both ways, each side ending its own."""
        asked = [each.strip().lower() for each in request.headers.getlist("upgrade")]
        connection = ",".join(request.headers.getlist("connection")).lower()
        upgrade = "upgrade" in {each.strip() for each in connection.split(",")}
        if not upgrade or asked != [TUNNEL]:
            raise InvalidRequest(
                "a tunnel is asked for by GET with `Connection: Upgrade` and `Upgrade: tcp`; the path of an "
                "HTTP request goes on after the port, at least with a `/`",
                field="upgrade",
            )
        return PassedOn(await self._connect(request), "")

    async def http(self, request: Request) -> Response:
        """One request for a server, as it is from the path after the port on; also one to upgrade."""
        prefix = self._prefix(request)
        if not request.scope["raw_path"].startswith(f"{prefix}/".encode()):
            raise NotFound("id and port of such a path are written without percent signs")
        if request.method == "CONNECT":
            raise InvalidRequest(
                "CONNECT is for proxies; a tunnel is asked for by `Upgrade: tcp`", field="method"
            )
        return PassedOn(await self._connect(request), prefix)

    def _prefix(self, request: Request) -> str:
        own = PARAMETER.sub(lambda _: self.named(request), self.base)
        return f"{own}/ports/{request.path_params['port']}"

    async def _connect(self, request: Request) -> Passage:
        asked = request.path_params["port"]
        entrance = await self.find(caller_of(request), self.named(request))
        if not PORT.fullmatch(asked) or int(asked) > HIGHEST:
            raise InvalidRequest(f"{asked[:20]!r} is not the number of a port", field="port")
        return await entrance.connect(int(asked))

    def routes(self) -> Sequence[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation of each route."""
        ports = {"type": "object", "required": ["ports"],
                 "properties": {"ports": {"type": "array", "items": {"type": "integer"}}}}  # fmt: skip
        tunnel = Doc(
            "A connection to a port inside",
            status=101,
            headers=(("Upgrade", "`tcp`"), ("Connection", "`Upgrade`")),
        )
        one = self.base + "/ports/{port}"
        return [
            ("GET", self.base + "/ports", self.list, Doc("The ports that can be reached", answer=ports)),
            ("GET", one, self.tunnel, tunnel),
            (ANY, one + "/{path:artifact}", self.http,
             Doc("A request to a server inside", raw_body=True, raw_answer=True)),
        ]  # fmt: skip


class PassedOn(Response):
    """In place of a response: the connection goes to whoever serves it from now on."""

    def __init__(self, passage: Passage, prefix: str) -> None:
        super().__init__()
        self.passage = passage
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand it over."""
        del receive, send
        with self.passage:
            try:
                caller, rest = await scope["state"][DETACH]()
            except ConnectionError as error:
                log.info("a connection was not passed on", reason=str(error))
                return
            with caller:
                first = _head(scope) + rest if self.prefix else rest
                try:
                    await self.passage.serve(caller, first, self.prefix)
                except HostFailed as error:
                    log.warning("a connection was not passed on", reason=str(error))


def _head(scope: Scope) -> bytes:
    """The head of a request, as h11 understood it."""
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    first = b"%b %b HTTP/%b" % (scope["method"].encode(), target, scope["http_version"].encode())
    return b"\r\n".join([first, *(name + b": " + value for name, value in scope["headers"]), b"", b""])
