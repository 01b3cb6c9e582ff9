"""Servers in the containers of calls, and how they are reached from outside."""

from __future__ import annotations

import contextlib
import http.client
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd.models import Event, Invocation, NetworkEvent

POLICY = """\
version: 1
name: exposing
extends: python
warm: !remove
limits: {wall: 60s, pids: 1k}
expose: [8080, 8081, 40000]
"""
# Listens on 8080, and gives each connection to `serve`, in a thread of its own.
SERVER = """
import os, socket, sys, threading, time
def head(c):
    data = b''
    while b'\\r\\n\\r\\n' not in data:
        more = c.recv(65536)
        if not more: break
        data += more
    return data
def handle(c):
    with c: serve(c)
def main(family=socket.AF_INET, host='127.0.0.1', port=8080):
    s = socket.socket(family)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((host, port)); s.listen(512)
    print('ready', flush=True)
    while True:
        threading.Thread(target=handle, args=(s.accept()[0],), daemon=True).start()
"""


class ApiConnection(http.client.HTTPConnection):
    """http.client over the daemon's socket."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__("sandboxd", timeout=30)
        self.daemon = daemon

    def connect(self) -> None:
        """Connect to the daemon's socket."""
        self.sock = raw(self.daemon)


def raw(daemon: Daemon) -> socket.socket:
    """A connection to the daemon's socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(daemon.socket))
    return sock


def ask(
    daemon: Daemon, call: str, path: str = "/", *, port: int = 8080, method: str = "GET", **options: object
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request to a server inside: the response and its body."""
    with contextlib.closing(ApiConnection(daemon)) as connection:
        connection.request(method, f"/v1/invocations/{call}/ports/{port}{path}", **options)  # type: ignore[arg-type]
        response = connection.getresponse()
        return response, response.read()


def say(daemon: Daemon, call: str, request: bytes, *, path: bytes = b"/", port: int = 8080) -> bytes:
    """All that comes back on the connection of a request; ``%b`` in it stands for its target."""
    with raw(daemon) as sock:
        sock.sendall(
            request.replace(b"%b", b"/v1/invocations/%b/ports/%d%b" % (call.encode(), port, path), 1)
        )
        return rest(sock)


def rest(sock: socket.socket) -> bytes:
    """What comes until the end."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def inward(daemon: Daemon, call: str) -> list[NetworkEvent]:
    """The connections of a call to its ports, as its events tell of them."""
    events: list[Event] = list(daemon.client().events(call, follow=False))
    return [one.network for one in events if one.network is not None and one.network.direction == "in"]


def ended(daemon: Daemon, call: str) -> Invocation:
    """A call once it was cancelled."""
    daemon.client().cancel(call)
    return daemon.client().wait(call, timeout=30)
