"""What a program wrote before its call ended arrives, within a bound; what it never got is not waited for."""

from __future__ import annotations

import socketserver
import time
from typing import TYPE_CHECKING

import pytest
from daemons import until
from networked import add_policy
from world import WWW

if TYPE_CHECKING:
    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation

POLICY = """\
version: 1
name: last
extends: python
warm: !remove
limits: {wall: 20s}
network: {allow: [{host: echo.example.test, ports: [5140, 5141, 5142, 5143]}]}
"""
heard: list[bytes] = []


class Slow(socketserver.BaseRequestHandler):
    """Reads late."""

    greeting = b""

    def handle(self) -> None:
        """One connection."""
        data = b""
        try:
            self.request.sendall(self.greeting)
            time.sleep(0.2)
            while read := self.request.recv(65536):
                data += read
            data += b" END"
        except OSError as error:
            data += f" {type(error).__name__}".encode()
        heard.append(data)


class Polite(Slow):
    """Says something first."""

    greeting = b"welcome" * 1000


class Deaf(socketserver.BaseRequestHandler):
    """Reads nothing for long."""

    def handle(self) -> None:
        """One connection."""
        time.sleep(4)


class Silent(socketserver.BaseRequestHandler):
    """Takes the connection, reads all, and never ends it."""

    def handle(self) -> None:
        """One connection."""
        while self.request.recv(65536):
            pass
        time.sleep(4)


@pytest.fixture(scope="module")
def last(networked: Daemon, world: World) -> Daemon:
    """The daemon with the policy, in a world with those servers."""
    for port, handler in ((5140, Slow), (5141, Deaf), (5142, Silent), (5143, Polite)):
        world.serve(WWW, port, handler)
    add_policy(networked, "last", POLICY)
    return networked


def run(daemon: Daemon, code: str) -> tuple[Invocation, float]:
    """A call, and how long it took."""
    begun = time.monotonic()
    call = daemon.run("python3", "-c", "import os, socket, time\n" + code, policy="last")
    return call, time.monotonic() - begun


@pytest.mark.parametrize(
    ("size", "end"),
    [
        (10, "os._exit(0)"),
        (10, "s.close()"),
        (200_000, "os._exit(0)"),
        (200_000, "os.kill(os.getpid(), 9)"),
        (3_000_000, "s.shutdown(socket.SHUT_WR); os._exit(0)"),
    ],
)
def test_what_was_written_arrives(last: Daemon, size: int, end: str) -> None:
    heard.clear()
    code = f"s = socket.create_connection(('echo.example.test', 5140))\ns.sendall(b'x' * {size})\n{end}"
    call, _ = run(last, code)
    until(lambda: heard, "the server has heard")
    assert heard == [b"x" * size + b" END"]
    assert call.usage is not None
    assert call.usage.network_out == size
    (event,) = [one.network for one in last.client().events(call.id) if one.network is not None]
    assert (event.verdict, event.bytes_out) == ("allowed", size)


@pytest.mark.parametrize("read", ["", "while got < 7000: got += len(s.recv(65536))"])
def test_also_where_the_server_speaks_first(last: Daemon, read: str) -> None:
    """Who ends without reading what came resets the connection, as it would without us in between."""
    heard.clear()
    code = f"""
s = socket.create_connection(('echo.example.test', 5143))
got = 0
{read}
s.sendall(b'x' * 1000)
time.sleep(0.1)
os._exit(0)
"""
    run(last, code)
    until(lambda: heard, "the server has heard")
    assert heard == [b"x" * 1000 + (b" END" if read else b" ConnectionResetError")]


def test_of_many_connections_all_arrive(last: Daemon) -> None:
    heard.clear()
    code = """
for number in range(100):
    s = socket.create_connection(('echo.example.test', 5140))
    s.sendall(b'%d' % number)
    globals()[f's{number}'] = s
os._exit(0)
"""
    call, _ = run(last, code)
    until(lambda: len(heard) == 100, "all were heard")
    assert sorted(heard) == sorted(b"%d END" % each for each in range(100))
    assert call.usage is not None
    assert call.usage.connections == 100


def test_a_server_that_does_not_read_is_waited_for_no_longer_than_said(last: Daemon) -> None:
    code = """
s = socket.create_connection(('echo.example.test', 5141)); s.setblocking(False)
try:
    while True: s.send(b'x' * 65536)
except BlockingIOError: pass
time.sleep(0.3)
try:
    while True: s.send(b'x' * 65536)
except BlockingIOError: pass
os._exit(0)
"""
    call, _ = run(last, code)
    assert call.outcome is not None
    assert call.outcome.exit_code == 0
    (event,) = [one.network for one in last.client().events(call.id) if one.network is not None]
    assert event.why == "the call ended before the connection did"
    assert call.times.ended is not None
    assert call.times.started is not None
    assert call.usage is not None
    waited = call.times.ended - call.times.started - call.usage.wall
    assert 900_000 < waited < 4_000_000


def test_a_server_that_says_nothing_is_not_waited_for(last: Daemon) -> None:
    code = """
s = socket.create_connection(('echo.example.test', 5142))
s.sendall(b'x')
time.sleep(0.3)
os._exit(0)
"""
    call, _ = run(last, code)
    (event,) = [one.network for one in last.client().events(call.id) if one.network is not None]
    assert (event.verdict, event.why, event.bytes_out) == ("allowed", "", 1)
    assert call.times.ended is not None
    assert call.times.started is not None
    assert call.usage is not None
    assert call.times.ended - call.times.started - call.usage.wall < 900_000
