"""The network: what a policy allows is reached by its name, everything else is refused and reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandboxd.conformance.case import controls, text
from sandboxd.conformance.outside import MOVED, SERVED
from sandboxd.conformance.plugin import needs

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Invocation, NetworkEvent

TALK = """
import socket, sys
for target in sys.argv[1:]:
    host, _, port = target.rpartition(':')
    try:
        with socket.create_connection((host, int(port)), timeout=20) as s:
            s.sendall(b'said'); print('answer', s.recv(4))
    except OSError as error:
        print(type(error).__name__)
"""
REFUSED = "ConnectionRefusedError\n"


def talk(subject: Subject, *targets: str, policy: str = "network", session: str | None = None) -> Invocation:
    """A call that connects to these, says something and prints the answer."""
    return subject.run("python3", "-c", TALK, *targets, policy=policy, session=session)


def events(subject: Subject, call: Invocation) -> list[NetworkEvent]:
    """What the call's events say of its network."""
    return [event.network for event in subject.client.events(call.id) if event.network is not None]


@needs("a daemon of the suite's own")
def test_an_allowed_name_is_reached(subject: Subject) -> None:
    call = talk(subject, f"{SERVED}:{subject.outside.port}")
    assert text(call) == "answer b'said'\n"
    assert call.denials == []
    assert call.usage is not None
    assert (call.usage.connections, call.usage.network_out, call.usage.network_in) == (1, 4, 4)
    (event,) = events(subject, call)
    assert (event.verdict, event.name, event.upstream) == ("allowed", SERVED, "127.0.0.1")
    assert (event.bytes_out, event.bytes_in) == (4, 4)
    assert event.rule is not None
    assert "conformance-network.yaml:" in event.rule


@needs("a daemon of the suite's own")
def test_a_name_does_not_lead_to_where_no_rule_lets_it(subject: Subject) -> None:
    before = subject.outside.connections
    call = talk(subject, f"{MOVED}:{subject.outside.port}", policy="network-outside")
    assert text(call) == "ConnectionResetError\n"
    (denial,) = call.denials
    assert (denial.kind, denial.name) == ("connection", f"{MOVED}:{subject.outside.port}")
    assert "127.0.0.0/8" in denial.detail
    assert subject.outside.connections == before


@needs("a daemon of the suite's own")
def test_a_name_that_is_not_allowed_is_asked_of_nobody(subject: Subject) -> None:
    call = talk(subject, "carried-out.conformance.test:443")
    assert text(call) == "gaierror\n"
    assert [(one.kind, one.name) for one in call.denials] == [("name", "carried-out.conformance.test")]
    assert "carried-out.conformance.test" not in subject.outside.asked


def test_another_port_and_other_addresses_are_refused_at_connect(subject: Subject) -> None:
    targets = [f"{SERVED}:22", "169.254.169.254:80", "192.0.2.1:443", "10.0.0.1:443", "::ffff:8.8.8.8:53000"]
    call = talk(subject, *targets)
    assert text(call) == REFUSED * 5
    names = {denial.name for denial in call.denials if denial.kind == "connection"}
    assert {f"{SERVED}:22", "169.254.169.254:80", "192.0.2.1:443", "10.0.0.1:443", "8.8.8.8:53000"} == names
    assert {event.verdict for event in events(subject, call)} == {"denied"}


def test_other_protocols_leave_no_container(subject: Subject) -> None:
    code = (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "try: s.sendto(b'x', ('192.0.2.1', 123))\nexcept OSError as e: print(e.errno)"
    )
    call = subject.run("python3", "-c", code, policy="network")
    assert text(call) == "1\n"
    assert [denial.name for denial in call.denials] == ["192.0.2.1:123"]


@pytest.mark.parametrize("policy", ["network", "python"])
def test_the_loopback_is_the_containers_own(subject: Subject, policy: str) -> None:
    code = (
        "import socket\nfor family, host in ((2, '127.0.0.1'), (10, '::1')):\n"
        " s = socket.socket(family); s.bind((host, 8080)); s.listen()\n"
        " c = socket.socket(family); c.connect((host, 8080)); c.sendall(b'mine')\n"
        " print(s.accept()[0].recv(4))"
    )
    call = subject.run("python3", "-c", code, policy=policy)
    assert text(call) == "b'mine'\n" * 2, text(call, "stderr")
    assert call.denials == []


@needs("a daemon of the suite's own")
def test_what_listens_on_the_host_is_not_there(subject: Subject) -> None:
    before = subject.outside.connections
    for policy in ("network", "python"):
        assert text(talk(subject, f"127.0.0.1:{subject.outside.port}", policy=policy)) == REFUSED
    assert subject.outside.connections == before


@needs("a daemon of the suite's own")
def test_a_budget_is_kept(subject: Subject) -> None:
    target = f"{SERVED}:{subject.outside.port}"
    call = talk(subject, *[target] * 4, policy="network-budget")
    assert text(call) == "answer b'said'\n" * 2 + "ConnectionResetError\n" * 2
    assert [(one.limit, one.value, one.ended) for one in call.limits_reached] == [
        ("network.budget.connections", 2, False)
    ]


@needs("a daemon of the suite's own")
def test_a_budget_of_a_session_is_kept_over_its_calls(subject: Subject) -> None:
    target = f"{SERVED}:{subject.outside.port}"
    session = subject.client.create_session().id
    try:
        first = talk(subject, *[target] * 2, policy="network-session", session=session)
        second = talk(subject, *[target] * 2, policy="network-session", session=session)
        used = subject.client.session(session).network.connections
    finally:
        subject.client.delete_session(session)
    assert text(first) == "answer b'said'\n" * 2
    assert first.limits_reached == []
    assert text(second) == "answer b'said'\nConnectionResetError\n"
    assert [(one.limit, one.value) for one in second.limits_reached] == [
        ("network.budget.session.connections", 3)
    ]
    assert used == 3


@needs("a daemon of the suite's own")
def test_what_was_written_before_the_end_arrives(subject: Subject) -> None:
    code = (
        "import os, socket\n"
        f"s = socket.create_connection(('{SERVED}', {subject.outside.port}))\n"
        "s.sendall(b'said'); os._exit(0)"
    )
    call = subject.run("python3", "-c", code, policy="network")
    assert [(one.verdict, one.bytes_out) for one in events(subject, call)] == [("allowed", 4)]
    assert call.usage is not None
    assert call.usage.network_out == 4


def test_the_receipt_has_the_filter_that_is_in_force(subject: Subject) -> None:
    found = controls(subject.run("true", policy="network"))
    assert found["network"].in_force == "lo"
    assert found["network_filter"].in_force == found["network_filter"].asked
    assert found["network_filter"].in_force.startswith("sha256:")
    assert "ip_unprivileged_port_start=1024" in found["network_sysctls"].in_force
    assert "network_filter" not in controls(subject.run("true"))


def test_a_tool_cannot_change_it(subject: Subject) -> None:
    code = (
        "import socket, struct\n"
        "link = struct.pack('IHHII', 32, 16, 5, 1, 0) + struct.pack('BxHiII', 0, 0, 1, 0, 1)\n"
        "s = socket.socket(16, 3, 0); s.send(link); print(struct.unpack('i', s.recv(99)[16:20])[0])\n"
        "for make in (lambda: socket.socket(16, 3, 12), lambda: socket.socket(2, 3, 6),\n"
        "             lambda: socket.socket().bind(('', 1)), lambda: socket.socket(2, 2).bind(('', 53)),\n"
        "             lambda: socket.socket().setsockopt(0, 19, 1),\n"
        "             lambda: socket.socket().setsockopt(1, 36, 1)):\n"
        "    try: make(); print('done')\n"
        "    except OSError as error: print(error.errno)"
    )
    call = subject.run("python3", "-c", code, policy="network")
    assert text(call).split() == ["-1", "1", "1", "13", "13", "1", "1"], text(call, "stderr")


@needs("the host's network")
def test_the_hosts_network_is_had_in_that_mode_alone(subject: Subject) -> None:
    target = f"127.0.0.1:{subject.outside.port}"
    assert text(talk(subject, target, policy="host")) == "answer b'said'\n"
    assert text(talk(subject, target, policy="python")) == REFUSED


@needs("the host's network")
def test_the_receipt_shouts_that_the_network_is_the_hosts(subject: Subject) -> None:
    call = subject.run("true", policy="host")
    assert call.receipt is not None
    assert ["HOST'S OWN NETWORK" in warning for warning in call.receipt.warnings] == [True]
    found, others = controls(call), controls(subject.run("true", policy="python"))
    assert found["network"].in_force.startswith("NONE OF ITS OWN: the host's net:[")
    assert set(others) - set(found) == {"net_namespace", "network_routes"}
    assert set(found) <= set(others)


@needs("the host's network")
def test_a_tool_cannot_change_the_hosts_network(subject: Subject) -> None:
    code = (
        "import socket, struct\n"
        "link = struct.pack('IHHII', 32, 16, 5, 1, 0) + struct.pack('BxHiII', 0, 0, 1, 0, 1)\n"
        "s = socket.socket(16, 3, 0); s.send(link); print(struct.unpack('i', s.recv(99)[16:20])[0])\n"
        "for make in (lambda: socket.socket(16, 3, 12), lambda: socket.socket(2, 3, 6),\n"
        "             lambda: socket.socket(17, 3, 3), lambda: socket.socket().setsockopt(1, 36, 1),\n"
        "             lambda: open('/proc/sys/net/ipv4/ip_forward', 'w')):\n"
        "    try: make(); print('done')\n"
        "    except OSError: print('refused')"
    )
    assert text(subject.run("python3", "-c", code, policy="host")).split() == ["-1", *["refused"] * 5]
