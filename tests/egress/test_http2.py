"""HTTP/2 between real ends: what passes, what is refused, what is told, and whatever an end can do wrong."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hpack import Encoder
from http2_peers import Peer, Seen, asked, between, echo
from hyperframe.frame import GoAwayFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.egress.http2end import BACKLOG, CONNECTION_WINDOW, MAX_STREAMS, STREAM_WINDOW
from sandboxd.egress.relay import Cut
from sandboxd.egress.streams import Broken, Plain
from sandboxd.egress.upstream import Unreachable
from sandboxd.httprule import HttpRule, Injection
from sandboxd.reach import Decision

if TYPE_CHECKING:
    from h2.events import Event
    from http2_peers import Between
    from hyperframe.frame import Frame

    from sandboxd.egress.streams import Stream
    from sandboxd.httprule import HttpRequest

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def settled(turns: int = 200) -> None:
    """Let everything that can go on do so."""
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    await anyio.sleep(0.02)


def frame(kind: int, flags: int = 0, stream: int = 0, body: bytes = b"") -> bytes:
    """A frame as RFC 9113, section 4.1, has it."""
    return len(body).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + body


UNKNOWN = [(100 + at).to_bytes(2) + bytes(4) for at in range(1000)]
"""Settings."""
BOMB = b"\x40\1a\x7f\xa1\x1e" + b"b" * 4000 + b"\xbe" * 1000
"""A header of 4,000 bytes, a thousand times: RFC 7541, section 7.3."""
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)


# what passes


async def test_a_request_and_its_answer() -> None:
    async with between() as world:
        seen = await world.program.get(asked("/ok/a?b=c", "POST", content_length="5"), b"hello")
        assert (seen.status, bytes(seen.data), seen.headers[b"x-path"]) == (200, b"hello", b"/ok/a?b=c")
        await settled()
        [told] = world.told
        assert (told.method, told.path, told.verdict, told.status) == ("POST", "/ok/a", "allowed", 200)
        assert (told.sent, told.received) == (5, 5)
        got = dict(world.server.streams[1].listed)
        assert got[b":authority"] == b"api.test"
        assert b"host" not in got


async def test_headers_go_on_and_those_for_the_next_hop_do_not() -> None:
    async with between() as world:
        head = asked(
            "/ok", x_one="1", te="trailers", expect="100-continue", trailer="x", proxy_authorization="z"
        )
        head += [(b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"host", b"api.test")]
        number = await world.program.ask(head, None)
        await world.program.until(lambda: world.program.streams[number].informational == [b"100"])
        await world.program.send(number, b"", last=True)
        assert (await world.program.answer(number)).status == 200
        listed = world.server.streams[1].listed
        assert listed == [
            (b":method", b"GET"),
            (b":scheme", b"http"),
            (b":authority", b"api.test"),
            (b":path", b"/ok"),
            (b"x-one", b"1"),
            (b"te", b"trailers"),
            (b"cookie", b"a=1; b=2"),
        ]


async def test_trailers_pass_back_and_not_out() -> None:
    async def serve(server: Peer, number: int) -> None:
        await server.until(lambda: server.streams[number].ended)
        server.http.send_headers(number, [(b":status", b"103"), (b"link", b"</a>")])
        server.http.send_headers(number, [(b":status", b"200"), (b"trailer", b"grpc-status")])
        server.http.send_data(number, b"body")
        server.http.send_headers(number, [(b"grpc-status", b"0")], end_stream=True)
        await server.flush()

    async with between(serve) as world:
        number = await world.program.ask(asked("/ok", "POST"), None)
        await world.program.send(number, b"x")
        world.program.http.send_headers(number, [(b"x-smuggled", b"1")], end_stream=True)
        await world.program.flush()
        seen = await world.program.answer(number)
        assert (seen.status, seen.informational, bytes(seen.data)) == (200, [b"103"], b"body")
        assert seen.trailers == {b"grpc-status": b"0"}
        assert seen.headers[b"trailer"] == b"grpc-status"
        assert world.server.streams[1].trailers == {}
        await settled()
        assert [each.verdict for each in world.told] == ["allowed"]


async def test_streaming_both_ways_in_turn() -> None:
    async def serve(server: Peer, number: int) -> None:
        seen = server.streams[number]
        server.http.send_headers(number, [(b":status", b"200")])
        await server.flush()
        answered = 0
        while not seen.ended:
            await server.until(lambda answered=answered: seen.size > answered or seen.ended)  # type: ignore[misc]
            if seen.size > answered:
                await server.send(number, bytes(seen.data[answered:]).upper())
                answered = seen.size
        server.http.send_headers(number, [(b"grpc-status", b"0")], end_stream=True)
        await server.flush()

    async with between(serve) as world:
        number = await world.program.ask(asked("/ok", "POST", te="trailers"), None)
        seen = world.program.streams[number]
        for turn in range(50):
            await world.program.send(number, b"message %02d" % turn)
            await world.program.until(lambda turn=turn: seen.size == 10 * (turn + 1))  # type: ignore[misc]
        assert seen.data.endswith(b"MESSAGE 49")
        await world.program.send(number, b"", last=True)
        assert (await world.program.answer(number)).trailers == {b"grpc-status": b"0"}


async def test_a_hundred_at_once() -> None:
    async with between() as world:
        numbers = [await world.program.ask(asked(f"/ok/{each}", "POST"), None) for each in range(MAX_STREAMS)]
        for each in reversed(numbers):
            await world.program.send(each, b"body of %d" % each, last=True)
        for at, each in enumerate(numbers):
            seen = await world.program.answer(each)
            assert (seen.headers[b"x-path"], bytes(seen.data)) == (b"/ok/%d" % at, b"body of %d" % each)
        await settled()
        assert [each.verdict for each in world.told] == ["allowed"] * MAX_STREAMS
        assert len(world.servers) == 1


async def test_a_server_that_takes_few_at_once_is_waited_for() -> None:
    async with between(settings={SettingCodes.MAX_CONCURRENT_STREAMS: 2}) as world:
        numbers = [await world.program.ask(asked(f"/ok/{each}")) for each in range(20)]
        for each in numbers:
            assert (await world.program.answer(each)).status == 200


SIZE = 50 << 20


@pytest.mark.parametrize("requests", [1, 5])
async def test_a_lot_both_ways_at_once(requests: int) -> None:
    async def serve(server: Peer, number: int) -> None:
        server.http.send_headers(number, [(b":status", b"200")])
        await server.flush()
        for _ in range(SIZE // requests >> 20):
            await server.send(number, bytes(1 << 20))
        await server.until(lambda: server.streams[number].ended)
        assert server.streams[number].size == SIZE // requests >> 20 << 20
        await server.send(number, b"", last=True)

    async with between(serve) as world:
        world.program.keeps = False

        async def one() -> None:
            number = await world.program.ask(asked("/ok", "POST"), None)
            await world.program.until(lambda: bool(world.servers))
            world.server.keeps = False
            for _ in range(SIZE // requests >> 20):
                await world.program.send(number, bytes(1 << 20))
            await world.program.send(number, b"", last=True)
            seen = await world.program.answer(number)
            assert (seen.size, seen.reset) == (SIZE // requests >> 20 << 20, None)

        async with anyio.create_task_group() as tasks:
            for _ in range(requests):
                tasks.start_soon(one)
        await settled()
        total = requests * (SIZE // requests >> 20 << 20)
        assert (sum(each.sent for each in world.told), sum(each.received for each in world.told)) == (
            total,
            total,
        )


@settings(max_examples=25)
@given(
    bodies=st.lists(st.lists(st.binary(max_size=300), max_size=5), min_size=1, max_size=4),
    pieces=st.lists(st.integers(1, 60), min_size=1, max_size=30),
)
def test_however_bytes_are_cut(bodies: list[list[bytes]], pieces: list[int]) -> None:
    async def go() -> None:
        async with between(listens=False) as world:  # what it would answer is not to come between the pieces
            program = world.program
            numbers = []
            for parts in bodies:
                number = await ask_unsent(program)
                for part in parts:
                    program.http.send_data(number, part, pad_length=len(part) % 7)
                program.http.end_stream(number)
                numbers.append(number)
            data = memoryview(program.http.data_to_send())
            turn = 0
            while data:
                size = pieces[turn % len(pieces)]
                turn += 1
                await program.raw(bytes(data[:size]))
                data = data[size:]
                await anyio.lowlevel.checkpoint()
            world.tasks.start_soon(program.run, world.tasks)
            for number, parts in zip(numbers, bodies, strict=True):
                assert bytes((await program.answer(number)).data) == b"".join(parts)

    anyio.run(go)


async def ask_unsent(program: Peer) -> int:
    number = program.http.get_next_available_stream_id()
    program.streams[number] = Seen()
    program.http.send_headers(number, asked("/ok", "POST"))
    return number


# what is refused


def instead(name: bytes, value: bytes) -> list[tuple[bytes, bytes]]:
    """A request with another pseudo-header."""
    return [(each, value if each == name else its) for each, its in asked()]


@pytest.mark.parametrize(
    ("head", "status", "said"),
    [
        (asked("/secret"), 403, "no rule allows"),
        (asked("/ok", "DELETE"), 403, "no rule allows"),
        (asked("/ok/../secret"), 403, "servers resolve in different ways"),
        (instead(b":authority", b"evil.test"), 421, "evil.test"),
        (instead(b":authority", b"api.test:81"), 421, "api.test:81"),
        (instead(b":authority", b"a@api.test"), 421, "a@api.test"),
        (instead(b":scheme", b"https"), 400, "scheme"),
        (asked("http://api.test/ok"), 400, "no path"),
        (asked("ok"), 400, "no path"),
        (asked("*"), 400, "no path"),
        (asked("/ok#x"), 400, "no path"),
        (asked("/ok x"), 400, "no path"),
        (asked("/ok", "GET /secret"), 400, "malformed"),
        ([*asked(), (b"a(b)", b"1")], 400, "malformed"),
        ([*asked(), (b"x", b"a\x01b")], 400, "malformed"),
        (asked(content_length="5"), 400, "content-length"),
        ([*asked(), (b"content-length", b"0"), (b"content-length", b"0")], 400, "content-length"),
        ([(b":method", b"CONNECT"), (b":authority", b"api.test:80")], 405, "CONNECT"),
        ([(b":method", b"CONNECT"), (b":protocol", b"websocket"), *asked()[1:]], 405, "CONNECT"),
    ],
)  # fmt: skip
async def test_what_is_refused(head: list[tuple[bytes, bytes]], status: int, said: str) -> None:
    async with between() as world:
        seen = await world.program.get(head)
        assert seen.status == status
        problem = json.loads(seen.data)
        assert said in problem["detail"]
        assert seen.headers[b"content-type"] == b"application/problem+json"
        if status == 403:
            assert problem["allowed"] == ["api.test: GET POST HEAD OPTIONS, /ok /ok/**"]
        await settled()
        assert [(each.verdict, each.why) for each in world.told] == [("denied", problem["detail"])]
        assert not world.servers
        assert (await world.program.get(asked())).status == 200  # others go on
        assert len(world.server.streams) == 1


async def test_a_refused_request_whose_body_still_comes() -> None:
    async with between() as world:
        number = await world.program.ask(asked("/secret", "POST"), None)
        seen = world.program.streams[number]
        await world.program.until(lambda: seen.reset is not None)
        assert (seen.status, seen.ended, seen.reset) == (403, True, ErrorCodes.NO_ERROR)
        # what was on its way meanwhile is taken, and costs no window
        for _ in range(20):
            await world.program.raw(frame(DATA, 0, number, bytes(16384)))
            await settled(turns=20)
        assert (await world.program.get(asked("/ok", "POST"), bytes(3 << 20))).size == 3 << 20
        assert [each.verdict for each in world.told] == ["denied", "allowed"]


async def test_a_refusal_waits_for_room_and_a_head_has_no_body() -> None:
    async with between(program_settings={SettingCodes.INITIAL_WINDOW_SIZE: 0}) as world:
        seen = await world.program.get(asked("/secret", "HEAD"))
        assert (seen.status, seen.size) == (403, 0)
        number = await world.program.ask(asked("/secret"))
        seen = world.program.streams[number]
        await world.program.until(lambda: seen.status == 403)
        await settled()
        assert seen.size == 0
        world.program.http.increment_flow_control_window(10_000, number)
        await world.program.flush()
        assert json.loads((await world.program.answer(number)).data)["status"] == 403


async def test_a_budget_of_requests() -> None:
    async with between(limits={"requests": 2}) as world:
        assert [(await world.program.get(asked())).status for _ in range(3)] == [200, 200, 429]
        await settled()
        assert [each.verdict for each in world.told] == ["allowed", "allowed", "limit"]


async def test_a_budget_of_bytes_cuts_and_says_so() -> None:
    async with between(limits={"bytes_out": 100_000}) as world:
        number = await world.program.ask(asked("/ok", "POST"), None)
        world.tasks.start_soon(swallow, world.program, number)
        await world.done.wait()
        assert isinstance(world.raised, Cut)
        assert [(each.verdict, each.why) for each in world.told] == [
            ("limit", "network.budget.bytes_out is used up")
        ]


@pytest.mark.parametrize(
    ("error", "status", "verdict"),
    [
        (Unreachable("api.test does not answer"), 502, "failed"),
        (Unreachable("not there", Decision(allowed=False, why="x", where="policy.yaml:3")), 403, "denied"),
        (Broken("the server's certificate: expired"), 502, "failed"),
        (ConnectionRefusedError("no"), 502, "failed"),
    ],
)
async def test_a_server_that_is_not_reached(error: Exception, status: int, verdict: str) -> None:
    async def connect() -> Stream:
        await anyio.lowlevel.checkpoint()
        raise error

    async with between(connect=connect) as world:
        for _ in range(2):
            seen = await world.program.get(asked("/ok", "POST"), b"body")
            assert (seen.status, json.loads(seen.data)["detail"]) == (status, str(error))
        await settled()
        assert [each.verdict for each in world.told] == [verdict] * 2


async def test_what_is_put_in_is_not_remembered_for_compression() -> None:
    def inject(
        decision: Decision, request: HttpRequest, digest: str | None
    ) -> tuple[list[tuple[bytes, bytes]], tuple[str, ...]]:
        return [*request.headers, (b"x-api-key", b"a-secret-of-some-length")], ("KEY@1",)

    rules = HttpRule(inject=Injection("x-api-key", "{secret:KEY}", plain=True))
    async with between(inject=inject, rules=rules) as world:
        for _ in range(3):
            assert (await world.program.get(asked(x_mine="remembered"))).status == 200
        server = world.server
        assert [dict(seen.listed)[b"x-api-key"] for seen in server.streams.values()] == [
            b"a-secret-of-some-length"
        ] * 3
        table = [name for name, _ in server.http.decoder.header_table.dynamic_entries]
        assert b"x-mine" in table
        assert b"x-api-key" not in table


# how things end


async def test_resets_pass_both_ways() -> None:
    async def serve(server: Peer, number: int) -> None:
        path = server.streams[number].headers[b":path"]
        if path == b"/ok/reset":
            server.http.reset_stream(number, ErrorCodes.ENHANCE_YOUR_CALM)
        elif path == b"/ok/middle":
            server.http.send_headers(number, [(b":status", b"200")])
            server.http.reset_stream(number, ErrorCodes.INTERNAL_ERROR)
        await server.flush()

    async with between(serve) as world:
        seen = await world.program.get(asked("/ok/reset"))
        assert (seen.status, seen.reset) == (0, ErrorCodes.ENHANCE_YOUR_CALM)
        seen = await world.program.get(asked("/ok/middle"))
        assert (seen.ended, seen.reset) == (False, ErrorCodes.INTERNAL_ERROR)
        number = await world.program.ask(asked("/ok/never", "POST"), None)
        await world.program.send(number, b"x")
        await world.server.until(
            lambda: world.server.streams.get(5) is not None and world.server.streams[5].size == 1
        )
        world.program.http.reset_stream(number, ErrorCodes.CANCEL)
        await world.program.flush()
        await world.server.until(lambda: world.server.streams[5].reset is not None)
        assert world.server.streams[5].reset == ErrorCodes.CANCEL
        assert [(each.verdict, each.status) for each in world.told] == [
            ("failed", 0),
            ("failed", 200),
            ("failed", 0),
        ]
        assert "CANCEL" in world.told[-1].why


async def test_an_answer_before_the_request_has_ended() -> None:
    async def serve(server: Peer, number: int) -> None:
        await server.reply(number, [(":status", "413")], bytes(200_000))
        server.http.reset_stream(number, ErrorCodes.NO_ERROR)
        await server.flush()

    async with between(serve) as world:
        number = await world.program.ask(asked("/ok", "POST"), None)
        seen = world.program.streams[number]
        await world.program.until(lambda: seen.reset is not None)
        assert (seen.status, seen.size, seen.ended, seen.reset) == (413, 200_000, True, ErrorCodes.NO_ERROR)
        await settled()
        assert [(each.verdict, each.received) for each in world.told] == [("allowed", 200_000)]


@pytest.mark.parametrize("body", [b"abc", b"abcdefg"])
async def test_bodies_of_another_length_end_their_stream_alone(body: bytes) -> None:
    async def serve(server: Peer, number: int) -> None:
        if server.streams[number].headers[b":path"] == b"/ok/wrong":
            await server.reply(number, [(":status", "200"), ("content-length", "5")], body)
        else:
            await echo(server, number)

    async with between(serve) as world:
        waiting = await world.program.ask(asked("/ok", "POST"), None)
        assert (await world.program.get(asked("/ok/wrong"))).reset == ErrorCodes.INTERNAL_ERROR
        number = await world.program.ask(asked("/ok", "POST", content_length="5"), None)
        await world.program.send(number, body, last=True)
        assert (await world.program.answer(number)).reset == ErrorCodes.PROTOCOL_ERROR
        await world.program.send(waiting, b"x", last=True)
        assert (await world.program.answer(waiting)).status == 200
        await settled()
        assert [each.verdict for each in world.told] == ["failed", "failed", "allowed"]
        assert len(world.servers) == 1


async def test_a_body_that_is_not_as_long_as_it_was_to_be() -> None:
    async with between() as world:
        number = await world.program.ask(asked("/ok", "POST", content_length="5"), None)
        await world.program.send(number, b"abc")
        await settled()
        world.program.http.send_headers(number, [(b"x", b"1")], end_stream=True)  # which h2 does not look at
        await world.program.flush()
        assert (await world.program.answer(number)).reset == ErrorCodes.PROTOCOL_ERROR
        await settled()
        assert world.server.streams[1].reset is not None
        assert not world.server.streams[1].ended
        assert "has 3 bytes, and was to have 5" in world.told[0].why
        assert (await world.program.get(asked())).status == 200


async def test_a_server_that_ends_and_is_connected_to_again() -> None:
    async def serve(server: Peer, number: int) -> None:
        path = server.streams[number].headers[b":path"]
        if path == b"/ok/begin":
            server.http.send_headers(number, [(b":status", b"200")])
            await server.flush()
        if path != b"/ok":
            server.sock.shutdown(socket.SHUT_RDWR)
        else:
            await echo(server, number)

    async with between(serve) as world:
        seen = await world.program.get(asked("/ok/close"))
        assert (seen.status, "in the middle" in json.loads(seen.data)["detail"]) == (502, True)
        assert (await world.program.get(asked("/ok/begin"))).reset == ErrorCodes.INTERNAL_ERROR
        assert (await world.program.get(asked())).status == 200
        assert len(world.servers) == 3
        await settled()
        assert [each.verdict for each in world.told] == ["failed", "failed", "allowed"]


async def test_a_server_that_goes_away_while_nothing_is_asked_is_replaced() -> None:
    async with between() as world:
        assert (await world.program.get(asked())).status == 200
        world.server.http.close_connection()
        await world.server.flush()
        await settled()
        assert (await world.program.get(asked())).status == 200
        assert (len(world.servers), world.program.goaway) == (2, None)


async def test_a_server_that_goes_away_in_the_middle() -> None:
    async def serve(server: Peer, number: int) -> None:
        if number == 5:  # it has begun with the first two
            await server.raw(frame(GOAWAY, 0, 0, (3).to_bytes(4) + bytes(4)))
            await anyio.sleep(0.05)
            for each in (1, 3):
                await server.reply(each, [(":status", "200")], b"late")

    async with between(serve) as world:
        numbers = [await world.program.ask(asked()) for _ in range(3)]
        # h2 takes GOAWAY for the end of everything; this program reads its frames itself
        said: list[int] = []

        def on_going_away(frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
            said.append(frame.last_stream_id)
            return [], []

        world.program.http._frame_dispatch_table[GoAwayFrame] = on_going_away
        seen = [await world.program.answer(each) for each in numbers]
        assert [(each.status, each.reset) for each in seen] == [
            (200, None),
            (200, None),
            (0, ErrorCodes.REFUSED_STREAM),
        ]
        assert said == [5]
        assert (await world.program.get(asked())).reset == ErrorCodes.REFUSED_STREAM
        await settled()
        assert sorted(each.verdict for each in world.told) == ["allowed", "allowed", "failed", "failed"]


@pytest.mark.parametrize(
    "first", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", frame(PUSH), frame(GOAWAY, 0, 0, bytes(8))]
)
async def test_a_server_that_does_not_speak_it(first: bytes) -> None:
    ends: list[socket.socket] = []

    async def connect() -> Stream:
        ours, theirs = socket.socketpair()
        ends.extend((ours, theirs))
        ours.setblocking(False)
        theirs.send(first) if first else None
        theirs.shutdown(socket.SHUT_WR)
        return Plain(ours)

    async with between(connect=connect) as world:
        assert (await world.program.get(asked())).status == 502
        assert [each.verdict for each in world.told] == ["failed"]
    for end in ends:
        end.close()


async def test_a_call_that_ends_in_the_middle() -> None:
    serve = nothing

    async with between(serve) as world:
        for _ in range(3):
            await world.program.ask(asked())
        await world.program.ask(asked("/secret"))
        await settled()
        world.scope.cancel()
        await world.done.wait()
        told = sorted((each.verdict, each.why) for each in world.told)
        assert [verdict for verdict, _ in told] == ["denied", "failed", "failed", "failed"]
        assert told[-1][1] == "the call ended before the answer did"


async def test_a_program_that_ends_in_the_middle() -> None:
    serve = nothing

    async with between(serve) as world:
        await world.program.ask(asked())
        await settled()
        world.program.sock.shutdown(socket.SHUT_RDWR)
        await world.done.wait()
        assert isinstance(world.raised, OSError)
        assert [each.verdict for each in world.told] == ["failed"]
    async with between() as world:
        assert (await world.program.get(asked())).status == 200
        world.program.sock.shutdown(socket.SHUT_RDWR)
        await world.done.wait()
        assert world.raised is None
        assert [each.verdict for each in world.told] == ["allowed"]


# attacks


async def ended_with(world: Between, code: int) -> None:
    """The connection is ended, with that reason, and the program is told."""
    with pytest.raises(ConnectionError):
        await world.program.until(lambda: False)
    assert world.program.goaway == code
    await world.done.wait()
    assert isinstance(world.raised, Broken)


async def nothing(server: Peer, number: int) -> None:
    """A server that does not answer."""


async def flood(program: Peer, data: bytes, times: int) -> None:
    with suppress(OSError):
        for _ in range(times):
            await program.raw(data)
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    "each",
    [
        frame(PING, 0, 0, bytes(8)),
        frame(PING, 1, 0, bytes(8)),
        frame(SETTINGS),
        frame(SETTINGS, 0, 0, b"\0\1\0\0\x10\0"),
        frame(PRIORITY, 0, 1, bytes(3) + b"\5\0"),
        frame(0x77),
        frame(WINDOW, 0, 0, b"\0\0\0\1"),
        frame(DATA, 0, 1),
        frame(DATA, 8, 1, b"\3\0\0\0"),
    ],
    ids=["ping", "pong", "settings", "table", "priority", "unknown", "window", "empty", "padding"],
)
async def test_floods_of_frames_that_carry_nothing(each: bytes) -> None:
    async with between() as world:
        await world.program.ask(asked("/ok", "POST"), None)
        await flood(world.program, each * 1000, 100)
        await ended_with(world, ErrorCodes.ENHANCE_YOUR_CALM)
        assert [told.verdict for told in world.told] == ["failed"]


async def test_rapid_resets() -> None:
    serve = nothing

    async with between(serve) as world:
        program = world.program
        for _ in range(2000):
            try:
                number = await program.ask(asked())
                program.http.reset_stream(number, ErrorCodes.CANCEL)
                await program.flush()
            except (OSError, ProtocolError):  # it is ended
                break
            await anyio.lowlevel.checkpoint()
        await ended_with(world, ErrorCodes.ENHANCE_YOUR_CALM)
        assert {each.verdict for each in world.told} == {"failed"}
        assert sum(len(each.streams) for each in world.servers) <= 700


async def test_resets_that_the_program_provokes() -> None:
    async with between() as world:
        program = world.program
        for _ in range(2000):
            try:
                number = await program.ask(asked("/ok", "POST"), None)
                await program.raw(frame(WINDOW, 0, number, b"\x7f\xff\xff\xff"))
                await program.until(lambda number=number: program.streams[number].over)  # type: ignore[misc]
            except (OSError, ProtocolError):  # it is ended
                break
        assert program.goaway == ErrorCodes.ENHANCE_YOUR_CALM
        await world.done.wait()
        assert isinstance(world.raised, Broken)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1, b"") * 100, ErrorCodes.PROTOCOL_ERROR),
        (frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1, bytes(1 << 14)) * 100, ErrorCodes.PROTOCOL_ERROR),
        (frame(HEADERS, 4, 1, BOMB), ErrorCodes.ENHANCE_YOUR_CALM),
        (frame(HEADERS, 4, 1, b"\xff" * 100), ErrorCodes.PROTOCOL_ERROR),
        (frame(HEADERS, 4, 2, b"\x82\x84\x86"), ErrorCodes.PROTOCOL_ERROR),
        (frame(CONTINUATION, 4, 1, b""), ErrorCodes.PROTOCOL_ERROR),
        (frame(DATA, 0, 1, b"x"), ErrorCodes.PROTOCOL_ERROR),
        (frame(DATA, 0, 0, b"x"), ErrorCodes.PROTOCOL_ERROR),
        (b"\xff\xff\xff\0\0\0\0\0\1", ErrorCodes.FRAME_SIZE_ERROR),
        (b"\0\x40\1", ErrorCodes.FRAME_SIZE_ERROR),
        (frame(WINDOW, 0, 0, b"\x7f\xff\xff\xff"), ErrorCodes.FLOW_CONTROL_ERROR),
        (frame(SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"), ErrorCodes.FLOW_CONTROL_ERROR),
        (frame(SETTINGS, 0, 0, b"".join(UNKNOWN)), ErrorCodes.ENHANCE_YOUR_CALM),
        (b"".join(frame(SETTINGS, 0, 0, each) for each in UNKNOWN), ErrorCodes.ENHANCE_YOUR_CALM),
        (frame(PUSH, 4, 1, bytes(4) + b"\x82"), ErrorCodes.PROTOCOL_ERROR),
        (frame(PING, 0, 0, bytes(7)), ErrorCodes.FRAME_SIZE_ERROR),
    ],
)  # fmt: skip
async def test_what_ends_the_connection(data: bytes, code: int) -> None:
    async with between() as world:
        await world.program.raw(data)
        await ended_with(world, code)
        assert world.told == []


async def test_a_server_that_says_much_before_it_answers() -> None:
    async def serve(server: Peer, number: int) -> None:
        with suppress(OSError, ProtocolError):
            while True:
                server.http.send_headers(number, [(b":status", b"103"), (b"x", b"y" * 1000)])
                await server.flush()

    async with between(serve) as world:
        seen = await world.program.get(asked())
        assert (seen.status, len(seen.informational) < 10_000) == (502, True)
        with suppress(ConnectionError):
            await world.server.until(lambda: False)
        assert world.server.goaway == ErrorCodes.ENHANCE_YOUR_CALM
        assert [each.verdict for each in world.told] == ["failed"]


async def test_heads_that_nobody_reads_are_not_kept() -> None:
    async def serve(server: Peer, number: int) -> None:
        headers = [(f"x-{number}-{at}", "v" * 3000) for at in range(18)]
        await server.reply(number, [(":status", "200"), *headers], b"body")

    async with between(serve, listens=False) as world:
        numbers = [await world.program.ask(asked()) for _ in range(MAX_STREAMS)]
        while world.http._client.http.unwritten <= BACKLOG:  # noqa: ASYNC110  (nothing says so)
            await anyio.sleep(0.01)
        await settled()
        assert BACKLOG < world.http._client.http.unwritten < BACKLOG + (1 << 18)
        world.tasks.start_soon(world.program.run, world.tasks)
        for each in numbers:
            seen = await world.program.answer(each)
            assert (seen.status, len(seen.listed), bytes(seen.data)) == (200, 19, b"body")


async def test_what_is_no_http2() -> None:
    async with between(listens=False) as world:
        world.program.http.data_to_send()
        await world.program.raw(b"GET / HTTP/1.1\r\nhost: api.test\r\n\r\n" * 2)
        await world.done.wait()
        assert isinstance(world.raised, Broken)


async def test_more_streams_than_there_may_be() -> None:
    serve = nothing

    async with between(serve) as world:
        block = Encoder().encode(asked())
        await world.program.flush()
        await world.program.raw(b"".join(frame(HEADERS, 5, 2 * at + 1, block) for at in range(5000)))
        with pytest.raises(ConnectionError):
            await world.program.until(lambda: False)
        await world.done.wait()
        assert isinstance(world.raised, Broken)
        assert len(world.told) <= MAX_STREAMS


async def test_a_program_that_reads_nothing_is_sent_no_more_than_its_windows() -> None:
    sent = 0

    async def serve(server: Peer, number: int) -> None:
        nonlocal sent
        server.http.send_headers(number, [(b":status", b"200")])
        await server.flush()
        with suppress(ProtocolError):  # it is given up in the end
            while True:
                await server.send(number, bytes(16384))
                sent += 16384

    async with between(serve) as world:
        world.program.acknowledges = False
        numbers = [await world.program.ask(asked()) for _ in range(20)]
        seen = world.program.streams
        await world.program.until(lambda: sum(each.size for each in seen.values()) == 65535)
        await settled()
        assert sent <= CONNECTION_WINDOW + 65535 + 20 * 16384
        held = sum(len(pair.back.data) for pair in world.http._requests.pairs.values())
        assert CONNECTION_WINDOW // 2 < held <= CONNECTION_WINDOW
        assert max(len(pair.back.data) for pair in world.http._requests.pairs.values()) <= STREAM_WINDOW
        for each in numbers:  # what is given up is given back
            world.program.http.reset_stream(each)
        await world.program.flush()
        await settled()
        assert world.http._requests.pairs == {}
        assert [each.verdict for each in world.told] == ["failed"] * 20


async def test_a_server_that_reads_nothing_is_sent_no_more_than_its_windows() -> None:
    async def serve(server: Peer, number: int) -> None:
        if server.streams[number].headers[b":path"] == b"/ok/read":
            await echo(server, number)

    async with between(serve) as world:
        number = await world.program.ask(asked("/ok", "POST"), None)
        await world.program.until(lambda: bool(world.servers))
        world.server.acknowledges = False
        world.tasks.start_soon(swallow, world.program, number)
        await settled(turns=2000)
        [pair] = world.http._requests.pairs.values()
        assert 0 < len(pair.out.data) <= STREAM_WINDOW


async def swallow(program: Peer, number: int) -> None:
    try:
        await program.send(number, bytes(10 << 20))
    except ConnectionError:
        return


async def test_a_stream_that_nobody_reads_holds_up_no_other() -> None:
    async def serve(server: Peer, number: int) -> None:
        server.http.send_headers(number, [(b":status", b"200")])
        await server.flush()
        await server.send(number, bytes(1 << 20), last=True)

    async with between(serve) as world:
        world.program.http.increment_flow_control_window(8 << 20)
        stalled = await world.program.ask(asked("/ok/stalled"))
        seen = world.program.streams[stalled]
        world.program.acknowledges = False
        await world.program.until(lambda: seen.size == 65535)
        world.program.acknowledges = True
        for _ in range(3):
            assert (await world.program.get(asked())).size == 1 << 20
        assert seen.size == 65535
        world.program.http.increment_flow_control_window(2 << 20, stalled)
        await world.program.flush()
        assert (await world.program.answer(stalled)).size == 1 << 20


async def test_bytes_of_one_each_cost_what_they_are() -> None:
    serve = nothing

    async with between(serve, settings={SettingCodes.INITIAL_WINDOW_SIZE: 0}) as world:
        number = await world.program.ask(asked("/ok", "POST"), None)
        for _ in range(50):
            await world.program.raw(frame(DATA, 8, number, b"\x01a\0") * 1000)
            await anyio.lowlevel.checkpoint()
        await settled(turns=2000)
        [pair] = world.http._requests.pairs.values()
        assert len(pair.out.data) == 50_000


async def test_a_table_of_any_size_is_not_filled() -> None:
    async def serve(server: Peer, number: int) -> None:
        headers = [(f"x-{number}-{at}", "v" * 100) for at in range(100)]
        await server.reply(number, [(":status", "200"), *headers])

    async with between(serve) as world:
        assert (await world.program.get(asked())).status == 200
        world.program.http.update_settings({SettingCodes.HEADER_TABLE_SIZE: 1 << 30})
        for _ in range(20):
            assert (await world.program.get(asked())).status == 200
        assert world.http._client.http.encoder.header_table._current_size <= 4096


async def test_a_reset_that_crosses_the_end_ends_nothing() -> None:
    async with between() as world:
        for _ in range(3):
            number = await world.program.ask(asked())
            await world.program.answer(number)
            await world.program.get(asked())
            await world.program.raw(frame(RST, 0, number, b"\0\0\0\x08"))
        assert (await world.program.get(asked())).status == 200


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 255), st.integers(0, 9), st.binary(max_size=40)),
        max_size=25,
    ),
    st.booleans(),
)
def test_anything_is_served_or_ended(frames: list[tuple[int, int, int, bytes]], to_program: bool) -> None:  # noqa: FBT001
    data = b"".join(frame(*each) for each in frames)

    async def serve(server: Peer, number: int) -> None:
        if to_program:
            await server.raw(data)
        else:
            await echo(server, number)

    async def go() -> None:
        async with between(serve) as world:
            await world.program.ask(asked("/ok", "POST"), None)
            await world.program.ask(asked())
            await settled(turns=30)
            if not to_program:
                with suppress(OSError):
                    await world.program.raw(data)
            await settled(turns=30)
            count = len(world.http._requests.pairs)
            world.program.sock.shutdown(socket.SHUT_WR)
            await world.done.wait()
            assert world.raised is None or isinstance(world.raised, OSError)
            assert len(world.told) >= count
            assert {each.verdict for each in world.told} <= {"allowed", "failed", "denied"}

    anyio.run(go)
