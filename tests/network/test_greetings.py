"""TLS as it begins, between real ends, through the process that serves a container; and what pretends to."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from gateways import read, serving
from world import WWW

from sandboxd.httprule import HttpRule
from sandboxd.reach import Allow, NetworkRules

if TYPE_CHECKING:
    from world import World

pytestmark = pytest.mark.anyio

NAME = "www.example.test"
RETRIES, HTTP = 4443, 80
RULES = NetworkRules(
    (
        Allow(NAME, (443, RETRIES), "p.yaml:1"),
        Allow(NAME, (HTTP,), "p.yaml:2", HttpRule(methods=("GET",))),
    ),
    (),
)
Pieces = Callable[[bytes, int], list[bytes]]
CCS = b"\x14\3\3\0\1\1"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def hosts(world: World) -> World:
    """With a server that asks every client for other keys first (HelloRetryRequest)."""
    context = world._context(NAME)
    context.set_ecdh_curve("prime256v1")  # clients begin with X25519
    original = world._context
    world._context = lambda name: context  # type: ignore[method-assign]
    world.serve(WWW, RETRIES, tls=NAME)
    world._context = original  # type: ignore[method-assign]
    return world


class Client:
    """TLS of a program's, whose bytes are sent as ``pieces`` has them."""

    def __init__(self, name: str = NAME) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.come, self.go = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.come, self.go, server_hostname=name)
        self.flights = 0

    def run(self, sock: socket.socket, pieces: Pieces) -> bytes:
        """A page, over it. Raises OSError."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._until(sock, pieces, self.tls.do_handshake)
        self.tls.write(b"GET /over-tls HTTP/1.1\r\nHost: www.example.test\r\n\r\n")
        data = b""
        while b"/over-tls\n" not in data:
            data += self._until(sock, pieces, lambda: self.tls.read(65536))
        return data

    def _until(self, sock: socket.socket, pieces: Pieces, step: Callable[[], bytes | None]) -> bytes:
        while True:
            try:
                done = step() or b""
            except ssl.SSLWantReadError:
                self._send(sock, pieces)
                if not (data := sock.recv(65536)):
                    raise ConnectionResetError("the end") from None
                self.come.write(data)
            else:
                self._send(sock, pieces)
                return done

    def _send(self, sock: socket.socket, pieces: Pieces) -> None:
        if self.go.pending:
            for piece in pieces(self.go.read(), self.flights):
                sock.sendall(piece)
            self.flights += 1


def whole(data: bytes, flight: int) -> list[bytes]:
    del flight
    return [data]


def bytewise(data: bytes, flight: int) -> list[bytes]:
    """The ClientHello in records of one byte, each byte of them in a segment of its own."""
    if flight:
        return [data]
    body = data[5:]
    records = b"".join(data[:3] + b"\0\1" + bytes((byte,)) for byte in body)
    return [bytes((byte,)) for byte in records]


@pytest.mark.parametrize("port", [443, RETRIES])
@pytest.mark.parametrize("pieces", [whole, bytewise])
async def test_however_it_is_cut_and_whatever_keys_are_asked_for(
    hosts: World, port: int, pieces: Pieces
) -> None:
    del hosts
    async with serving(RULES) as served:
        client = Client()
        with await served.connect(NAME, port) as sock:
            page = await anyio.to_thread.run_sync(client.run, sock, pieces)
            assert b"200 OK" in page
        assert client.flights >= (4 if port == RETRIES else 3)  # it was asked again
        use = await served.end()
        assert [event.verdict for event in served.events] == ["allowed"]
        assert use.refusals == []


def hello_of(name: str) -> bytes:
    """A ClientHello."""
    client = Client(name)
    with pytest.raises(ssl.SSLWantReadError):
        client.tls.do_handshake()
    return client.go.read()


@pytest.mark.parametrize("before", [b"", CCS])
@pytest.mark.parametrize("at_once", [False, True])
async def test_a_second_hello_of_another_name_is_refused(
    hosts: World, before: bytes, *, at_once: bool
) -> None:
    del hosts
    hidden = before + hello_of("hidden.example.test")
    async with serving(RULES) as served:
        with await served.connect(NAME, RETRIES) as sock:
            sock.sendall(hello_of(NAME) + (hidden if at_once else b""))
            if not at_once:
                assert (await read(sock, b"\x16"))[:1] == b"\x16"  # asked for other keys
                sock.sendall(hidden)
            with suppress(ConnectionResetError):  # after an alert, where that was not overtaken
                await read(sock, b"\0never\0")
        [event] = await served.told(1)
        assert event.verdict == "denied"
        assert event.why.startswith("a second ClientHello names hidden.example.test")
        assert event.bytes_out < 600  # the first alone


@pytest.mark.parametrize(
    "begins",
    [
        b"PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\nGET /proxied HTTP/1.1\r\nHost: www.example.test\r\n\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\0\0\1\x0a\0\0\2\0\1\0\x50GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nGET /proxied HTTP/1.1\r\nHost: www.example.test\r\n\r\n",
        b"\x05\x01\x00\x05\x01\x00\x03\x10www.example.test\0\x50",  # SOCKS 5
        b"\x04\x01\0\x50\0\0\0\1\0www.example.test\0",  # SOCKS 4a
        b"GET  /proxied HTTP/1.1\r\nHost: www.example.test\r\n\r\n",
    ],
)
async def test_what_a_balancer_would_take_for_another_connection_goes_nowhere_where_rules_look(
    hosts: World, begins: bytes
) -> None:
    before = list(hosts.reached)
    async with serving(RULES) as served:
        with await served.connect(NAME, HTTP) as sock:
            sock.sendall(begins)
            try:
                said = await read(sock, b"\0never\0")
            except ConnectionResetError:
                said = b""
            assert b"200" not in said
        await served.end()
        assert hosts.reached == before


HALVES = [b"", b"\x16\3\1\2\0\1", b"\x16", b"\x16\3\1\0\5\1\0\1\0\0"]


async def test_a_flood_of_halves_holds_up_nobody_and_has_an_end(hosts: World) -> None:
    del hosts
    async with serving(RULES, beside=1) as (flooding, other):
        socks = [await flooding.connect(NAME, 443)]
        address = socks[0].getpeername()
        try:

            def flood() -> None:
                for number in range(800):
                    sock = flooding.sock()
                    socks.append(sock)
                    sock.connect(address)
                    sock.sendall(HALVES[number % len(HALVES)])

            await anyio.to_thread.run_sync(flood)
            for _ in range(20):  # meanwhile the others of the caller, by the same process
                with await other.connect(NAME, HTTP) as sock, anyio.fail_after(5):
                    sock.sendall(b"GET /other HTTP/1.1\r\nHost: www.example.test\r\n\r\n")
                    assert b"200 OK" in await read(sock, b"/other\n")
            assert flooding.process == other.process
            halves = [sock for number, sock in enumerate(socks[1:]) if HALVES[number % len(HALVES)]]
            reset = 0
            for sock in halves:
                try:
                    said = await anyio.to_thread.run_sync(sock.recv, 100)
                    assert said[:2] == b"\x15\3"  # an alert, in time
                except ConnectionResetError:
                    reset += 1
            with anyio.fail_after(5):
                use = await flooding.end()
            assert use.connections == 801
            # one event of each; and of each half that was told so in time, that it was: on a busy host the
            # connection to the server is given up first for some
            assert len(flooding.events) == 801
            late = [event for event in flooding.events if "ClientHello did not" in event.why]
            assert 0 < len(halves) - reset <= len(late) <= len(halves)
            assert {event.verdict for event in late} == {"denied"}
            with await other.connect(NAME, HTTP) as sock:
                sock.sendall(b"GET /after HTTP/1.1\r\nHost: www.example.test\r\n\r\n")
                assert b"200 OK" in await read(sock, b"/after\n")
        finally:
            for sock in socks:
                sock.close()
