"""A small HTTP/1.1 server on a Unix socket that says what a test tells it to, right or wrong."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

import pytest

if TYPE_CHECKING:
    from pathlib import Path

ID = "01930000-0000-7000-8000-0123456789ab"
HEX = "sha256:" + "0" * 64


def invocation(cause: str | None = "exited", **changes: Any) -> dict[str, Any]:
    """An invocation as the API gives it."""
    document: dict[str, Any] = {
        "id": ID,
        "state": "ended" if cause else "running",
        "caller": {"uid": 0, "gid": 0, "role": "operator"},
        "policy": {"name": "default", "digest": HEX},
        "image": {"name": "base", "digest": HEX},
        "plan": HEX,
        "argv": ["true"],
        "times": {"accepted": 1},
        "attempts": 1,
    }
    outcome: dict[str, Any] = {"message": "it ended"}
    outcome |= {"exit_code": 0} if cause == "exited" else {}
    outcome |= changes.pop("outcome", {})
    if cause:
        document["outcome"] = outcome | {"cause": cause}
    return document | changes


def event(seq: int, type: str, **fields: Any) -> bytes:  # noqa: A002 - the field's name
    """One line of an event stream."""
    return json.dumps({"seq": seq, "at": 1, "type": type, **fields}).encode() + b"\n"


def output(seq: int, data: dict[str, str], stream: str = "stdout") -> bytes:
    """One output event."""
    return event(seq, "output", stream=stream, offset=0, data=data)


@dataclass
class Seen:
    """One request that arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Exchange(BaseHTTPRequestHandler):
    """One request; a route answers it with the methods below."""

    protocol_version = "HTTP/1.1"
    server: Server
    seen: Seen

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""

    def address_string(self) -> str:
        return "unix"

    def body(self) -> Iterable[bytes]:
        """The body as it arrives."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        elif length := int(self.headers.get("Content-Length", 0)):
            yield self.rfile.read(length)

    def json(self, document: Any, status: int = 200, kind: str = "application/json") -> None:
        self.send(json.dumps(document).encode(), status, kind)

    def problem(self, status: int, code: str, detail: str, **details: Any) -> None:
        document = {"type": "about:blank", "title": "T", "status": status, "code": code, "detail": detail}
        self.json(document | ({"details": details} if details else {}), status, "application/problem+json")

    def send(self, data: bytes, status: int = 200, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def chunked(self, chunks: Iterable[bytes], *, finish: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        if finish:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        route = self.server.routes.get((self.command, parts.path))
        streamed = route is not None and getattr(route, "streams", False)
        data = b"" if streamed else b"".join(self.body())
        self.seen = Seen(self.command, parts.path, query, dict(self.headers.items()), data)
        self.server.requests.append(self.seen)
        try:
            if route is None:
                self.problem(404, "not_found", f"no route {self.command} {parts.path}")
            else:
                route(self)
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()
            self.close_connection = True

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - http.server's names


Route = Callable[[Exchange], None]


class Server(socketserver.ThreadingUnixStreamServer):
    """The listening half."""

    daemon_threads = True
    request_queue_size = 16
    routes: dict[tuple[str, str], Route]
    requests: list[Seen]
    hung_up: threading.Event

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is what many tests are about."""


class ApiServer:
    """A server at ``socket`` with routes by method and path; a context manager."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._server = Server(str(socket), Exchange)
        self.routes: dict[tuple[str, str], Route] = {}
        self.requests: list[Seen] = []
        self.hung_up = threading.Event()
        self._server.routes, self._server.requests = self.routes, self.requests
        self._server.hung_up = self.hung_up
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def on(self, method: str, path: str, route: Route) -> None:
        self.routes[method, "/v1/" + path] = route

    def json(self, method: str, path: str, document: Any, status: int = 200) -> None:
        self.on(method, path, lambda exchange: exchange.json(document, status))

    def events(
        self, *lines: bytes, method: str = "POST", path: str = "invocations", finish: bool = True
    ) -> None:
        self.on(method, path, lambda exchange: exchange.chunked(lines, finish=finish))

    def raw(self, method: str, path: str, data: bytes) -> None:
        """Answer with these bytes, whatever they are, and hang up."""

        def route(exchange: Exchange) -> None:
            exchange.wfile.write(data)
            exchange.close_connection = True

        self.on(method, path, route)

    def sent(self, method: str, path: str) -> list[Seen]:
        return [seen for seen in self.requests if (seen.method, seen.path) == (method, "/v1/" + path)]

    def wait_for(self, method: str, path: str, timeout: float = 10) -> Seen:
        limit = time.monotonic() + timeout
        while not (found := self.sent(method, path)):
            assert time.monotonic() < limit, f"{method} {path} did not arrive"
            time.sleep(0.01)
        return found[0]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    """An ``ApiServer`` with no routes yet."""
    with ApiServer(tmp_path / "s") as server:
        yield server
