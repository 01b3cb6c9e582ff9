"""The bounds of a connection: size, time, number; and bytes that are no HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import pytest

HEALTH = b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SHORT = {"header_timeout": 400_000, "body_timeout": 400_000, "keep_alive": 400_000}


def answered(sock: socket.socket) -> bool:
    """Whether an answer to ``HEALTH`` comes, in however many pieces."""
    answer = b""
    while b"}" not in answer:
        part = sock.recv(10_000)
        if not part:
            return False
        answer += part
    return b"ready" in answer


def problem_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    found = json.loads(body)
    assert int(head.split()[1]) == found["status"]
    return found["status"], found["code"]


def test_a_connection_that_says_nothing_is_closed(serve: Any, everything: Any) -> None:
    with serve(**SHORT).raw() as sock:
        begun = time.monotonic()
        assert everything(sock) == b""
        assert 0.3 < time.monotonic() - begun < 5


def test_a_header_that_comes_drop_by_drop(serve: Any, everything: Any) -> None:
    server = serve(**SHORT)
    with server.raw() as sock:
        begun = time.monotonic()
        sock.sendall(b"GET /v1/health HTTP/1.1\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - begun < 5:
                sock.sendall(b"X: y\r\n")
                time.sleep(0.05)
        assert time.monotonic() - begun < 3
        assert problem_of(everything(sock)) == (408, "request_timeout")
    assert server.ask("GET", "/v1/health")[0] == 200


def test_a_body_that_stalls(serve: Any, everything: Any) -> None:
    server = serve(**SHORT)
    with server.raw() as sock:
        sock.sendall(POST + b'Content-Length: 100\r\n\r\n{"argv"')
        assert problem_of(everything(sock)) == (408, "request_timeout")
    assert server.ask("GET", "/v1/health")[0] == 200


def test_a_body_that_is_slow_but_moves(serve: Any) -> None:
    server = serve(**SHORT)
    with server.raw() as sock:
        sock.sendall(POST + b"Content-Length: 18\r\n\r\n")
        for piece in (b'{"arg', b'v": [', b'"true', b'"]}'):
            time.sleep(0.25)
            sock.sendall(piece)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_a_body_that_moves_and_does_not_end(serve: Any, everything: Any) -> None:
    server = serve(**SHORT, body_time=600_000)
    with server.raw() as sock:
        begun = time.monotonic()
        sock.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - begun < 2:
                sock.sendall(b" ")
                time.sleep(0.05)
        assert problem_of(everything(sock)) == (408, "request_timeout")
    assert server.ask("GET", "/v1/health")[0] == 200


def test_a_call_may_take_longer_than_any_timeout_of_a_request(serve: Any) -> None:
    server = serve(**SHORT)
    with server.raw() as sock:
        sock.sendall(POST + b'Content-Length: 18\r\n\r\n{"argv": ["wait"]}')
        time.sleep(1.2)
        server.tell(lambda: server.service.end("call-0", "exited"))
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_an_idle_connection_is_closed_and_a_used_one_kept(serve: Any, everything: Any) -> None:
    with serve(**SHORT).raw() as sock:
        for _ in range(4):
            sock.sendall(HEALTH)
            assert answered(sock)
            time.sleep(0.2)
        assert everything(sock) == b""


@pytest.mark.parametrize("size", [40_000, 200_000_000])
def test_a_huge_header(server: Any, everything: Any, size: int) -> None:
    with server.raw() as sock:
        sock.sendall(b"GET /v1/health HTTP/1.1\r\nX: ")
        piece = b"y" * 1_000_000
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(-(-size // len(piece))):
                sock.sendall(piece[: min(size, len(piece))])
        assert problem_of(everything(sock)) == (413, "too_large")


def test_a_body_over_its_limit_is_refused_at_once(serve: Any) -> None:
    server = serve(body=100_000)
    status, body, _ = server.ask("POST", "/v1/invocations", b"x" * 1_000_000)
    assert (status, body["code"], body["details"]) == (413, "too_large", {"limit": 100_000})
    with server.raw() as sock:  # nothing but a promise was sent
        sock.sendall(POST + b"Content-Length: 99999999999999\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_over_its_limit(serve: Any, everything: Any) -> None:
    server = serve(body=100_000)
    with server.raw() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 400 * 2**20:
                sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
        assert sent < 40 * 2**20
        assert problem_of(everything(sock)) == (413, "too_large")


def test_the_connection_serves_on_after_a_refused_body(serve: Any) -> None:
    connection = serve(body=100_000).connect()
    for _ in range(2):
        connection.request("POST", "/v1/invocations", b"x" * 200_000)
        response = connection.getresponse()
        assert response.status == 413
        response.read()
    connection.request("GET", "/v1/health")
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100, b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"\xff\xfe" * 50 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n", POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=range(12),
)  # fmt: skip
def test_garbage(server: Any, everything: Any, data: bytes) -> None:
    with server.raw() as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = everything(sock)
    assert answer == b"" or problem_of(answer) in {(400, "invalid_request"), (404, "not_found")}
    assert server.ask("GET", "/v1/health")[0] == 200


def test_pipelined_requests_are_answered_in_order(server: Any) -> None:
    with server.raw() as sock:
        sock.sendall(HEALTH * 20 + b"GET /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.1 200") == 20
    assert answer.rindex(b"HTTP/1.1 404") > answer.rindex(b"HTTP/1.1 200")


def test_connections_are_bounded(serve: Any, everything: Any) -> None:
    server = serve(connections=8, connections_per_uid=4)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(server.raw()) for _ in range(4)]
        for sock in held:
            sock.sendall(HEALTH)
            assert answered(sock)
        extra = stack.enter_context(server.raw())
        assert problem_of(everything(extra)) == (503, "queue_full")
        held[0].close()
        time.sleep(0.1)
        assert server.ask("GET", "/v1/health")[0] == 200


def test_a_slow_reader_costs_nothing(server: Any) -> None:
    import resource  # noqa: PLC0415

    server.ask("POST", "/v1/invocations", {"argv": ["zeros", str(2**34)]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with server.raw() as sock:
        sock.sendall(b"GET /v1/invocations/call-0/stdout HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        assert server.ask("GET", "/v1/health")[0] == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
