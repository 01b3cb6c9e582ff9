"""Sockets from inside: no family that speaks beyond the container, no address, no host's socket."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import Invocation

    Probe = Callable[..., tuple[dict[str, str], Invocation]]

UNREACHABLE = {"ENETUNREACH", "EADDRNOTAVAIL", "EHOSTUNREACH"}
OWN = {"unix", "tcp", "udp", "tcp6", "netlink route"}


def addresses() -> list[str]:
    """Every address of this host, without zones."""
    found = [a.address.partition("%")[0] for many in psutil.net_if_addrs().values() for a in many
             if a.family in {socket.AF_INET, socket.AF_INET6}]  # fmt: skip
    return sorted(set(found) - {"127.0.0.1", "::1"})


@pytest.mark.parametrize("policy", ["default", "build"])
def test_only_local_and_internet_sockets_can_be_made(probe: Probe, policy: str) -> None:
    results, found = probe("sockets", policy=policy)
    assert {name for name, result in results.items() if result == "0"} == OWN
    assert results.pop("mptcp") == "EPROTONOSUPPORT"
    refused = {name: result for name, result in results.items() if name not in OWN}
    assert set(refused.values()) == {"EPERM"}
    counts = {denial.name: denial.count for denial in found.denials}
    pairs = [name for name in refused if name.startswith("socketpair")]
    assert counts == {"socket": len(refused) - len(pairs), "socketpair": len(pairs)}


def test_the_strict_policy_has_local_sockets_alone(probe: Probe) -> None:
    results, _ = probe("sockets", policy="strict")
    assert {name for name, result in results.items() if result == "0"} == {"unix"}


def test_no_address_can_be_reached(probe: Probe) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        everywhere = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
        six = stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6))
        local, wide, wide6 = (one.getsockname()[1] for one in (listener, everywhere, six))
        own = [f"{address}:{wide6 if ':' in address else wide}" for address in addresses()]
        loopback = [f"{host}:{wide}" for host in ("127.0.0.1", "127.9.9.9", "0.0.0.0", "::ffff:127.0.0.1")]
        loopback += [f"127.0.0.1:{local}", f"::1:{wide6}", f":::{wide6}"]
        outside = ["8.8.8.8:53", "1.1.1.1:443", "169.254.169.254:80", "10.0.0.1:22", "172.17.0.1:80",
                   "192.168.0.1:80", "224.0.0.1:80", "255.255.255.255:80", "2001:4860:4860::8888:53",
                   "fe80::1:80", "fd00::1:80", "ff02::1:80", "::ffff:8.8.8.8:53",
                   "64:ff9b::808:808:53"]  # fmt: skip
        results, found = probe("connects", *own, *loopback, *outside)
        for target in own + outside:
            assert results[target] in UNREACHABLE | {"EINVAL", "EACCES"}, (target, results[target])
        for target in loopback:  # the container's own loopback, where nobody listens
            assert results[target] in UNREACHABLE | {"ECONNREFUSED"}, (target, results[target])
        for one in (listener, everywhere, six):
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.accept()
    assert found.denials == []  # these sockets may be made; the network is what is not there


def test_no_datagram_leaves(probe: Probe) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 0))
        port = server.getsockname()[1]
        targets = [
            f"udp:{address}:{port}" for address in ["127.0.0.1", "8.8.8.8", *addresses()] if "." in address
        ]
        results, _ = probe("connects", *targets)
        assert "0" not in results.values()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(1)


def test_abstract_sockets_of_the_host_are_not_there(probe: Probe, run_token: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0sandboxd-{run_token}")
        server.listen()
        accepted = threading.Event()
        results, _ = probe("connects", f"abstract:sandboxd-{run_token}")
        assert results == {f"abstract:sandboxd-{run_token}": "ECONNREFUSED"}
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        assert not accepted.is_set()


def test_the_container_has_a_loopback_of_its_own(daemon: Daemon) -> None:
    code = (
        "import socket, threading\n"
        "s = socket.create_server(('127.0.0.1', 8080))\n"
        "threading.Thread(target=lambda: s.accept()[0].sendall(b'own'), daemon=True).start()\n"
        "print(socket.create_connection(('127.0.0.1', 8080), 5).recv(3).decode())\n"
        "print(sorted(name for _, name in socket.if_nameindex()))\n"
    )
    found = daemon.run("python3", "-c", code, policy="python")
    assert found.stdout is not None
    assert found.stdout.text == "own\n['lo']\n", found.stderr
