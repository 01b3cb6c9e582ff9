"""A policy's rules, by real programs in real containers: what they reach, what they are told where not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from world import METADATA, OTHER, PRIVATE, WWW

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon
    from world import World

    from sandboxd.models import Denial, Invocation, NetworkEvent

    Python = Callable[..., Invocation]

FETCH = "import urllib.request as u; print(u.urlopen('{}', timeout=10).read().decode(), end='')"
CONNECT = """
import socket
try:
    socket.create_connection(({address!r}, {port}), timeout=5)
    print('connected')
except OSError as error:
    print(type(error).__name__)
"""


def said(call: Invocation) -> str:
    """What a call printed."""
    assert call.outcome is not None
    assert call.stdout is not None, call.outcome
    assert call.stderr is not None
    return (call.stdout.text or "") + (call.stderr.text or "")


def events(daemon: Daemon, call: Invocation) -> list[NetworkEvent]:
    """What the call's stream says of its network."""
    return [event.network for event in daemon.client().events(call.id) if event.network is not None]


def only_denial(call: Invocation) -> Denial:
    """The one thing that was refused."""
    assert len(call.denials) == 1, call.denials
    return call.denials[0]


def test_an_allowed_name_is_reached(networked: Daemon, python: Python) -> None:
    call = python(FETCH.format("http://www.example.test/page"))
    assert said(call) == "www.example.test /page\n"
    assert call.denials == []
    assert call.usage is not None
    assert call.usage.connections == 1
    assert call.usage.network_in > 50
    (event,) = events(networked, call)
    assert (event.verdict, event.name, event.port, event.upstream) == ("allowed", "www.example.test", 80, WWW)
    assert event.rule is not None
    assert event.rule.endswith("net.yaml:7")
    assert event.bytes_in == call.usage.network_in
    assert event.duration > 0


def test_getsockname_says_what_was_meant_and_the_name_has_an_address_of_its_own(python: Python) -> None:
    code = """
import socket
infos = sorted({(f, a[0]) for f, *_, a in socket.getaddrinfo('www.example.test', 80)})
print(infos)
for family, address in infos:
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.connect((address, 80))
        s.sendall(b'GET / HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n')
        print(s.getpeername()[0] == address, s.recv(12))
"""
    call = python(code)
    lines = said(call).splitlines()
    assert "'198.18." in lines[0]
    assert "fd73:616e:6462:6f78:" in lines[0]
    assert lines[1:] == ["True b'HTTP/1.1 200'"] * 2


def test_other_names_do_not_exist_and_nobody_outside_is_asked(world: World, python: Python) -> None:
    world.asked.clear()
    secret = "c2vjcmv0.exfil.example.test"
    call = python(f"import socket\ntry: socket.getaddrinfo({secret!r}, 80)\nexcept OSError as e: print(e)")
    assert "Name or service not known" in said(call)
    denial = only_denial(call)
    assert (denial.kind, denial.name) == ("name", secret)
    assert denial.detail == f"no rule allows {secret}"
    assert denial.count >= 2  # A and AAAA
    assert not [name for name in world.asked if "exfil" in name]


def test_a_denied_name_says_which_rule(python: Python) -> None:
    call = python(
        "import socket\ntry: socket.getaddrinfo('bad.api.test', 443)\nexcept OSError as e: print(e)"
    )
    denial = only_denial(call)
    assert denial.detail == "bad.api.test is denied"
    assert denial.rule.endswith("net.yaml:14")


def test_another_port_of_an_allowed_name_is_refused_at_connect(python: Python) -> None:
    call = python(CONNECT.format(address="www.example.test", port=22))
    assert said(call) == "ConnectionRefusedError\n"
    denials = {denial.name: denial for denial in call.denials}
    assert denials.keys() == {"www.example.test:22"}
    denial = denials["www.example.test:22"]
    assert denial.kind == "connection"
    assert denial.detail == "www.example.test is allowed at ports 80, 443, not at 22"


@pytest.mark.parametrize(
    "address",
    [WWW, OTHER, METADATA, "2130706433", "0x5db8d822", "1.1.1.1", "::ffff:93.184.216.34",
     "2001:4860:4860::8888", "64:ff9b::5db8:d822", "2002:5db8:d822::1", "198.19.255.255", "fe80::1%lo",
     "224.0.0.1", "255.255.255.255", "fd73:616e:6462:6f78::1"],
)  # fmt: skip
def test_no_address_is_reached_directly(world: World, python: Python, address: str) -> None:
    world.reached.clear()
    call = python(CONNECT.format(address=address, port=80))
    assert said(call).strip() in {"ConnectionRefusedError", "OSError", "PermissionError", "gaierror"}
    assert world.reached == []


def test_an_address_that_stands_for_no_name_is_cut(world: World, python: Python) -> None:
    world.reached.clear()
    call = python(FETCH.format("http://198.18.200.200/"))
    assert "Connection reset" in said(call)
    assert only_denial(call).detail == "198.18.200.200 stands for no name that was asked for"
    assert world.reached == []


def test_an_address_in_an_allowed_network_is_reached_and_its_other_ports_are_not(
    networked: Daemon, python: Python
) -> None:
    call = python(FETCH.format(f"http://{PRIVATE}/direct"))
    assert said(call) == f"{PRIVATE} /direct\n"
    (event,) = events(networked, call)
    assert (event.name, event.address, event.upstream) == (None, PRIVATE, PRIVATE)
    call = python(CONNECT.format(address=PRIVATE, port=443))
    assert said(call) == "ConnectionRefusedError\n"
    assert only_denial(call).name == f"{PRIVATE}:443"


def test_a_name_that_is_inside_needs_a_network_that_is_allowed(world: World, python: Python) -> None:
    assert said(python(FETCH.format("http://inside.example.test/"))) == "inside.example.test /\n"
    world.reached.clear()
    call = python(FETCH.format("https://rebound.api.test/"))
    assert "Connection reset" in said(call) or "EOF" in said(call)
    assert world.reached == []
    (denial,) = call.denials
    assert denial.name == "rebound.api.test:443"
    assert "10.0.0.0/8" in denial.detail


def test_a_name_that_is_not_there_has_failed_and_was_not_denied(networked: Daemon, python: Python) -> None:
    call = python(FETCH.format("http://gone.example.test/"))
    assert "Connection reset" in said(call)
    assert call.denials == []
    (event,) = events(networked, call)
    assert (event.verdict, event.why) == ("failed", "the name gone.example.test has no address")


TLS = """
import socket, ssl
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
raw = socket.create_connection(('www.example.test', 443), timeout=10)
try:
    with context.wrap_socket(raw, server_hostname={name!r}) as s:
        s.sendall(b'GET /tls HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n')
        print(s.recv(12))
except ssl.SSLError as error:
    print(error.reason)
"""


def test_tls_to_the_name_that_was_asked_for(networked: Daemon, python: Python) -> None:
    call = python(TLS.format(name="www.example.test"))
    assert said(call) == "b'HTTP/1.1 200'\n"
    assert [event.verdict for event in events(networked, call)] == ["allowed"]


@pytest.mark.parametrize("name", ["other.example.test", None])
def test_tls_to_another_name_is_refused_with_an_alert(world: World, python: Python, name: str | None) -> None:
    world.reached.clear()
    call = python(TLS.format(name=name))
    assert said(call) == "TLSV1_UNRECOGNIZED_NAME\n"
    assert only_denial(call).name == "www.example.test:443"
    assert ("names other.example.test" if name else "names no server") in only_denial(call).detail


def test_udp_and_other_protocols_go_nowhere(python: Python) -> None:
    code = f"""
import socket
for port in (123, 443):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        s.connect(('{WWW}', port)); s.send(b'x'); s.settimeout(2); s.recv(1)
    except OSError as error:
        print(type(error).__name__)
"""
    call = python(code)
    assert set(said(call).split()) <= {"PermissionError", "OSError"}, said(call)
    assert {denial.name for denial in call.denials} == {f"{WWW}:123", f"{WWW}:443"}
    assert all(denial.detail.startswith("udp leaves no container") for denial in call.denials)


def test_the_tools_own_servers_are_its_own(networked: Daemon, python: Python) -> None:
    code = """
import socket
for family, address in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1'), (socket.AF_INET, '0.0.0.0')):
    for port in (8080 + len(address), 53000 + len(address)):
        server = socket.socket(family); server.bind((address, port)); server.listen()
        client = socket.socket(family); client.connect((address, port))
        client.sendall(b'mine'); print(server.accept()[0].recv(4)); server.close()
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(('127.0.0.1', 9999))
other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); other.sendto(b'mine', ('127.0.0.1', 9999))
print(udp.recv(4))
"""
    call = python(code)
    assert said(call) == "b'mine'\n" * 7
    assert call.denials == []
    assert events(networked, call) == []


def test_what_listens_on_the_host_is_not_there(python: Python) -> None:
    import socket  # noqa: PLC0415

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        call = python(CONNECT.format(address="127.0.0.1", port=port))
        assert said(call) == "ConnectionRefusedError\n"
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_policy_without_a_network_has_a_loopback_and_no_more(python: Python) -> None:
    call = python(CONNECT.format(address=WWW, port=80), policy="python")
    assert said(call) == "OSError\n"
