"""Requests to servers inside: real ones, whatever they are reached with."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from ported import SERVER, ask, ended, inward, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

# What a framework would be: says what it was asked.
MIRROR = """
import http.server, json, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def answer(self):
        if self.headers.get('transfer-encoding') == 'chunked':
            body = b''
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size); self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get('content-length', 0)))
        said = json.dumps({'method': self.command, 'path': self.path, 'headers': self.headers.items(),
                           'size': len(body), 'sum': sum(body) % 65536}).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(said)))
        self.send_header('Connection', 'keep-alive')
        self.send_header('Keep-Alive', 'timeout=100')
        self.send_header('X-Own', 'kept')
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(said)
    do_GET = do_POST = do_PUT = do_HEAD = do_OPTIONS = do_DELETE = do_PATCH = answer
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512
server = Server(('', 8080), Handler)
print('ready', flush=True)
server.serve_forever()
"""


def test_a_request_is_passed_on_and_its_answer_comes_back(
    exposing: Daemon, serving: Callable[..., str]
) -> None:
    call = serving(MIRROR)
    headers = {"Authorization": "Bearer of-the-app", "X-Forwarded-Prefix": "/forged", "Host": "evil"}
    response, body = ask(exposing, call, "/a%2Fb/./c?q=%20&r", headers=headers)
    assert response.status == 200
    assert response.headers["connection"] == "close"
    assert response.headers["keep-alive"] is None
    assert response.headers["x-own"] == "kept"
    said = json.loads(body)
    assert (said["method"], said["path"]) == ("GET", "/a%2Fb/./c?q=%20&r")
    got = sorted((name.lower(), value) for name, value in said["headers"])
    assert ("authorization", "Bearer of-the-app") in got
    assert ("x-forwarded-prefix", f"/v1/invocations/{call}/ports/8080") in got
    assert ("x-forwarded-proto", "http") in got
    assert ("host", "localhost:8080") in got
    assert len([name for name, _ in got if name in {"host", "x-forwarded-prefix"}]) == 2
    ended(exposing, call)
    (event,) = inward(exposing, call)
    assert (event.verdict, event.port, event.address, event.why) == ("allowed", 8080, "127.0.0.1", "")
    assert event.bytes_in > 100
    assert event.bytes_out > 100
    assert event.duration > 0


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_every_method_is_passed_on(exposing: Daemon, serving: Callable[..., str], method: str) -> None:
    response, body = ask(exposing, serving(MIRROR), method=method)
    assert response.status == 200
    assert body == b"" if method == "HEAD" else json.loads(body)["method"] == method


def test_large_bodies_go_both_ways(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(MIRROR)
    body = bytes(range(256)) * 4096 * 8  # 8 MiB
    for sent in ({"body": body}, {"body": iter([body[:5], body[5:]]), "encode_chunked": True,
                                  "headers": {"Transfer-Encoding": "chunked"}}):  # fmt: skip
        response, answer = ask(exposing, call, method="POST", **sent)
        assert response.status == 200
        assert (json.loads(answer)["size"], json.loads(answer)["sum"]) == (len(body), sum(body) % 65536)
    big = SERVER + (
        "def serve(c):\n head(c); c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 67108864\\r\\n\\r\\n')\n"
        " for _ in range(64): c.sendall(bytes(1 << 20))\nmain()"
    )
    response, answer = ask(exposing, serving(big))
    assert len(answer) == 64 << 20


def test_curl_gets_it_by_the_socket(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(MIRROR)
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "30", "--unix-socket", exposing.socket, "-T", "/etc/services",
         f"http://localhost/v1/invocations/{call}/ports/8080/up?x=1"],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert (said["method"], said["path"]) == ("PUT", "/up?x=1")
    assert said["size"] > 1000


def test_who_expects_100_is_told_to_go_on(exposing: Daemon, serving: Callable[..., str]) -> None:
    request = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"
    answer = say(exposing, serving(MIRROR), request)
    assert answer.startswith(b"HTTP/1.1 100 ")
    assert b'"size": 3' in answer
    assert b"expect" not in answer.lower()


@pytest.mark.parametrize(("family", "host"), [("AF_INET", "127.0.0.1"), ("AF_INET", "0.0.0.0"),
                                              ("AF_INET6", "::1"), ("AF_INET6", "::")])  # fmt: skip
def test_a_server_is_found_whatever_it_listens_on(
    exposing: Daemon, serving: Callable[..., str], family: str, host: str
) -> None:
    code = SERVER + (
        "def serve(c):\n head(c); c.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nhere')\n"
        f"main(socket.{family}, {host!r})"
    )
    response, body = ask(exposing, serving(code))
    assert (response.status, body) == (200, b"here")
    assert response.headers["transfer-encoding"] == "chunked"  # so that a cut answer would be seen


def test_what_a_server_says_last_before_its_call_ends_is_delivered(
    exposing: Daemon, serving: Callable[..., str]
) -> None:
    code = SERVER + (
        "def serve(c):\n head(c); c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 500000\\r\\n\\r\\n')\n"
        " c.sendall(b'x' * 500000); os._exit(0)\nmain()"
    )
    call = serving(code)
    response, body = ask(exposing, call)
    assert (response.status, len(body)) == (200, 500000)
    assert exposing.client().wait(call, timeout=20).outcome is not None
    assert [event.verdict for event in inward(exposing, call)] == ["allowed"]
