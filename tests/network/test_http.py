"""Rules that look into HTTP, by real programs in real containers."""

from __future__ import annotations

import json
import socketserver
from typing import TYPE_CHECKING

import pytest
from mirror import Mirror
from networked import add_policy, start_networked
from world import PRIVATE, WEB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation, NetworkEvent

    Python = Callable[..., Invocation]

POLICY = """\
version: 1
name: http
extends: python
warm: !remove
network:
  allow:
    - {host: api.http.test, ports: [80, 443], methods: [GET, HEAD], paths: [/open/**, /]}
    - {host: api.http.test, ports: [80, 443], methods: [POST, PUT], paths: [/put/*], headers: {x-kind: "a*"}}
    - {host: plain.http.test, ports: [80]}
    - {host: api.http.test, ports: [84, 444], paths: [/ws], websocket: true}
    - {host: api.http.test, ports: [84], paths: [/no]}
    - {host: down.http.test, ports: [81], methods: [GET]}
    - {host: cut.http.test, ports: [82, 83], methods: [GET]}
    - {host: nowhere.http.test, ports: [80], methods: [GET]}
    - {host: inside.http.test, ports: [80], methods: [GET]}
    - {host: within.http.test, ports: [80], methods: [GET], within: [10.91.7.0/24]}
    - {host: another.http.test, ports: [443], methods: [GET]}
  deny:
    - {host: api.http.test, paths: [/open/secret/**]}
    - {host: "*.http.test", methods: [DELETE]}
  budget: {requests: 50}
"""


class Cut(socketserver.BaseRequestHandler):
    """Ends in the middle of an answer's head."""

    answer = b"HTTP/1.1 200 OK\r\nContent-"

    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(self.answer)


class Socket(socketserver.BaseRequestHandler):
    """Agrees to a WebSocket, or to whatever it is asked for, and says everything twice from then on."""

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(65536)
        head, _, early = head.partition(b"\r\n\r\n")
        Mirror.requests.append({"head": head})
        self.request.sendall(
            b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
            b"Sec-WebSocket-Accept: x\r\n\r\nhello"
        )
        data = early
        while data or (data := self.request.recv(65536)):
            self.request.sendall(data * 2)
            data = b""


class Nonsense(Cut):
    """Answers what is no HTTP."""

    answer = b"\x16\x03\x01 SSH-2.0\r\n\r\n"


@pytest.fixture(scope="module")
def http(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose containers may make some requests of ``Mirror``."""
    hosts = ("api", "plain", "down", "another", "cut")
    world.records |= {f"{name}.http.test": [WEB] for name in hosts} | {"inside.http.test": [PRIVATE]}
    world.records["within.http.test"] = [PRIVATE]
    world.serve(WEB, 82, Cut)
    world.serve(WEB, 83, Nonsense)
    world.serve(WEB, 84, Socket)
    world.serve(WEB, 444, Socket, tls="api.http.test")
    world.serve(WEB, 80, Mirror)
    world.serve(WEB, 443, Mirror, tls="api.http.test")
    authority = world.certificate("api.http.test")
    with start_networked(tmp_path_factory.mktemp("http"), authorities=f"{authority}.crt") as daemon:
        add_policy(daemon, "http", POLICY)
        yield daemon


@pytest.fixture
def ask(http: Daemon) -> Callable[..., Invocation]:
    """Run a piece of Python under the policy ``http``."""
    return lambda code, **options: http.run("python3", "-c", code, policy="http", **options)


def said(call: Invocation) -> str:
    """What a call printed."""
    assert call.stdout is not None, call.outcome
    assert call.stderr is not None
    return (call.stdout.text or "") + (call.stderr.text or "")


def requests(daemon: Daemon, call: Invocation) -> list[NetworkEvent]:
    """What the call's stream says of its requests."""
    found = [event.network for event in daemon.client().events(call.id) if event.network is not None]
    return [event for event in found if event.method]


ASK = """
import http.client, json
def ask(method, path, body=None, headers={}, host='api.http.test', tls=False):
    if tls:
        made = http.client.HTTPSConnection(host, timeout=20)
    else:
        made = http.client.HTTPConnection(host, timeout=20)
    made.request(method, path, body, headers)
    answer = made.getresponse()
    return answer.status, answer.read().decode()
"""


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("request_", "allowed"),
    [
        ("'GET', '/open/a?x=1'", True),
        ("'GET', '/'", True),
        ("'HEAD', '/open/a/b'", True),
        ("'GET', '/open'", False),
        ("'GET', '/other'", False),
        ("'GET', '/open/secret/x'", False),
        ("'GET', '/open/%73ecret/x'", False),
        ("'GET', '/open/../other'", False),
        ("'GET', '/open/%2e%2e/other'", False),
        ("'GET', '/open/..;/other'", False),
        ("'GET', '/open//secret/x'", False),
        ("'GET', '/open/a%2f..%2fsecret/x'", False),
        ("'GET', '/open/%2573ecret/x'", False),
        ("'GET', '/open/a\\\\b'", False),
        ("'POST', '/open/a', 'body'", False),
        ("'POST', '/put/a', 'body', {'X-Kind': 'abc'}", True),
        ("'POST', '/put/a', iter([b'bo', b'dy']), {'x-kind': 'a'}", True),
        ("'POST', '/put/a', 'body', {'X-Kind': 'b'}", False),
        ("'POST', '/put/a', 'body'", False),
        ("'POST', '/put/a/b', 'body', {'X-Kind': 'abc'}", False),
        ("'DELETE', '/open/a'", False),
        ("'OPTIONS', '*'", False),
    ],
)
def test_requests(http: Daemon, ask: Python, request_: str, tls: bool, allowed: bool) -> None:  # noqa: FBT001
    Mirror.requests.clear()
    call = ask(f"{ASK}\nprint(*ask({request_}, tls={tls}))")
    status, _, body = said(call).partition(" ")
    (event,) = requests(http, call)
    assert event.protocol == ("https" if tls else "http")
    if allowed:
        assert status == "200", body
        assert (event.verdict, event.status) == ("allowed", 200)
        (asked,) = Mirror.requests
        assert asked["body"] in ("body", "")
        framed = {name for name, _ in asked["headers"]} & {"content-length", "transfer-encoding"}
        assert len(framed) == (1 if asked["body"] else 0)
        assert not call.denials
    else:
        assert status == "403"
        assert Mirror.requests == []
        assert event.verdict == "denied"
        (denial,) = call.denials
        assert (denial.kind, denial.count) == ("request", 1)
        if body.strip():
            assert json.loads(body)["detail"] == denial.detail


RAW = """
import socket
def raw(data, port=80, host='api.http.test', wait=5):
    with socket.create_connection((host, port), timeout=wait) as sock:
        sock.sendall(data)
        got = b''
        try:
            while piece := sock.recv(65536):
                got += piece
        except OSError as error:
            got += f' {type(error).__name__}'.encode()
    return got
"""
PUT = "POST /put/a HTTP/1.1\\r\\nHost: api.http.test\\r\\nx-kind: a\\r\\n"
HOST = "Host: api.http.test\\r\\n"
UPGRADE = "Connection: upgrade\\r\\nUpgrade: websocket\\r\\n"
LAST = "Connection: close\\r\\n\\r\\n"


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (f"GET /open/a HTTP/1.1\\r\\nHost: other.example\\r\\n{LAST}", 421),
        (f"GET /open/a HTTP/1.1\\r\\nHost: plain.http.test\\r\\n{LAST}", 421),
        (f"GET /open/a HTTP/1.1\\r\\nHost: api.http.test:81\\r\\n{LAST}", 421),
        (f"GET /open/a HTTP/1.1\\r\\nHost: x@api.http.test\\r\\n{LAST}", 421),
        (f"GET /open/a HTTP/1.1\\r\\n{HOST}{HOST}{LAST}", 400),
        (f"GET /open/a HTTP/1.1\\r\\n{LAST}", 400),
        (f"GET http://other.example/open/a HTTP/1.1\\r\\n{HOST}{LAST}", 421),
        (f"GET http://api.http.test/open/a HTTP/1.1\\r\\nHost: other.example\\r\\n{LAST}", 421),
        (f"GET https://api.http.test/open/a HTTP/1.1\\r\\n{HOST}{LAST}", 400),
        (f"GET open/a HTTP/1.1\\r\\n{HOST}{LAST}", 400),
        (f"GET api.http.test HTTP/1.1\\r\\n{HOST}{LAST}", 400),
        (f"get /open/a HTTP/1.1\\r\\n{HOST}{LAST}", 403),
        (f"GET /open/a;x HTTP/1.1\\r\\n{HOST}{LAST}", 403),
        (f"GET /open/a HTTP/1.1\\r\\n{HOST}bad name: {'A' * 9000}\\r\\n{LAST}", 400),
        (f"{'A' * 60000} / HTTP/1.1\\r\\n{HOST}{LAST}", 403),
        (f"POST /open/a HTTP/1.1\\r\\n{HOST}{UPGRADE}Content-Length: 9\\r\\n\\r\\nabc", 400),
        (f"CONNECT other.example:443 HTTP/1.1\\r\\n{HOST}{LAST}", 405),
        (
            f"{PUT}Content-Length: 3\\r\\nContent-Length: 4\\r\\n{LAST}abc",
            400,
        ),
        (f"{PUT}Content-Length: +3\\r\\n{LAST}abc", 400),
        (
            f"{PUT}Transfer-Encoding: gzip, chunked\\r\\n{LAST}0\\r\\n\\r\\n",
            501,
        ),
        (
            f"{PUT}Transfer-Encoding: chunked\\r\\n{LAST}zz\\r\\n",
            400,
        ),
        (f"POST /put/a HTTP/1.1\\r\\n{HOST}x-kind : a\\r\\n{LAST}", 400),
        (f"{PUT}x-kind: b\\r\\nContent-Length: 0\\r\\n{LAST}", 403),
        (f"GET /open/a\\tb HTTP/1.1\\r\\n{HOST}{LAST}", 400),
        ("GET /open/secret/x HTTP/1.0\\r\\n\\r\\n", 403),
        ("\\x00\\x01\\x02\\x03 HTTP/1.1\\r\\n\\r\\n", 400),
        ("GET /open/a HTTP/2.0\\r\\n\\r\\n", 505),
    ],
)
def test_what_is_of_another_host_or_malformed_goes_nowhere(
    http: Daemon, ask: Python, message: str, status: int
) -> None:
    Mirror.requests.clear()
    call = ask(f"{RAW}\nprint(raw(b'{message}').decode('latin-1'))")
    assert said(call).split()[:2] == ["HTTP/1.1", str(status)]
    assert Mirror.requests == []
    assert {event.verdict for event in requests(http, call)} <= {"denied", "failed"}


def test_absolute_form_and_old_requests_are_rewritten(ask: Python) -> None:
    Mirror.requests.clear()
    code = f"""{RAW}
print(raw(b'GET http://API.http.test/open/a?b HTTP/1.1\\r\\n{HOST}{LAST}')[:15])
print(raw(b'GET /open/c HTTP/1.0\\r\\n\\r\\n')[:15])
print(raw(b'GET http://api.http.test HTTP/1.1\\r\\n{HOST}{LAST}')[:15])
"""
    assert said(ask(code)) == "b'HTTP/1.1 200 OK'\n" * 3
    assert [each["path"] for each in Mirror.requests] == ["/open/a?b", "/open/c", "/"]
    assert [dict(each["headers"])["host"] for each in Mirror.requests] == ["api.http.test"] * 3


def test_a_smuggled_request_is_judged_as_one_or_is_a_body(ask: Python) -> None:
    Mirror.requests.clear()
    hidden = f"GET /other HTTP/1.1\\r\\n{HOST}\\r\\n"
    code = f"""{RAW}
hidden = b'{hidden}'
head = b'{PUT}'
# both ways of framing: one alone counts, and the server sees the same
both = b'Content-Length: 4\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n\\r\\n'
print(raw(head + both + hidden).count(b'HTTP/1.1 '))
# a body that looks like a request
print(raw(head + b'Content-Length: %d\\r\\n{LAST}' % len(hidden) + hidden).count(b'HTTP/1.1 200'))
# two in one write are two
last = b'GET /open/b HTTP/1.1\\r\\n{HOST}{LAST}'
print(raw(b'GET /open/a HTTP/1.1\\r\\n{HOST}\\r\\n' + hidden + last).count(b'HTTP/1.1 '))
# a header that ends early
print(raw(b'GET /open/x HTTP/1.1\\r\\n{HOST}x: y\\n\\nGET /other HTTP/1.1\\r\\n{HOST}{LAST}')[:12])
# a chunk's extension, and what trails the last
body = b'3;x=\"{"y" * 50}\"\\r\\nabc\\r\\n0\\r\\nx-kind: b\\r\\nhost: other\\r\\n\\r\\n'
print(raw(head + b'Transfer-Encoding: chunked\\r\\n{LAST}' + body)[:12])
"""
    printed = said(ask(code))
    paths = [each["path"] for each in Mirror.requests]
    assert "/other" not in paths, printed
    assert printed.splitlines()[1:3] == ["1", "3"]
    assert printed.splitlines()[4] == "b'HTTP/1.1 200'"
    assert {"/open/a", "/open/b"} <= set(paths)
    for each in Mirror.requests:
        names = [name for name, _ in each["headers"]]
        assert not ("content-length" in names and "transfer-encoding" in names)
    assert Mirror.requests[-1]["body"] == "abc"


def test_connections_are_kept_and_a_refusal_does_not_end_them(ask: Python) -> None:
    code = """
import http.client
made = http.client.HTTPConnection('api.http.test', timeout=20)
for path in ('/open/a', '/other', '/open/b'):
    made.request('GET', path)
    answer = made.getresponse()
    answer.read()
    print(answer.status, made.sock is not None)
made.request('POST', '/other', b'x' * 100000)
print(made.getresponse().status)
"""
    call = ask(code)
    assert said(call) == "200 True\n403 True\n200 True\n403\n"
    assert call.usage is not None
    assert (call.usage.connections, call.usage.requests) == (1, 2)  # those that are made


def test_who_says_expect_is_told_to_go_on_or_why_not(ask: Python) -> None:
    code = f"""{RAW}
head = b'HTTP/1.1\\r\\n{HOST}x-kind: a\\r\\nExpect: 100-continue\\r\\nContent-Length: 3\\r\\n{LAST}'
print(raw(b'POST /put/a ' + head + b'abc')[:60])
print(raw(b'POST /other ' + head)[:12])
"""
    printed = said(ask(code)).splitlines()
    assert printed[0].startswith("b'HTTP/1.1 100 \\r\\n\\r\\nHTTP/1.1 200 OK")
    assert printed[1] == "b'HTTP/1.1 403'"


def test_requests_have_a_budget(ask: Python) -> None:
    code = f"""{ASK}
print(*(ask('GET', '/open/a')[0] for _ in range(53)))
print(ask('GET', '/open/a')[1])
"""
    call = ask(code)
    first, second, *_ = said(call).splitlines()
    assert first.split() == ["200"] * 50 + ["429"] * 3
    assert "network.budget.requests" in second
    assert [limit.limit for limit in call.limits_reached] == ["network.budget.requests"]


@pytest.mark.parametrize(
    ("asked", "status", "why"),
    [
        ("'GET', '/', host='down.http.test:81'", 502, "Connection refused"),
        ("'GET', '/', host='nowhere.http.test'", 502, "has no address"),
        ("'GET', '/', host='inside.http.test'", 403, "10.91.7.2 is in 10.0.0.0/8"),
        ("'GET', '/', host='another.http.test', tls=True", 502, "certificate"),
        ("'DELETE', '/', host='plain.http.test'", 403, "DELETE / is denied"),
        ("'GET', '/', host='cut.http.test:82'", 502, "no answer came"),
        ("'GET', '/', host='cut.http.test:83'", 502, "illegal"),
    ],
)
def test_what_is_in_the_way_is_told(http: Daemon, ask: Python, asked: str, status: int, why: str) -> None:
    call = ask(f"{ASK}\nprint(*ask({asked}))")
    answer, _, body = said(call).partition(" ")
    assert answer == str(status), body
    problem = json.loads(body)
    assert why in problem["detail"], problem
    (event,) = requests(http, call)
    assert event.verdict == problem["verdict"] == ("denied" if status == 403 else "failed")
    assert bool(problem.get("allowed")) == (status == 403)


def test_a_private_host_is_asked_by_its_name_alone(ask: Python) -> None:
    call = ask(f"""{ASK}
print(*ask('GET', '/', host='within.http.test'))
print(ask('POST', '/', host='within.http.test')[0])
import socket
try: socket.create_connection(('{PRIVATE}', 80), timeout=5)
except OSError as error: print(type(error).__name__)
""")
    assert said(call).split() == ["200", "within.http.test", "/", "403", "ConnectionRefusedError"]


def test_a_rule_without_conditions_lets_other_requests_through(ask: Python) -> None:
    assert said(ask(f"{ASK}\nprint(ask('PATCH', '/any', host='plain.http.test')[0])")).startswith("501")


def test_large_bodies_go_both_ways_as_they_come(ask: Python) -> None:
    code = f"""{ASK}
import hashlib
body = bytes(range(256)) * 40960
def pieces():
    for at in range(0, len(body), 50000): yield body[at:at + 50000]
for tls in (False, True):
    for data in (body, pieces()):
        status, answer = ask('POST', '/put/a', data, {{'X-Kind': 'a'}}, tls=tls)
        back = json.loads(answer)['body'].encode('latin-1')
        print(status, back == body)
"""
    call = ask(code)
    assert said(call) == "200 True\n" * 4
    assert call.usage is not None
    assert call.usage.network_out > 4 * 10 * 2**20


WEBSOCKET = """
import socket, ssl
def open_socket(port, path, upgrade='websocket', early=b''):
    sock = socket.create_connection(('api.http.test', port), timeout=10)
    if port == 444:
        sock = ssl.create_default_context().wrap_socket(sock, server_hostname='api.http.test')
    sock.sendall(f'GET {path} HTTP/1.1\\r\\nHost: api.http.test:{port}\\r\\n'
                 f'Connection: keep-alive, Upgrade\\r\\nUpgrade: {upgrade}\\r\\n'
                 'Sec-WebSocket-Key: k\\r\\n\\r\\n'.encode() + early)
    got = b''
    while b'\\r\\n\\r\\n' not in got:
        got += sock.recv(65536)
    return sock, got
def read(sock, size, got=b''):
    while len(got) < size:
        got += sock.recv(65536)
    return got
"""


@pytest.mark.parametrize("port", [84, 444])
def test_a_websocket_goes_where_a_rule_says_so(http: Daemon, ask: Python, port: int) -> None:
    Mirror.requests.clear()
    code = f"""{WEBSOCKET}
sock, got = open_socket({port}, '/ws', early=b'ab')
head, _, rest = got.partition(b'\\r\\n\\r\\n')
print(head.split()[1], b'sec-websocket-accept: x' in head.lower(), read(sock, 9, rest))
sock.sendall(b'GET /no HTTP/1.1\\r\\n\\r\\n' + bytes(300000))
print(len(read(sock, 600040)))
sock.close()
"""
    call = ask(code)
    assert said(call) == "b'101' True b'helloabab'\n600040\n"
    (event,) = requests(http, call)
    assert (event.verdict, event.status, event.path) == ("allowed", 101, "/ws")
    assert event.bytes_out > 300000
    assert event.bytes_in > 600000
    head = Mirror.requests[0]["head"].lower()
    assert b"upgrade: websocket" in head
    assert b"keep-alive" not in head


@pytest.mark.parametrize(
    ("path", "upgrade", "status"),
    [("/no", "websocket", 403), ("/no", "h2c", 502), ("/ws", "h2c", 502), ("/ws", "h2c, websocket", 502)],
)
def test_no_other_protocol_follows_http(ask: Python, path: str, upgrade: str, status: int) -> None:
    Mirror.requests.clear()
    call = ask(f"{WEBSOCKET}\nprint(open_socket(84, {path!r}, {upgrade!r})[1][:13])")
    assert said(call) == f"b'HTTP/1.1 {status} '\n"
    # a server that changes the protocol when nobody asked is believed nothing
    assert not any(b"upgrade" in each["head"].lower() for each in Mirror.requests)


def test_a_program_that_speaks_no_protocol_of_the_servers_is_told_so_by_tls(
    http: Daemon, ask: Python
) -> None:
    code = """
import socket, ssl
for protocols in (['h2'], ['foo']):
    context = ssl.create_default_context()
    context.set_alpn_protocols(protocols)
    made = socket.create_connection(('api.http.test', 443))
    try: context.wrap_socket(made, server_hostname='api.http.test')
    except ssl.SSLError as error: print('no application protocol' in str(error))
"""
    call = ask(code)
    assert said(call) == "True\n" * 2
    seen = [event.network for event in http.client().events(call.id) if event.network is not None]
    tcp = [event for event in seen if event.protocol == "tcp"]
    assert [event.verdict for event in tcp] == ["failed"] * 2
    assert "protocols" in tcp[0].why


def test_what_a_process_tells_in_the_end_fits_whatever_was_asked(http: Daemon, ask: Python) -> None:
    code = f"""{RAW}
for number in range(300):
    raw(b'GET /%d' % number + b'%ff' * 2000 + b' HTTP/1.1\\r\\n{HOST}{LAST}')
"""
    call = ask(code)
    assert sum(denial.count for denial in call.denials) == 300
    assert len(requests(http, call)) == 300
    assert said(ask(f"{ASK}\nprint(ask('GET', '/')[0])")) == "200\n"
