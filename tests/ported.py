"""Servers in the containers of calls, and how they are reached from outside."""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import os
import socket
import subprocess
from typing import TYPE_CHECKING

from daemons import SANDBOXD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
LASTING = "version: 1\nname: lasting\nextends: exposing\nisolation: session\n"
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

OWNER, OTHER = 54_331, 54_332
HELLO = SERVER + (
    "def serve(c):\n head(c); c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello')\n"
)
ECHO = SERVER + ("def serve(c):\n while data := c.recv(65536): c.sendall(data)\n")
CALLERS = f"""\
callers:
  - {{match: {{uid: 0}}, role: operator}}
  - {{match: {{uid: {OWNER}}}, role: agent, policies: ["*"]}}
  - {{match: {{uid: {OTHER}}}, role: agent, policies: ["*"]}}
"""


def become(uid: int) -> None:
    """Be this user for good, and of no group but its own."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def found_as(
    uid: int,
    daemon: Daemon,
    named: str | None,
    program: Callable[[int, str, str | None, multiprocessing.Queue[object]], None],
) -> object:
    """What a program finds that is run by another user, who is given what is to be reached."""
    queue: multiprocessing.Queue[object] = multiprocessing.Queue()
    process = multiprocessing.Process(target=program, args=(uid, str(daemon.socket), named, queue))
    process.start()
    found = queue.get(timeout=60)
    process.join()
    queue.close()
    return found


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


@contextlib.contextmanager
def forwarding(daemon: Daemon, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``sandboxd forward``, and the address that it prints."""
    process = subprocess.Popen(
        ["env", "--default-signal=INT", SANDBOXD, "forward", *arguments, "--socket", daemon.socket],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.communicate()
