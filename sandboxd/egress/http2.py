"""HTTP/2 between a container and a server: each request is read, judged and written anew on its own stream.

Four tasks serve a connection: one reads and one writes at each end. Bodies wait between them as ``http2end``
has it, so that a stream that is not read holds up no other. Where the server ends its connection, another is
made for the next request; where it says that it will, the program is told the same.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)

from sandboxd.egress.http2end import FULL, MAX_STREAMS, End
from sandboxd.egress.http2pair import Pair, answer_head, is_sound, length_of, request_head, understood
from sandboxd.egress.http2requests import Requests
from sandboxd.egress.http2undecided import Undecided
from sandboxd.egress.relay import Cut
from sandboxd.egress.sigv4 import EMPTY
from sandboxd.egress.site import (
    Refused,
    exchange_of,
    head_of,
    needs_digest,
    not_reached,
    without_hops,
)
from sandboxd.egress.streams import Broken, first_of
from sandboxd.egress.upstream import Unreachable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from h2.events import Event

    from sandboxd.egress.site import Site
    from sandboxd.egress.streams import Stream
    from sandboxd.httprule import HttpRequest
    from sandboxd.reach import Decision

__all__ = ["Http2"]

GREETING_SECONDS = 10.0
CANCELLED = "the call ended before the answer did"
IN_THE_MIDDLE = "the connection ended in the middle"


class Http2:
    """Serves one connection of a container. ``connect`` makes one to the server; ``first`` is one already."""

    def __init__(
        self,
        client: Stream,
        site: Site,
        connect: Callable[[], Awaitable[Stream]],
        first: Stream | None = None,
    ) -> None:
        self._client = End(client, "the program", client_side=False)
        self._site = site
        self._connect = connect
        self._first = first
        self._requests = Requests(self._client, site)
        self._asked = anyio.Event()
        self._leaving = False
        """The server takes no more, and the program knows."""

    async def run(self) -> None:
        """Until either side ends. Raises OSError, Cut."""
        broken: Broken | None = None
        try:
            async with anyio.create_task_group() as tasks:
                self._requests.tasks = tasks
                upstream = anyio.CancelScope()
                tasks.start_soon(self._client.write)
                tasks.start_soon(self._upstream, upstream)
                try:
                    await self._hear_program()
                except Broken as error:
                    broken = error
                self._requests.tell_all("failed", str(broken or IN_THE_MIDDLE))
                upstream.cancel()
                await self._client.finish()
                tasks.cancel_scope.cancel()
        except anyio.get_cancelled_exc_class():
            self._requests.tell_all("failed", CANCELLED)
            raise
        except ExceptionGroup as group:
            raised = first_of(group)
            if isinstance(raised, Cut):
                self._requests.tell_all("limit", f"network.budget.{raised.limit} is used up")
            raise raised from group
        finally:
            self._requests.tell_all("failed", IN_THE_MIDDLE)
        if broken is not None:
            raise broken

    # the program

    async def _hear_program(self) -> None:
        while (events := await self._client.receive()) is not None:
            for event in events:
                self._on_program(event)
        if self._requests.pairs:
            raise Broken("the program ended its connection in the middle of a request")

    def _on_program(self, event: Event) -> None:
        match event:
            case RequestReceived():
                self._on_request(event)
            case DataReceived():
                self._requests.on_data(
                    self._client, self._requests.pairs.get(event.stream_id), event, out=True
                )
            case StreamEnded():
                if (pair := self._requests.pairs.get(event.stream_id)) is not None:
                    self._on_asked(pair)
            case StreamReset():
                if (pair := self._requests.pairs.get(event.stream_id)) is not None:
                    why = f"the program gave the request up ({_said(event.error_code)})"
                    if not event.remote_reset:
                        why = f"the program broke the rules of HTTP/2 ({_said(event.error_code)})"
                    self._requests.give_up(pair, why, ErrorCodes.CANCEL)
            case _:
                pass  # what trails a request was not judged, and is dropped

    def _on_request(self, event: RequestReceived) -> None:
        came, ended = event.headers, event.stream_ended is not None
        said = dict(came)
        bare = head_of(said.get(b":method", b""), said.get(b":path", b""), (), websocket=False)
        pair = Pair(event.stream_id, exchange_of(bare, self._site.scheme), self._requests.on_over)
        self._requests.pairs[pair.ours] = pair
        if self._leaving:
            self._requests.give_up(pair, "the server takes no more requests", ErrorCodes.REFUSED_STREAM)
            return
        try:
            request = understood(came, self._site)
            pair.exchange = exchange_of(request, self._site.scheme)
            pair.length = length_of(request, ended=ended)
            decision = self._site.judge(request, pair.exchange)
        except Refused as refused:
            self._requests.refuse(pair, refused)
            return
        pair.out.source = self._client, pair.ours
        expected = {value.lower() for name, value in came if name == b"expect"}
        pair.continues = b"100-continue" in expected and not ended
        reads = not ended and needs_digest(request, decision)
        if decision.asks or reads:
            assert self._requests.tasks is not None  # noqa: S101
            ready = partial(self._make, pair, request, came)
            pair.undecided = Undecided(pair.exchange, pair.out, self._site, asks=decision.asks, reads=reads)
            self._requests.tasks.start_soon(self._decide, pair, decision, ready)
            return
        self._make(pair, request, came, decision, EMPTY if ended else None)

    async def _decide(
        self, pair: Pair, decision: Decision, ready: Callable[[Decision, str | None], None]
    ) -> None:
        """Wait for what has to be known of a request before it is made; other streams do not."""
        undecided = pair.undecided
        assert undecided is not None  # noqa: S101
        with undecided.scope:
            try:
                decision = await undecided.answer(decision)
                if undecided.reads:
                    self._go_on(pair)
                digest = await undecided.digest()
            except Refused as refused:
                self._requests.refuse(pair, refused)
                return
            pair.undecided = None
            if self._leaving:
                self._requests.give_up(pair, "the server takes no more requests", ErrorCodes.REFUSED_STREAM)
            else:
                ready(decision, digest)

    def _go_on(self, pair: Pair) -> None:
        """Tell a program that waits for that to send its body."""
        if pair.continues and not pair.asked:
            self._client.say(pair.ours, [(b":status", b"100")], last=False)
        pair.continues = False

    def _make(
        self,
        pair: Pair,
        request: HttpRequest,
        came: list[tuple[bytes, bytes]],
        decision: Decision,
        digest: str | None,
    ) -> None:
        """Have a request that was decided on made."""
        try:
            headers = self._site.dress(request, pair.exchange, decision, digest)
            if not is_sound(headers):
                raise Refused(502, "failed", "what is put into the request is no header")
        except Refused as refused:
            self._requests.refuse(pair, refused)
            return
        pair.head = request_head(request, headers, self._site, came)
        self._go_on(pair)
        self._requests.waiting[pair.ours] = pair
        self._asked.set()
        if self._requests.server is not None:
            self._requests.server.wake()

    def _on_asked(self, pair: Pair) -> None:
        pair.asked = True
        if pair.length is not None and pair.came != pair.length and not pair.refused:
            why = f"the request's body has {pair.came} bytes, and was to have {pair.length}"
            self._requests.give_up(pair, why, ErrorCodes.PROTOCOL_ERROR)
            return
        pair.out.put(b"", last=True)
        if pair.undecided is not None:
            pair.undecided.changed()

    # the server

    async def _upstream(self, scope: anyio.CancelScope) -> None:
        first, self._first = self._first, None
        with scope:
            while True:
                while first is None and not self._requests.waiting:
                    self._asked = anyio.Event()
                    await self._asked.wait()
                try:
                    stream = first or await self._connect()
                except (Unreachable, Broken) as error:
                    self._requests.refuse_waiting(not_reached(error))
                except OSError as error:
                    self._requests.refuse_waiting(Refused(502, "failed", str(error)))
                else:
                    first = None
                    await self._serve_with(stream)

    async def _serve_with(self, stream: Stream) -> None:
        server = self._requests.server = End(
            stream, "the server", client_side=True, refill=self._make_requests
        )
        why, polite = "", False
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.write)
                try:
                    why = await self._hear_server(server)
                except Broken as error:
                    why, polite = str(error), True
                self._on_server_gone(server, why)
                if polite:
                    await server.finish()
                tasks.cancel_scope.cancel()
        except ExceptionGroup as group:
            raised = first_of(group)
            if not isinstance(raised, OSError):
                raise raised from group
            self._on_server_gone(server, f"the connection to the server broke: {raised}")

    def _on_server_gone(self, server: End, why: str) -> None:
        if self._requests.server is not server:
            return
        self._requests.server = None
        for pair in list(self._requests.made.values()):
            if pair.back.ended:  # all of the answer is here
                self._requests.end_out(pair)
            else:
                self._requests.fail(pair, why)
        if not server.http.highest_outbound_stream_id:  # the next one would do no better
            self._requests.refuse_waiting(Refused(502, "failed", why))

    async def _hear_server(self, server: End) -> str:
        """Until the server ends its connection, or is done with it; the reason."""
        with anyio.move_on_after(GREETING_SECONDS):
            while not server.greeted:
                if not await self._hear_some(server):
                    return "the server ended its connection before it said anything"
        if not server.greeted:
            raise Broken("the server did not begin to speak HTTP/2")
        server.wake()
        while self._requests.made or not server.leaving:
            if not await self._hear_some(server):
                return "the server ended its connection in the middle of an answer"
        return "the server takes no more requests"

    async def _hear_some(self, server: End) -> bool:
        await self._client.has_room()
        events = await server.receive()
        for event in events or ():
            self._on_server(server, event)
        return events is not None

    def _on_server(self, server: End, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            self._on_going_away(server, event.last_stream_id or 0)
            return
        pair = self._requests.made.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, DataReceived):
            self._requests.on_data(server, pair, event, out=False)
        elif pair is not None:
            self._on_answer(pair, event)

    def _on_answer(self, pair: Pair, event: Event) -> None:
        match event:
            case InformationalResponseReceived() | ResponseReceived():
                self._on_head(pair, event)
            case TrailersReceived():
                pair.back.trailers = without_hops(event.headers or ())
                if not is_sound(pair.back.trailers):
                    self._requests.fail(pair, "what trails the server's answer is malformed")
            case StreamEnded():
                pair.back.put(b"", last=True)
            case StreamReset() if pair.back.ended:  # it wants no more of the request
                self._requests.end_out(pair)
            case StreamReset() if event.remote_reset:
                why = f"the server reset the request ({_said(event.error_code)})"
                self._requests.give_up(pair, why, event.error_code)
            case StreamReset():
                self._requests.fail(pair, "the server's answer is not as long as it was to be, or has no end")
            case _:
                pass

    def _on_head(self, pair: Pair, event: InformationalResponseReceived | ResponseReceived) -> None:
        found = answer_head(event.headers or ())
        if found is None:
            self._requests.fail(pair, "the server's answer is malformed")
            return
        status, headers = found
        if isinstance(event, InformationalResponseReceived):
            if status != 100:  # which was said already
                self._client.say(pair.ours, headers, last=False)
            return
        pair.exchange.status = status
        pair.answering = True
        last = event.stream_ended is not None
        self._client.say(pair.ours, headers, last=last)
        self._client.add(pair.back, ended=last)

    def _on_going_away(self, server: End, last: int) -> None:
        server.leaving = True
        for pair in list(self._requests.made.values()):
            if pair.theirs > last:
                why = "the server takes no more requests, and did not begin with this one"
                self._requests.give_up(pair, why, ErrorCodes.REFUSED_STREAM)
        if self._requests.made and not self._leaving:
            self._leaving = True
            self._client.http.going_away()
            self._client.wake()
            for pair in list(self._requests.waiting.values()):
                self._requests.give_up(pair, "the server takes no more requests", ErrorCodes.REFUSED_STREAM)

    def _make_requests(self) -> None:
        """Those that wait, as many as the server serves at once."""
        server = self._requests.server
        if server is None or not server.greeted or server.leaving:
            return
        most = min(server.http.remote_settings.max_concurrent_streams, MAX_STREAMS)
        while (
            self._requests.waiting
            and server.http.unwritten < FULL
            and server.http.open_outbound_streams < most
        ):
            pair = self._requests.waiting.pop(next(iter(self._requests.waiting)))
            pair.theirs = pair.out.id = server.http.get_next_available_stream_id()
            self._requests.made[pair.theirs] = pair
            pair.back.source = server, pair.theirs
            last = pair.asked and not pair.out.data
            server.say(pair.theirs, pair.head, last=last)
            pair.head = []
            server.add(pair.out, ended=last)


def _said(code: int) -> str:
    return getattr(code, "name", str(code))
