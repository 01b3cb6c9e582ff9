"""Connections that are bytes both ways: by the clients, by an upgrade, and by ``sandboxd forward``."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import socket
import stat
import threading
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import until
from networked import workers
from ported import SERVER, ended, forwarding, inward, raw, rest

from sandboxd import AsyncClient, errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

ECHO = SERVER + "def serve(c):\n while data := c.recv(1 << 20): c.sendall(data)\nmain()"
# Says how much it got when the other side has ended its part, and says so in a stream that is still open.
COUNT = SERVER + (
    "def serve(c):\n n = 0\n while data := c.recv(1 << 20): n += len(data)\n c.sendall(b'got %d' % n)\nmain()"
)


def test_a_socket_of_the_client_reaches_the_server(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(ECHO)
    with exposing.client().connect(call, 8080) as sock:
        for piece in (b"\0\xff", b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000)):
            sock.sendall(piece)
            got = b""
            while len(got) < len(piece):
                got += sock.recv(65536)
            assert got == piece
    ended(exposing, call)
    (event,) = inward(exposing, call)
    assert (event.verdict, event.bytes_in, event.bytes_out) == ("allowed", 100_020, 100_020)


def test_each_side_ends_its_own(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(COUNT)
    with exposing.client().connect(call, 8080) as sock:
        sock.sendall(b"x" * 3_000_000)
        sock.shutdown(socket.SHUT_WR)
        assert rest(sock) == b"got 3000000"
    call = serving(
        SERVER + "def serve(c):\n c.sendall(b'first'); c.shutdown(1)\n print(c.recv(9), flush=True)\nmain()"
    )
    with exposing.client().connect(call, 8080) as sock:
        assert rest(sock) == b"first"
        sock.sendall(b"then")
        until(
            lambda: b"then" in b"".join(exposing.client().stdout(call)), "it gets what is said after its end"
        )


def test_what_a_caller_said_before_it_left_arrives(exposing: Daemon, serving: Callable[..., str]) -> None:
    code = SERVER + (
        "def serve(c):\n time.sleep(1); n = 0\n while data := c.recv(1 << 16): n += len(data)\n"
        " print('got', n, flush=True)\nmain()"
    )
    call = serving(code)
    with exposing.client().connect(call, 8080) as sock:
        sock.sendall(b"x" * 5_000_000)
    until(lambda: b"got 5000000" in b"".join(exposing.client().stdout(call)), "all of it arrives", seconds=30)


def test_a_caller_that_left_holds_nothing(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(SERVER + "def serve(c):\n time.sleep(100)\nmain()")
    exposing.client().connect(call, 8080).close()
    until(lambda: inward(exposing, call), "its end is told", seconds=10)


def test_a_call_that_ends_cuts_them(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(ECHO)
    with exposing.client().connect(call, 8080) as sock:
        sock.sendall(b"there")
        assert sock.recv(10) == b"there"
        begun = time.monotonic()
        ended(exposing, call)
        assert rest(sock) == b""
        assert time.monotonic() - begun < 5
    assert len(inward(exposing, call)) == 1


def test_both_ways_at_once(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(ECHO)
    data = os.urandom(1 << 20) * 64
    got = hashlib.sha256()
    with exposing.client().connect(call, 8080) as sock:

        def send() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while part := sock.recv(1 << 20):
            got.update(part)
        sender.join()
    assert got.digest() == hashlib.sha256(data).digest()
    (worker,) = workers(exposing)
    assert worker.memory_info().rss < 150 << 20


async def test_the_asynchronous_client_has_a_stream(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(COUNT)
    client = AsyncClient(exposing.socket)
    assert await client.ports(call) == [8080, 8081, 40000]
    async with await client.connect(call, 8080) as stream:
        await stream.send(b"x" * 1000)
        await stream.send_eof()
        assert await stream.receive() == b"got 1000"
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
    with pytest.raises(errors.PortNotExposed):
        await client.connect(call, 9)
    with pytest.raises(errors.PortNotAnswering):
        await client.connect(call, 8081)


@pytest.mark.parametrize(
    "headers",
    [b"", b"Upgrade: tcp\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
     b"Upgrade: tcp\r\nUpgrade: tcp\r\nConnection: Upgrade\r\n"],
)  # fmt: skip
def test_a_tunnel_is_asked_for_by_its_name(
    exposing: Daemon, serving: Callable[..., str], headers: bytes
) -> None:
    call = serving(ECHO)
    with raw(exposing) as sock:
        target = f"/v1/invocations/{call}/ports/8080".encode()
        sock.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Upgrade: tcp" in answer


WEBSOCKET = (
    SERVER
    + """
import base64, hashlib, struct
def exactly(c, n, got=b''):
    while len(got) < n: got += c.recv(n - len(got))
    return got
def serve(c):
    asked = head(c).decode()
    fields = dict(line.lower().split(': ', 1) for line in asked.split('\\r\\n')[1:] if ': ' in line)
    lines = asked.split('\\r\\n')
    original = next(line.split(': ')[1] for line in lines if line.lower().startswith('sec-websocket-key'))
    assert fields['upgrade'] == 'websocket' and 'upgrade' in fields['connection'], asked
    proof = hashlib.sha1((original + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11').encode()).digest()
    accept = base64.b64encode(proof).decode()
    c.sendall(('HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n'
               'Keep-Alive: x\\r\\nSec-WebSocket-Accept: %s\\r\\n\\r\\n' % accept).encode()
              + b'\\x81\\x05hello')
    while True:
        first, length = exactly(c, 2)
        mask = exactly(c, 4); data = exactly(c, length & 127)
        data = bytes(b ^ mask[i % 4] for i, b in enumerate(data))
        if first & 15 == 8: c.sendall(b'\\x88\\x00'); return
        c.sendall(bytes([0x80 | first & 15, len(data)]) + data[::-1])
main()
"""
)


def test_a_websocket(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(WEBSOCKET)
    key = base64.b64encode(os.urandom(16))
    with raw(exposing) as sock:
        target = f"/v1/invocations/{call}/ports/8080/chat".encode()
        sock.sendall(
            b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n"
            b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n"
        )  # fmt: skip
        got = b""
        while not got.endswith(b"hello"):
            got += sock.recv(65536)
        head = got.partition(b"\r\n\r\n")[0].lower()
        assert head.startswith(b"http/1.1 101 ")
        assert b"keep-alive" not in head
        proof = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        assert b"sec-websocket-accept: " + base64.b64encode(proof).lower() in head
        sock.sendall(b"\x81\x83\0\0\0\0abc")
        assert sock.recv(100) == b"\x81\x03cba"
        sock.sendall(b"\x88\x80\0\0\0\0")
        assert rest(sock) == b"\x88\x00"
    until(lambda: inward(exposing, call), "its end is told")
    assert inward(exposing, call)[0].verdict == "allowed"


def test_a_server_that_upgrades_unasked_is_refused(exposing: Daemon, serving: Callable[..., str]) -> None:
    """Also to another protocol than was asked for: the caller would take its bytes for answers."""
    code = SERVER + (
        "def serve(c):\n head(c)\n"
        " c.sendall(b'HTTP/1.1 101 X\\r\\nUpgrade: other\\r\\nConnection: Upgrade\\r\\n\\r\\n"
        "HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\nforged')\nmain()"
    )
    call = serving(code)
    target = f"/v1/invocations/{call}/ports/8080/".encode()
    for headers in (b"", b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Upgrade: other\r\n"):
        with raw(exposing) as sock:
            sock.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
            answer = rest(sock)
        assert answer.startswith(b"HTTP/1.1 502 "), headers
        assert b"forged" not in answer


def test_forward_listens_on_this_host(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(COUNT)
    with forwarding(exposing, call, "8080") as (process, address):
        host, _, port = address.rpartition(":")
        assert host == "127.0.0.1"
        for size in (0, 1, 2_000_000):
            with socket.create_connection((host, int(port)), timeout=30) as sock:
                sock.sendall(b"x" * size)
                sock.shutdown(socket.SHUT_WR)
                assert rest(sock) == b"got %d" % size
        ended(exposing, call)
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None
        assert b"the call has ended" in process.stderr.read()


def test_forward_to_a_socket_that_is_the_users_own(
    exposing: Daemon, serving: Callable[..., str], tmp_path: Path
) -> None:
    call = serving(COUNT)
    path = tmp_path / "port"
    with forwarding(exposing, call[-8:], "8080", "--listen", f"unix:{path}") as (process, address):
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(path))
            sock.sendall(b"abc")
            sock.shutdown(socket.SHUT_WR)
            assert rest(sock) == b"got 3"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("8082",), b"`expose` of the policy has 8080, 8081, 40000"),
        (("0",), b"0 is not the number of a port"),
        (("8080", "--listen", "nowhere"), b"neither HOST:PORT nor unix:PATH"),
        (("8080", "--listen", "127.0.0.1:99999"), b"neither HOST:PORT nor unix:PATH"),
        (("8080", "--listen", "unix:/etc/passwd"), b"is there already, and no socket"),
        (("8080", "--listen", "unix:/nowhere/x"), b"No such file or directory"),
    ],
)
def test_forward_says_what_is_wrong(
    exposing: Daemon, serving: Callable[..., str], arguments: tuple[str, ...], says: bytes
) -> None:
    call = serving(ECHO)
    with forwarding(exposing, call, *arguments) as (process, address):
        assert process.wait(timeout=30) == 1
        assert address == ""
        assert process.stderr is not None
        assert says in process.stderr.read()


def test_forward_while_nobody_answers(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(ECHO)
    with forwarding(exposing, call, "8081") as (process, address):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as sock:
            assert rest(sock) == b""
        assert process.poll() is None
        ended(exposing, call)
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None
        assert b"nobody in the container takes a connection to port 8081" in process.stderr.read()
