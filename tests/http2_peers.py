"""Programs and servers that speak HTTP/2, made with h2, and a container's connection between two of them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from sandboxd.egress.budget import Budget
from sandboxd.egress.http2 import Http2
from sandboxd.egress.site import Exchange, Site
from sandboxd.egress.streams import Counted, Plain
from sandboxd.httprule import HttpRequest, HttpRule
from sandboxd.reach import Allow, Decision, NetworkRules, Reach

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable

    from anyio.abc import TaskGroup

    from sandboxd.egress.streams import Stream

Headers = list[tuple[bytes, bytes]]
Serve = Callable[["Peer", int], Coroutine[Any, Any, None]]
RULES = HttpRule(methods=("GET", "POST", "HEAD", "OPTIONS"), paths=("/ok", "/ok/**"))


def asked(path: str = "/ok", method: str = "GET", **more: str) -> Headers:
    """The head of a request; further headers by name, ``_`` for ``-``."""
    head = [(":method", method), (":scheme", "http"), (":authority", "api.test"), (":path", path)]
    head += [(name.replace("_", "-"), value) for name, value in more.items()]
    return [(name.encode(), value.encode()) for name, value in head]


@dataclass
class Seen:
    """What came on a stream."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    listed: Headers = field(default_factory=list)
    informational: list[bytes] = field(default_factory=list)
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    size: int = 0
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        return int(self.headers.get(b":status", b"0"))

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


class Peer:
    """One real end; ``serve`` takes each request, where it is a server."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        client_side: bool,
        serve: Serve | None = None,
        settings: dict[SettingCodes, int] | None = None,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.http = H2Connection(
            H2Configuration(
                client_side=client_side,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.http.local_settings = Settings(client=client_side, initial_values=settings)
        self.http.initiate_connection()
        self.streams: dict[int, Seen] = {}
        self.goaway: int | None = None
        self.closed = False
        self.error: ProtocolError | None = None
        """What the other end did wrong."""
        self.reads = True
        self.acknowledges = True
        self.keeps = True
        self._serve = serve
        self._changed = anyio.Event()
        self._lock = anyio.Lock()

    async def run(self, tasks: TaskGroup) -> None:
        """Hear the other end."""
        await self.flush()
        with suppress(OSError, anyio.ClosedResourceError):
            while True:
                if not self.reads:
                    await anyio.sleep(0.01)
                    continue
                await anyio.wait_readable(self.sock)
                try:
                    data = self.sock.recv(1 << 16)
                except BlockingIOError:
                    continue
                if not data:
                    break
                try:
                    events = self.http.receive_data(data)
                except ProtocolError as error:
                    self.error = error
                    break
                for event in events:
                    self._on(event, tasks)
                self._changed.set()
                self._changed = anyio.Event()
                await self.flush()
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.closed = True
        self._changed.set()
        self._changed = anyio.Event()

    def _on(self, event: Event, tasks: TaskGroup) -> None:
        if isinstance(event, ConnectionTerminated):
            self.goaway = int(event.error_code or 0)
        number = getattr(event, "stream_id", None)
        if not number:
            return
        seen = self.streams.setdefault(number, Seen())
        if isinstance(event, RequestReceived | ResponseReceived):
            seen.listed = list(event.headers or ())
            seen.headers = dict(seen.listed)
            if isinstance(event, RequestReceived) and self._serve is not None:
                tasks.start_soon(self._serve, self, number)
        else:
            self._on_more(seen, number, event)

    def _on_more(self, seen: Seen, number: int, event: Event) -> None:
        match event:
            case InformationalResponseReceived():
                seen.informational.append(dict(event.headers or ())[b":status"])
            case TrailersReceived():
                seen.trailers = dict(event.headers or ())
            case DataReceived():
                seen.size += len(event.data)
                if self.keeps:
                    seen.data += event.data
                if self.acknowledges:
                    self.http.acknowledge_received_data(event.flow_controlled_length, number)
            case StreamEnded():
                seen.ended = True
            case StreamReset():
                seen.reset = int(event.error_code)

    async def flush(self) -> None:
        async with self._lock:
            await self._write(self.http.data_to_send())

    async def raw(self, data: bytes) -> None:
        """Bytes of no protocol's."""
        async with self._lock:
            await self._write(self.http.data_to_send() + data)

    async def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self.sock.send(left) :]
            except BlockingIOError:
                await anyio.wait_writable(self.sock)

    async def until(self, met: Callable[[], bool]) -> None:
        """Wait for something to come; raises ConnectionError where the connection ends first."""
        while not met():
            if self.closed:
                raise ConnectionError(f"closed; goaway {self.goaway}; {self.error!r}")
            await self._changed.wait()

    async def ask(self, headers: Headers, body: bytes | None = b"") -> int:
        """Begin a request; ``body`` None: it goes on."""
        number = self.http.get_next_available_stream_id()
        self.streams[number] = Seen()
        self.http.send_headers(number, headers, end_stream=body == b"")
        await self.flush()
        if body:
            await self.send(number, body, last=True)
        return number

    async def get(self, headers: Headers, body: bytes | None = b"") -> Seen:
        """A request and its whole answer."""
        number = await self.ask(headers, body)
        return await self.answer(number)

    async def answer(self, number: int) -> Seen:
        await self.until(lambda: self.streams[number].over)
        return self.streams[number]

    async def send(self, number: int, data: bytes, *, last: bool = False) -> None:
        left = memoryview(data)
        while left:
            room = min(self.http.local_flow_control_window(number), self.http.max_outbound_frame_size)
            if room <= 0:
                await self.until(lambda: self.http.local_flow_control_window(number) > 0)
                continue
            piece, left = left[:room], left[room:]
            self.http.send_data(number, bytes(piece), end_stream=last and not left)
            await self.flush()
        if last and not data:
            self.http.end_stream(number)
            await self.flush()

    async def reply(self, number: int, headers: Iterable[tuple[str, str]], body: bytes = b"") -> None:
        listed = [(name.encode(), value.encode()) for name, value in headers]
        self.http.send_headers(number, listed, end_stream=not body)
        await self.flush()
        if body:
            await self.send(number, body, last=True)


async def echo(server: Peer, number: int) -> None:
    """A server that says what it was told, when that has ended."""
    await server.until(lambda: server.streams[number].over)
    seen = server.streams[number]
    if seen.ended:
        await server.reply(
            number, [(":status", "200"), ("x-path", seen.headers[b":path"].decode())], bytes(seen.data)
        )


@dataclass
class Told:
    """What was told of an exchange, as it was then."""

    method: str
    path: str
    verdict: str
    why: str
    status: int
    sent: int
    received: int


async def never_asked(exchange: Exchange, decision: Decision) -> Decision:
    raise AssertionError(exchange, decision)


class Between:
    """A container's connection, on its way to servers that are made as they are connected to."""

    def __init__(
        self,
        tasks: TaskGroup,
        sockets: list[socket.socket],
        serve: Serve = echo,
        *,
        limits: dict[str, int] | None = None,
        inject: Callable[[Decision, HttpRequest, str | None], tuple[Headers, tuple[str, ...]]] | None = None,
        connect: Callable[[], Awaitable[Stream]] | None = None,
        settings: dict[SettingCodes, int] | None = None,
        program_settings: dict[SettingCodes, int] | None = None,
        rules: HttpRule = RULES,
        ask: Callable[[Exchange, Decision], Awaitable[Decision]] | None = None,
    ) -> None:
        self.tasks = tasks
        self.told: list[Told] = []
        self.servers: list[Peer] = []
        self.sockets = sockets
        self.raised: BaseException | None = None
        self.done = anyio.Event()
        self.scope = anyio.CancelScope()
        self._serve = serve
        self._settings = settings
        budget = Budget(limits or {})
        rule = Allow("api.test", (80,), "policy.yaml:1", rules, ask=ask is not None)
        site = Site(
            "api.test",
            80,
            "http",
            reach=Reach(NetworkRules((rule,), ())),
            budget=budget,
            ask=ask or never_asked,
            inject=inject or (lambda decision, request, digest: (list(request.headers), ())),
            tell=self._tell,
        )
        ours, theirs = self._pair()
        self.program = Peer(theirs, client_side=True, settings=program_settings)
        self.http = Http2(Counted(ours, b"", budget), site, connect or self.connect)

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        both = socket.socketpair()
        self.sockets += both
        for each in both:
            each.setblocking(False)
        return both

    def _tell(self, exchange: Exchange, verdict: str, why: str) -> None:
        self.told.append(
            Told(
                exchange.method, exchange.path, verdict, why,
                exchange.status, exchange.sent, exchange.received,
            )
        )  # fmt: skip

    async def connect(self) -> Stream:
        ours, theirs = self._pair()
        server = Peer(theirs, client_side=False, serve=self._serve, settings=self._settings)
        self.servers.append(server)
        self.tasks.start_soon(server.run, self.tasks)
        return Plain(ours)

    @property
    def server(self) -> Peer:
        return self.servers[-1]

    async def run(self) -> None:
        with self.scope:
            try:
                await self.http.run()
            except Exception as error:  # noqa: BLE001  (for the test to look at)
                self.raised = error
            finally:
                with suppress(OSError):  # as whoever made it does
                    self.sockets[0].shutdown(socket.SHUT_RDWR)
                self.done.set()


@asynccontextmanager
async def between(serve: Serve = echo, *, listens: bool = True, **options: object) -> AsyncIterator[Between]:
    """A container's connection with a program at its end; everything ends with the block."""
    sockets: list[socket.socket] = []
    try:
        with anyio.fail_after(90):
            async with anyio.create_task_group() as tasks:
                found = Between(tasks, sockets, serve, **options)  # type: ignore[arg-type]
                tasks.start_soon(found.run)
                if listens:
                    tasks.start_soon(found.program.run, tasks)
                yield found
                tasks.cancel_scope.cancel()
    finally:
        for each in sockets:
            each.close()
