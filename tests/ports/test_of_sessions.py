"""Ports of sessions: whoever has the session reaches the server of the call that runs in it, and no other."""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from typing import TYPE_CHECKING

import pytest
from daemons import Daemon, start_daemon, until
from ported import (
    CALLERS,
    ECHO,
    HELLO,
    OTHER,
    OWNER,
    POLICY,
    SERVER,
    ApiConnection,
    become,
    ended,
    forwarding,
    found_as,
    inward,
)

from sandboxd import Client, errors

if TYPE_CHECKING:
    import multiprocessing
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sandboxd.models import Invocation

PREFIX = (
    "def serve(c):\n lines = head(c).split(b'\\r\\n')\n"
    " said = [each for each in lines if b'prefix' in each.lower() or b'/at' in each]\n"
    " said = b' '.join(said)\n"
    " c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n' % len(said) + said)\nmain()"
)


@pytest.fixture
def session(exposing: Daemon) -> Iterator[str]:
    """A session of its own, by a name."""
    client = exposing.client()
    name = f"s{uuid.uuid4().hex[:12]}"
    client.create_session(name)
    yield name
    client.delete_session(name)


def ask(daemon: Daemon, session: str, port: int = 8080, path: str = "/") -> tuple[int, bytes]:
    """Status and body of a request for a server in a session."""
    with contextlib.closing(ApiConnection(daemon)) as connection:
        connection.request("GET", f"/v1/sessions/{session}/ports/{port}{path}")
        response = connection.getresponse()
        return response.status, response.read()


def test_each_call_in_turn_is_reached(exposing: Daemon, serving: Callable[..., str], session: str) -> None:
    client = exposing.client()
    for said in (b"first", b"other"):
        code = HELLO.replace("hello", said.decode())
        call = serving(code + "main()", session=session)
        assert ask(exposing, session) == (200, said)
        assert client.session_ports(session) == [8080, 8081, 40000]
        assert ask(exposing, client.session(session).id) == (200, said)
        done = ended(exposing, call)
        assert [each.direction for each in inward(exposing, done.id)] == ["in"] * 2  # told of the call
        status, body = ask(exposing, session)
        assert (status, json.loads(body)["code"]) == (409, "session_idle")
        with pytest.raises(errors.SessionIdle, match="no call runs"):
            client.connect_session(session, 8080)
        with pytest.raises(errors.SessionIdle):
            client.session_ports(session)


def test_a_container_that_is_kept_is_reached_between_its_calls(exposing: Daemon, session: str) -> None:
    client = exposing.client()

    def left(code: str) -> Invocation:
        argv = [
            "sh",
            "-c",
            'python3 -c "$1" > log 2>&1 & until grep -q ready log; do sleep 0.02; done',
            "-",
            code,
        ]
        return client.run(argv, policy="lasting", session=session)

    first = left(ECHO + "main()")
    assert first.outcome is not None
    assert first.outcome.exit_code == 0
    assert client.session_ports(session) == [8080, 8081, 40000]
    with client.connect_session(session, 8080) as sock:
        sock.sendall(b"between")
        assert sock.recv(10) == b"between"
        other = left((HELLO + "main()").replace("port=8080", "port=8081"))
        sock.sendall(b"still")  # the connection is not of a call
        assert sock.recv(10) == b"still"
    assert ask(exposing, session, 8081) == (200, b"hello")
    last = client.run(["true"], policy="lasting", session=session)
    told = [each.port for call in (first, other, last) for each in inward(exposing, call.id)]
    assert told == [8080, 8081]
    assert [each.port for each in inward(exposing, last.id)] == [
        8080,
        8081,
    ]  # what ended since the call before
    with client.connect_session(session, 8080) as sock:
        client.end_session(session)
        assert sock.recv(10) == b""
    assert json.loads(ask(exposing, session)[1])["code"] == "session_idle"


def test_one_that_waits_is_not_reached(exposing: Daemon, serving: Callable[..., str], session: str) -> None:
    """The server of the second call listens only when the first has ended."""
    first = serving(HELLO + "main()", session=session)
    other = HELLO.replace("hello", "other") + "main()"
    second = exposing.client().start(["python3", "-c", other], policy="exposing", session=session)
    assert ask(exposing, session) == (200, b"hello")
    ended(exposing, first)
    until(lambda: ask(exposing, session) == (200, b"other"), "it is the second's turn")
    ended(exposing, second.id)


def test_the_server_is_told_where_it_is(exposing: Daemon, serving: Callable[..., str], session: str) -> None:
    call = serving(SERVER + PREFIX, session=session)
    status, body = ask(exposing, session, path="/at?query")
    assert status == 200
    assert body.startswith(b"GET /at?query HTTP/1.1 ")
    assert f"/v1/sessions/{session}/ports/8080".encode() in body
    ended(exposing, call)


def test_bytes_both_ways(exposing: Daemon, serving: Callable[..., str], session: str) -> None:
    call = serving(ECHO + "main()", session=session)
    with exposing.client().connect_session(session, 8080) as sock:
        sock.sendall(b"\0said")
        assert sock.recv(10) == b"\0said"
        ended(exposing, call)
        assert sock.recv(10) == b""


def test_what_is_not_exposed_is_not_reached(
    exposing: Daemon, serving: Callable[..., str], session: str
) -> None:
    call = serving(
        HELLO + "threading.Thread(target=main, kwargs={'port': 9000}).start(); main()", session=session
    )
    status, body = ask(exposing, session, 9000)
    assert (status, json.loads(body)["code"]) == (403, "port_not_exposed")
    assert json.loads(ask(exposing, session, 8081)[1])["code"] == "port_not_answering"
    for port in ("0", "x", "99999"):
        assert json.loads(ask(exposing, session, port)[1])["code"] == "invalid_request"  # type: ignore[arg-type]
    ended(exposing, call)
    plain = exposing.client().start(["sleep", "50"], policy="python", session=session)
    until(lambda: exposing.client().get(plain.id).state == "running", "it runs")
    status, body = ask(exposing, session)
    assert (status, json.loads(body)["code"]) == (403, "port_not_exposed")
    ended(exposing, plain.id)


@pytest.mark.parametrize(
    "named", ["no-such-session", "..", "%2e%2e", "a" * 200, "00000000-0000-7000-8000-000000000000"]
)
def test_a_session_that_is_not_there(exposing: Daemon, named: str) -> None:
    status, body = ask(exposing, named)
    assert (status, json.loads(body)["code"]) == (404, "not_found")


def as_uid(uid: int, path: str, session: str | None, queue: multiprocessing.Queue[object]) -> None:
    """Start a server in a session of one's own where none is given, else try to reach that."""
    become(uid)
    client = Client(path)
    if session is None:
        made = client.create_session("mine")
        client.start(["python3", "-c", HELLO + "main()"], policy="exposing", session="mine")
        queue.put(made.id)
        return
    found: list[object] = []
    for attempt in (
        lambda: client.session_ports(session),
        lambda: client.connect_session(session, 8080).close(),
        lambda: client.connect_session("mine", 8080).close(),
    ):
        try:
            attempt()
            found.append("done")
        except errors.SandboxdError as error:
            found.append(error.code)
    queue.put(found)


def test_another_caller_finds_no_such_session(tmp_path: Path) -> None:
    def done_as(uid: int, session: str | None = None) -> object:
        return found_as(uid, daemon, session, as_uid)

    with start_daemon(tmp_path, config=CALLERS) as daemon:
        daemon.admit_everybody()
        (daemon.policies / "exposing.yaml").write_text(POLICY)
        until(lambda: "exposing" in [each.name for each in daemon.client().policies()], "it is in force")
        session = done_as(OWNER)
        assert isinstance(session, str)
        until(lambda: ask(daemon, session)[0] == 200, "it listens")  # an operator reaches it
        assert done_as(OTHER, session) == ["not_found"] * 3
        assert done_as(OWNER, session)[1:] == ["done", "done"]  # type: ignore[index]


def test_forward_goes_on_from_call_to_call(exposing: Daemon, serving: Callable[..., str]) -> None:
    client = exposing.client()
    name = f"s{uuid.uuid4().hex[:12]}"
    client.create_session(name)

    def said(address: str) -> bytes:
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=20) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                return sock.recv(1000)[-5:]
            return b""

    with forwarding(exposing, name, "8080") as (process, address):
        assert said(address) == b""  # nothing runs
        for word in ("hello", "other"):
            call = serving(HELLO.replace("hello", word) + "main()", session=name)
            assert said(address) == word.encode()
            ended(exposing, call)
        client.delete_session(name)
        assert process.wait(timeout=20) == 0
