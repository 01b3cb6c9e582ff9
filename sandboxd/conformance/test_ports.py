"""Ports that a policy exposes: the caller reaches a server inside, and nothing else is reached by it."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import errors
from sandboxd.conformance.case import controls, text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Invocation

SERVER = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET)
s.bind((sys.argv[1], 8080)); s.listen()
print('ready', flush=True)
while True:
    c, _ = s.accept()
    said = c.recv(65536)
    if said.startswith(b'GET '):
        c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: keep-alive\\r\\n\\r\\nok' * 2)
    else:
        while said: c.sendall(said); said = c.recv(65536)
    c.close()
"""


@contextlib.contextmanager
def serving(
    subject: Subject, host: str = "127.0.0.1", policy: str = "exposed", **fields: Any
) -> Iterator[Invocation]:
    """A call with a server in it, until it is cancelled."""
    call = subject.start("python3", "-c", SERVER, host, policy=policy, **fields)
    try:
        subject.until(
            lambda: b"".join(subject.client.stdout(call.id)) == b"ready\n", "the server listens", 20
        )
        yield call
    finally:
        subject.client.cancel(call.id)


def ask(subject: Subject, call: Invocation, rest: str) -> bytes:
    """All that comes back on the connection of a request for a path below that of the call."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(subject.seconds(20))
        sock.connect(str(subject.socket))
        sock.sendall(f"GET /v1/invocations/{call.id}/{rest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize("policy", ["exposed", "exposed-network"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])  # noqa: S104  (inside a container)
def test_a_server_inside_is_reached(subject: Subject, host: str, policy: str) -> None:
    with serving(subject, host, policy) as call:
        answer = ask(subject, call, "ports/8080/path?query")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1, "an answer that nobody asked for was passed on"
        assert b"connection: close" in answer.lower()
        assert answer.endswith(b"ok")
        with subject.client.connect(call.id, 8080) as sock:
            sock.sendall(b"\0said")
            assert sock.recv(10) == b"\0said"
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(10) == b""
    done = subject.wait(call)
    assert done.denials == []
    found = [event.network for event in subject.client.events(call.id) if event.network is not None]
    assert [(one.direction, one.verdict, one.port) for one in found] == [("in", "allowed", 8080)] * 2


def test_a_session_leads_to_what_runs_in_it(subject: Subject) -> None:
    session = subject.client.create_session()
    try:
        for host in ("127.0.0.1", "::1"):
            with (
                serving(subject, host, session=session.id),
                subject.client.connect_session(session.id, 8080) as sock,
            ):
                sock.sendall(b"\0said")
                assert sock.recv(10) == b"\0said"
            with pytest.raises(errors.SessionIdle):
                subject.client.connect_session(session.id, 8080)
    finally:
        subject.client.delete_session(session.id)


def test_nothing_else_is(subject: Subject) -> None:
    with serving(subject) as call:
        with pytest.raises(errors.PortNotExposed, match="8080, 8081"):
            subject.client.connect(call.id, 22)
        with pytest.raises(errors.PortNotAnswering):
            subject.client.connect(call.id, 8081)
        server = socket.create_server(("127.0.0.1", 0))  # of the host
        with server, pytest.raises(errors.PortNotExposed):
            subject.client.connect(call.id, server.getsockname()[1])
    with pytest.raises(errors.CallEnded):
        subject.client.connect(call.id, 8080)
    plain = subject.start("sleep", "60", policy="python")
    subject.until(lambda: subject.client.get(plain.id).state == "running", "it runs")
    with pytest.raises(errors.PortNotExposed):
        subject.client.connect(plain.id, 8080)
    subject.client.cancel(plain.id)


def test_a_connection_ends_with_its_call(subject: Subject) -> None:
    with serving(subject) as call:
        sock = subject.client.connect(call.id, 8080)
        sock.settimeout(subject.seconds(20))
        sock.sendall(b"said")
        assert sock.recv(10) == b"said"
    with sock:
        assert sock.recv(10) == b""


def test_the_tool_is_no_nearer_to_the_host(subject: Subject) -> None:
    call = subject.run("sh", "-c", "cat /proc/net/dev | tail -n +3 | wc -l; hostname", policy="exposed")
    assert text(call).split()[0] == "1"
    assert controls(call)["network"].in_force == "lo"
    assert "8080, 8081 to the caller" in controls(call)["expose"].in_force
