"""HTTP/1.1 between a container and a server: each message is read whole and written anew.

What goes on is what h11 understood, framed by h11 again, so that both sides see the same messages; what it
does not understand ends the connection. One request is on its way at a time.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import h11

from sandboxd.egress.relay import Cut
from sandboxd.egress.site import (
    MAX_SIGNED,
    TOO_LONG_TO_SIGN,
    Refused,
    exchange_of,
    head_of,
    needs_digest,
    not_reached,
    without_hops,
)
from sandboxd.egress.streams import Broken, Left, first_of, while_there
from sandboxd.egress.upstream import Unreachable
from sandboxd.excerpt import excerpt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from sandboxd.egress.site import Exchange, Site
    from sandboxd.egress.streams import Stream
    from sandboxd.httprule import HttpRequest

__all__ = ["Http1"]

MAX_HEAD = 64 * 1024
EVENTS = 64  # of h11, between which nobody else has a turn
DRAINED = 256 * 1024  # bytes of the body of a refused request that are read for the sake of the next one
FINISH_SECONDS = 2.0


class _Server:
    """The connection to the server, while it is there."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)


class Http1:
    """Serves one connection of a container. ``connect`` makes one to the server; ``first`` is one already."""

    def __init__(
        self,
        client: Stream,
        site: Site,
        connect: Callable[[], Awaitable[Stream]],
        first: Stream | None = None,
    ) -> None:
        self._client = client
        self._site = site
        self._connect = connect
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._server = None if first is None else _Server(first)
        self._unsent = bytearray()
        self._events = 0
        self._read, self._whole = bytearray(), False
        """Of the request's body, what was read before it was sent, and whether that is all of it."""
        self._body_less = self._chunked = False
        """Of the request that is served: whether its answer has no body; how its own is framed."""

    async def run(self) -> None:
        """Until either side ends. Raises OSError, Cut."""
        while True:
            try:
                event = await self._next()
            except h11.RemoteProtocolError as error:
                await self._malformed(error)
                break
            if not isinstance(event, h11.Request):
                return
            self._read, self._whole = bytearray(), False
            self._body_less = event.method == b"HEAD"
            self._chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
            if not await self._one(event):
                break
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                break
            self._http.start_next_cycle()
        await self._finish()

    async def _one(self, head: h11.Request) -> bool:
        """Serve a request; False: nothing can follow it."""
        exchange = exchange_of(head_of(head.method, head.target, (), websocket=False), self._site.scheme)
        try:
            request = self._understood(head)
            exchange = exchange_of(request, self._site.scheme)
            decision = self._site.judge(request, exchange)
            if decision.asks:  # what the program goes on to send waits in its socket
                decision = await while_there(self._client, self._site.ask(exchange, decision))
            digest = await self._body_digest() if needs_digest(request, decision) else None
            headers = self._site.dress(request, exchange, decision, digest)
            server = await self._reach_server()
            return await self._exchange(server, request, headers, exchange)
        except Refused as error:
            refused = error
        except Unreachable as error:
            refused = not_reached(error)
        except Cut as error:
            self._site.tell(exchange, "limit", f"network.budget.{error.limit} is used up")
            raise
        except Left as error:
            self._site.tell(exchange, "failed", str(error))
            raise
        except (OSError, h11.ProtocolError) as error:
            self._server = None
            refused = self._broken(error)
            if self._http.our_state is not h11.SEND_RESPONSE:
                self._site.tell(exchange, "failed", f"the connection ended in the middle: {refused.why}")
                raise Broken(refused.why) from error
        finally:
            if sys.exc_info()[1] is not None:
                self._site.tell(exchange, "failed", "the call ended before the answer did")
        self._site.tell(exchange, refused.verdict, refused.why)
        return await self._refuse(refused)

    def _broken(self, error: OSError | h11.ProtocolError) -> Refused:
        """The answer to a request that could not be made as it was begun."""
        if self._http.their_state is h11.ERROR:
            return Refused(400, "failed", f"the request is malformed: {error}")
        if isinstance(error, h11.LocalProtocolError):  # it quotes what it does not send: secrets, too
            return Refused(502, "failed", "the request cannot be sent on: a header of it is no header")
        return Refused(502, "failed", f"no answer came: {error}")

    async def _body_digest(self) -> str:
        """The SHA-256 of the request's body, which is read for that and kept. Raises Refused."""
        if self._http.they_are_waiting_for_100_continue:
            self._answer(h11.InformationalResponse(status_code=100, headers=[]))
            await self._flush()
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise Broken("the program ended its connection in the middle of a request")
            self._read += event.data
            if len(self._read) > MAX_SIGNED:
                raise Refused(413, "denied", TOO_LONG_TO_SIGN)
        self._whole = True
        return hashlib.sha256(self._read).hexdigest()

    def _understood(self, head: h11.Request) -> HttpRequest:
        listed = list(head.headers)
        authority = [value for name, value in listed if name == b"host"]
        target = head.target
        if head.http_version not in (b"1.0", b"1.1"):
            raise Refused(505, "failed", "on this connection HTTP/1.0 and 1.1 are spoken")
        if self._chunked and any(name == b"content-length" for name, _ in listed):
            raise Refused(400, "failed", "the request has both a length and chunks")
        if b"#" in target:
            raise Refused(400, "failed", "the target has a fragment, which is sent to nobody")
        if head.method == b"CONNECT":
            raise Refused(405, "denied", "CONNECT: this is no proxy; connect to the host itself")
        if target[:1] != b"/" and not (target == b"*" and head.method == b"OPTIONS"):
            target, named = self._of_absolute(target)
            authority.append(named)
        for each in authority:
            self._site.check_authority(each)
        websocket = _upgrade(listed) == b"websocket"
        length = next((value for name, value in listed if name == b"content-length"), b"0")
        if websocket and (head.method != b"GET" or self._chunked or length != b"0"):
            raise Refused(400, "denied", "a WebSocket is asked for by GET, without a body")
        return head_of(head.method, target, listed, websocket=websocket)

    def _of_absolute(self, target: bytes) -> tuple[bytes, bytes]:
        try:
            parts = urlsplit(target)
        except ValueError:
            parts = urlsplit(b"")
        if parts.scheme != self._site.scheme.encode() or not parts.netloc:
            said = excerpt(target.decode("latin-1"), 255)
            raise Refused(400, "denied", f"the target {said!r} is neither a path nor a URL of this host")
        rest = target[target.index(b"//") + 2 + len(parts.netloc) :]
        return rest if rest[:1] == b"/" else b"/" + rest, parts.netloc

    async def _reach_server(self) -> _Server:
        server = self._server
        if server is None or server.http.our_state is not h11.IDLE or not _is_quiet(server.stream):
            server = self._server = _Server(await self._connect())
        return server

    # one exchange

    async def _exchange(
        self, server: _Server, request: HttpRequest, headers: list[tuple[bytes, bytes]], exchange: Exchange
    ) -> bool:
        framing = self._framing(headers)
        if request.websocket:
            framing += [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
        asked = h11.Request(method=request.method, target=request.target, headers=[*headers, *framing])
        await self._say(server, asked)
        if self._http.they_are_waiting_for_100_continue:
            self._answer(h11.InformationalResponse(status_code=100, headers=[]))
            await self._flush()
        again = False
        try:
            async with anyio.create_task_group() as tasks:
                if self._chunked or any(name == b"content-length" for name, _ in headers):
                    tasks.start_soon(self._send_body, server, exchange)
                else:
                    await self._send_body(server, exchange)  # the end of it, which is there
                again = await self._answer_of(server, request, exchange)
                if not again:
                    tasks.cancel_scope.cancel()  # whatever of the request is still to come, nobody reads
        except ExceptionGroup as group:
            raise first_of(group) from group
        if exchange.status == 101:
            return False
        self._site.tell(exchange, "allowed")
        if again:
            server.http.start_next_cycle()
        return again

    def _framing(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        names = {name for name, _ in headers}
        found = [] if b"host" in names else [(b"host", self._site.authority)]  # HTTP/1.0 need not say it
        if self._chunked:
            found.append((b"transfer-encoding", b"chunked"))
        return found

    async def _send_body(self, server: _Server, exchange: Exchange) -> None:
        if self._whole:
            exchange.sent += len(self._read)
            if self._read:
                await self._say(server, h11.Data(data=bytes(self._read)))
            await self._say(server, h11.EndOfMessage())
            return
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                exchange.sent += len(event.data)
                await self._say(server, h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await self._say(server, h11.EndOfMessage())  # what trails it was not judged, and is dropped
                return
            else:
                raise Broken("the program ended its connection in the middle of a request")

    async def _answer_of(self, server: _Server, request: HttpRequest, exchange: Exchange) -> bool:
        """Pass the answer on; whether both connections can be used again."""
        while True:
            event = await self._hear(server)
            match event:
                case h11.InformationalResponse() if event.status_code == 101:
                    if _upgrade(event.headers) != b"websocket":
                        raise Broken("the server changes to another protocol than was asked for")
                    exchange.status = 101
                    self._answer(
                        h11.InformationalResponse(
                            status_code=101,
                            headers=[
                                *_passed_on(event.headers),
                                (b"connection", b"upgrade"),
                                (b"upgrade", b"websocket"),
                            ],
                        )
                    )
                    await self._flush()
                    await self._switch(server, exchange)
                    return False
                case h11.InformationalResponse():
                    if event.status_code != 100:
                        self._answer(
                            h11.InformationalResponse(
                                status_code=event.status_code, headers=_passed_on(event.headers)
                            )
                        )
                case h11.Response():
                    exchange.status = event.status_code
                    self._answer(
                        h11.Response(
                            status_code=event.status_code,
                            headers=_passed_on(event.headers),
                            reason=event.reason,
                        )
                    )
                case h11.Data():
                    exchange.received += len(event.data)
                    self._answer(h11.Data(data=event.data))
                case h11.EndOfMessage():
                    trails = request.method != "HEAD" and self._http.their_http_version != b"1.0"
                    self._answer(h11.EndOfMessage(headers=event.headers if trails else []))
                    await self._flush()
                    states = (self._http.our_state, self._http.their_state, *server.http.states.values())
                    return all(state is h11.DONE for state in states)
                case _:
                    raise Broken("the server ended its connection in the middle of an answer")

    async def _switch(self, server: _Server, exchange: Exchange) -> None:
        """Bytes both ways, until either side ends."""

        async def move(source: Stream, sink: Stream, first: bytes, *, out: bool) -> None:
            data = first or await source.receive()
            while data:
                if out:
                    exchange.sent += len(data)
                else:
                    exchange.received += len(data)
                await sink.send(data)
                data = await source.receive()
            with suppress(OSError):
                await sink.finish()

        ours, theirs = self._http.trailing_data[0], server.http.trailing_data[0]
        why = ""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: move(self._client, server.stream, ours, out=True))
                tasks.start_soon(lambda: move(server.stream, self._client, theirs, out=False))
        except* OSError as group:  # the end of most of them
            why = f"one side ended it: {first_of(group)}"
        self._site.tell(exchange, "allowed", why)

    # what is not passed on

    async def _refuse(self, refused: Refused) -> bool:
        """Say why a request is not made; whether another may follow on the connection."""
        drained = self._whole or (not self._http.they_are_waiting_for_100_continue and await self._drain())
        await self._explain(refused, refused.status, close=not drained)
        return drained

    async def _malformed(self, error: h11.RemoteProtocolError) -> None:
        refused = Refused(400, "failed", f"the request is malformed: {error}")
        exchange = exchange_of(head_of(b"", b"", (), websocket=False), self._site.scheme)
        self._site.tell(exchange, refused.verdict, refused.why)
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._explain(refused, error.error_status_hint, close=True)

    async def _explain(self, refused: Refused, status: int, *, close: bool) -> None:
        headers, body = self._site.explain(refused)
        if close:
            headers.append((b"connection", b"close"))
        self._answer(h11.Response(status_code=status, headers=headers))
        if not self._body_less:
            self._answer(h11.Data(data=body))
        self._answer(h11.EndOfMessage())
        await self._flush()

    async def _drain(self) -> bool:
        read = 0
        with suppress(h11.RemoteProtocolError), anyio.move_on_after(FINISH_SECONDS):
            while read <= DRAINED:
                event = await self._next()
                if isinstance(event, h11.EndOfMessage):
                    return True
                if not isinstance(event, h11.Data):
                    return False
                read += len(event.data)
        return False

    async def _finish(self) -> None:
        """End the connection so that what was said arrives, whatever the program still sends."""
        with suppress(OSError), anyio.move_on_after(FINISH_SECONDS):
            await self._client.finish()
            while await self._client.receive():
                pass

    # messages

    async def _yield(self) -> None:
        """Let others have their turn now and then: one read may hold thousands of chunks."""
        self._events += 1
        if self._events % EVENTS == 0:
            await anyio.lowlevel.checkpoint()

    async def _next(self) -> object:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                await self._yield()
                return event
            self._http.receive_data(await self._client.receive())

    async def _hear(self, server: _Server) -> object:
        while True:
            event = server.http.next_event()
            if event is not h11.NEED_DATA:
                await self._yield()
                return event
            await self._flush()
            server.http.receive_data(await server.stream.receive())

    def _answer(self, event: h11.Event) -> None:
        """To be sent by ``_flush``: the head of an answer and what is there of its body go together."""
        self._unsent += self._http.send(event) or b""

    async def _flush(self) -> None:
        if self._unsent:
            data, self._unsent = bytes(self._unsent), bytearray()
            await self._client.send(data)

    async def _say(self, server: _Server, event: h11.Event) -> None:
        if (data := server.http.send(event)) is not None and data:
            await server.stream.send(data)


def _upgrade(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """What a head changes the protocol to; nothing, where it does not say so twice as it has to."""
    named: dict[bytes, bytes] = {}
    for name, value in headers:
        named[name] = named[name] + b"," + value if name in named else value
    tokens = {token.strip().lower() for token in named.get(b"connection", b"").split(b",")}
    return named.get(b"upgrade", b"").strip().lower() if b"upgrade" in tokens else b""


def _is_quiet(stream: Stream) -> bool:
    """Whether a server that is not asked says nothing, and has not ended."""
    try:
        return stream.at_hand() is None
    except OSError:
        return False


def _passed_on(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers of an answer, without what is said to the next hop alone."""
    return without_hops(headers, keep=frozenset({b"proxy-authenticate"}))
