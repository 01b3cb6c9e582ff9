"""Servers that attack whoever reaches them: what comes back is one answer to one request, or none."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import until
from networked import workers
from ported import SERVER, ask, ended, inward, raw, rest, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

GET = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n"
OK = "HTTP/1.1 200 OK\\r\\n"
FORGED = OK + 'Content-Length: 26\\r\\n\\r\\n{"forged": "by the server"}'


CHUNKS = "2\\r\\nok\\r\\n0\\r\\n\\r\\n"


def saying(*said: str, after: str = "") -> str:
    """A server that says this, whatever it is asked."""
    lines = "".join(f" c.sendall(b'{each}')\n" for each in said)
    return f"{SERVER}\ndef serve(c):\n head(c)\n{lines} {after or 'pass'}\nmain()"


@pytest.mark.parametrize(
    ("said", "body"),
    [
        (OK + "Content-Length: 2\\r\\n\\r\\nok" + FORGED, b"ok"),
        (OK + "Content-Length: 2\\r\\nConnection: keep-alive\\r\\n\\r\\nok" + FORGED * 100, b"ok"),
        (OK + "Content-Length: 0\\r\\n\\r\\n" + FORGED, b""),
        (OK + "Transfer-Encoding: chunked\\r\\n\\r\\n2\\r\\nok\\r\\n0\\r\\n\\r\\n" + FORGED, b"ok"),
        # the length is that of the chunks, whatever else is said (RFC 9112, 6.3)
        (OK + "Content-Length: 900\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n" + CHUNKS, b"ok"),
        ("HTTP/1.1 204 No Content\\r\\nContent-Length: 5\\r\\n\\r\\n" + FORGED, b""),
    ],
)  # fmt: skip
def test_what_follows_an_answer_is_not_passed_on(
    exposing: Daemon, serving: Callable[..., str], said: str, body: bytes
) -> None:
    call = serving(saying(said, after="time.sleep(30)"))
    begun = time.monotonic()
    answer = say(exposing, call, GET)  # to the end of the connection
    assert time.monotonic() - begun < 10
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"forged" not in answer
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in head.lower()
    assert head.lower().count(b"content-length") + head.lower().count(b"transfer-encoding") <= 1
    if b"chunked" in head:
        content = content.replace(b"2\r\n", b"").replace(b"\r\n0\r\n\r\n", b"")
    assert content == body


@pytest.mark.parametrize(
    "said",
    [
        "",
        "no HTTP at all\\r\\n\\r\\n",
        "HTTP/1.1 200 OK\\r\\nContent-Length: 5, 6\\r\\n\\r\\nabcdef",
        "HTTP/1.1 200 OK\\r\\nContent-Length: -5\\r\\n\\r\\nabcdef",
        "HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\nContent-Length: 6\\r\\n\\r\\nabcdef",
        "HTTP/1.1 200 OK\\r\\nTransfer-Encoding: gzip, chunked\\r\\n\\r\\n",
        "HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n",
        "HTTP/1.1 200 OK\\r\\nA b: c\\r\\n\\r\\n",
        "HTTP/1.1 200 OK\\r\\nA: b\\x00c\\r\\n\\r\\n",
        "HTTP/1.1 200 OK\\r\\nA: b\\rX: c\\r\\n\\r\\n",
        "HTTP/1.1 200 OK\\r\\nA: ' + b'a' * 200_000 + b'\\r\\n\\r\\n",
        "HTTP/1.1 200 OK\\r\\n' + b'A: a\\r\\n' * 50_000 + b'",
        "HTTP/2 200 OK\\r\\n\\r\\n",
        "HTTP/1.1 99 Low\\r\\n\\r\\n",
        "HTTP/1.1 101 Switching Protocols\\r\\nConnection: Upgrade\\r\\nUpgrade: x\\r\\n\\r\\nforged",
        "HTTP/1.1 100 Continue\\r\\n\\r\\n" * 1000,
        "HTTP/1.1 103 Early Hints\\r\\n\\r\\n",
    ],
)
def test_what_is_no_answer_is_said_to_be_none(
    exposing: Daemon, serving: Callable[..., str], said: str
) -> None:
    call = serving(saying(said))
    response, body = ask(exposing, call)
    assert response.status == 502, body
    assert response.headers["content-type"] == "application/problem+json"
    problem = json.loads(body)
    assert problem["code"] == "port_answer_invalid"
    assert problem["detail"].startswith("port 8080: ")
    assert b"forged" not in body
    ended(exposing, call)
    (event,) = inward(exposing, call)
    assert event.verdict == "failed"
    assert event.why


@pytest.mark.parametrize(
    "said",
    [
        OK + "Content-Length: 10\\r\\n\\r\\nshort",
        OK + "Transfer-Encoding: chunked\\r\\n\\r\\n5\\r\\nshort\\r\\n",
        OK + "Transfer-Encoding: chunked\\r\\n\\r\\nZZ\\r\\nshort\\r\\n0\\r\\n\\r\\n",
        OK + "Transfer-Encoding: chunked\\r\\n\\r\\n5\\r\\nshortlong\\r\\n0\\r\\n\\r\\n",
        OK + "Transfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n' + b'A: a\\r\\n' * 50_000 + b'",
    ],
)
def test_an_answer_that_is_cut_looks_like_one(
    exposing: Daemon, serving: Callable[..., str], said: str
) -> None:
    call = serving(saying(said))
    answer = say(exposing, call, GET)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        assert not body.endswith(b"0\r\n\r\n")
    else:
        assert len(body) < 10
    ended(exposing, call)
    assert [event.verdict for event in inward(exposing, call)] == ["failed"]


def test_a_later_request_on_the_connection_reaches_nobody(
    exposing: Daemon, serving: Callable[..., str]
) -> None:
    """Neither what was sent with the first, nor what is sent when the server says that it keeps it open."""
    code = SERVER + (
        "def serve(c):\n got = head(c)\n"
        " c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: keep-alive\\r\\n\\r\\nok')\n"
        " print(repr(got + c.recv(65536)), flush=True)\nmain()"
    )
    call = serving(code)
    target = f"/v1/invocations/{call}/ports/8080/".encode()
    secret = (
        b"POST /v1/invocations HTTP/1.1\r\nHost: x\r\nX-Secret: of-the-caller\r\nContent-Length: 0\r\n\r\n"
    )
    with raw(exposing) as sock:
        sock.sendall(GET.replace(b"%b", target) + secret)
        answer = rest(sock)
    assert answer.count(b"HTTP/1.1") == 1
    with raw(exposing) as sock:
        sock.sendall(GET.replace(b"%b", target))
        first = b""
        while not first.endswith(b"ok"):
            first += sock.recv(65536)
        try:
            sock.sendall(secret)
            assert rest(sock) == b""
        except BrokenPipeError:
            pass
    until(lambda: b"".join(exposing.client().stdout(call)).count(b"GET") == 2, "both were asked")
    assert b"of-the-caller" not in b"".join(exposing.client().stdout(call))
    ended(exposing, call)


def test_a_request_after_others_on_one_connection_is_passed_on(
    exposing: Daemon, serving: Callable[..., str]
) -> None:
    """The API keeps connections; what it answered before is still delivered, and in order."""
    call = serving(saying(OK + "Content-Length: 2\\r\\n\\r\\nok"))
    listing = b"GET /v1/policies HTTP/1.1\r\nHost: x\r\n\r\n"
    target = f"/v1/invocations/{call}/ports/8080/".encode()
    with raw(exposing) as sock:
        sock.sendall(listing * 3 + GET.replace(b"%b", target) + listing)
        answer = rest(sock)
    assert answer.count(b"HTTP/1.1 200") == 4
    assert answer.endswith(b"ok")
    ended(exposing, call)


def test_a_refused_request_leaves_its_connection_usable(
    exposing: Daemon, serving: Callable[..., str]
) -> None:
    call = serving(saying(OK + "Content-Length: 2\\r\\n\\r\\nok"))
    refused = (
        f"POST /v1/invocations/{call}/ports/9/ HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n".encode()
    )
    with raw(exposing) as sock:
        sock.sendall(refused + b"x" * 70000 + GET.replace(b"%b", b"/v1/health"))
        answer = b""
        while answer.count(b"HTTP/1.1 ") < 2 and (part := sock.recv(65536)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"port_not_exposed" in answer
    assert b"HTTP/1.1 200 " in answer


def test_a_body_is_no_way_to_smuggle_a_request(exposing: Daemon, serving: Callable[..., str]) -> None:
    """Of a caller that says two lengths, the server is told one."""
    code = SERVER + (
        "def serve(c):\n got = head(c)\n while b'\\r\\n0\\r\\n\\r\\n' not in got: got += c.recv(65536)\n"
        " print(repr(got), flush=True)\n"
        " c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n')\nmain()"
    )
    call = serving(code)
    request = (
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: content-length, x-hop\r\nX-Hop: y\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    )
    assert say(exposing, call, request).startswith(b"HTTP/1.1 200 ")
    until(lambda: b"POST" in b"".join(exposing.client().stdout(call)), "it was asked")
    got = b"".join(exposing.client().stdout(call)).lower()
    assert b"content-length" not in got
    assert b"x-hop" not in got
    assert got.count(b"transfer-encoding: chunked") == 1
    ended(exposing, call)


def test_a_server_that_says_nothing_holds_nobody_but_who_waits(
    exposing: Daemon, serving: Callable[..., str]
) -> None:
    call = serving(saying(after="time.sleep(100)"))
    other = serving(saying(OK + "Content-Length: 2\\r\\n\\r\\nok"))
    with raw(exposing) as sock:
        sock.sendall(GET.replace(b"%b", f"/v1/invocations/{call}/ports/8080/".encode()))
        assert ask(exposing, other)[1] == b"ok"
        done = ended(exposing, call)
        assert done.outcome is not None
        assert done.outcome.cause == "cancelled"
        assert b"port_answer_invalid" in rest(sock)
    (event,) = inward(exposing, call)
    assert event.verdict == "failed"


def test_a_caller_that_goes_away_ends_its_connection(exposing: Daemon, serving: Callable[..., str]) -> None:
    code = SERVER + (
        "def serve(c):\n head(c)\n try: c.recv(1)\n except OSError: pass\n print('over', flush=True)\nmain()"
    )
    call = serving(code)
    sock = raw(exposing)
    sock.sendall(GET.replace(b"%b", f"/v1/invocations/{call}/ports/8080/".encode()))
    time.sleep(0.5)
    sock.close()
    until(lambda: b"over" in b"".join(exposing.client().stdout(call)), "the server is told")
    ended(exposing, call)
    (event,) = inward(exposing, call)
    assert (event.verdict, event.why) == ("failed", "the caller went away before it had its answer")


def test_an_endless_answer_costs_no_memory(exposing: Daemon, serving: Callable[..., str]) -> None:
    code = SERVER + (
        "def serve(c):\n head(c); c.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n')\n"
        " try:\n  while True: c.sendall(bytes(1 << 20))\n except OSError: pass\nmain()"
    )
    call = serving(code)
    with raw(exposing) as stalled, raw(exposing) as reading:
        for sock in (stalled, reading):
            sock.sendall(GET.replace(b"%b", f"/v1/invocations/{call}/ports/8080/".encode()))
        got = 0
        while got < 200 << 20:
            got += len(reading.recv(1 << 20))
        (worker,) = workers(exposing)
        assert worker.memory_info().rss < 150 << 20
        assert psutil.Process(exposing.process.pid).memory_info().rss < 400 << 20
        begun = time.monotonic()
        ended(exposing, call)
        assert time.monotonic() - begun < 8
        assert not rest(reading).endswith(b"0\r\n\r\n")


def test_a_server_on_an_abstract_socket_is_not_there(exposing: Daemon, serving: Callable[..., str]) -> None:
    code = (
        "import socket, time\ns = socket.socket(socket.AF_UNIX); s.bind('\\0' + '8080'); s.listen()\n"
        "print('ready', flush=True); time.sleep(50)"
    )
    response, body = ask(exposing, serving(code))
    assert (response.status, json.loads(body)["code"]) == (502, "port_not_answering")


def test_a_free_port_does_not_answer_for_itself(exposing: Daemon, serving: Callable[..., str]) -> None:
    """One among those that connections begin at, where a connection can meet itself."""
    call = serving("import time; print('ready', flush=True); time.sleep(50)")
    for _ in range(300):
        response, body = ask(exposing, call, port=40000)
        assert (response.status, json.loads(body)["code"]) == (502, "port_not_answering")


def test_a_full_backlog_is_no_answer(exposing: Daemon, serving: Callable[..., str]) -> None:
    code = (
        "import socket, time\ns = socket.socket(); s.bind(('127.0.0.1', 8080)); s.listen(0)\n"
        "held = [socket.create_connection(('127.0.0.1', 8080))]\n"
        "for _ in range(3):\n c = socket.socket(); c.setblocking(False); held.append(c)\n"
        " c.connect_ex(('127.0.0.1', 8080))\n"
        "print('ready', flush=True); time.sleep(50)"
    )  # fmt: skip
    begun = time.monotonic()
    response, body = ask(exposing, serving(code))
    assert (response.status, json.loads(body)["code"]) == (502, "port_not_answering")
    assert time.monotonic() - begun < 15


def test_its_process_dies_alone(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(saying(after="time.sleep(100)"))
    with raw(exposing) as sock:
        sock.sendall(GET.replace(b"%b", f"/v1/invocations/{call}/ports/8080/".encode()))
        until(lambda: workers(exposing), "a process serves")
        time.sleep(0.5)
        for worker in workers(exposing):
            worker.kill()
        assert rest(sock) == b""
    other = serving(saying(OK + "Content-Length: 2\\r\\n\\r\\nok"))
    assert ask(exposing, other)[1] == b"ok"
    ended(exposing, call)
    (event,) = inward(exposing, call)
    assert (event.verdict, event.why) == (
        "failed", "the process that served the connection ended, and it with it",
    )  # fmt: skip
