"""Daemons whose containers may reach some of a small internet."""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
from daemons import Daemon, start_daemon, until
from world import DNS, OTHER, PRIVATE, WWW, Echo, World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandboxd.models import Invocation

CONFIG = "network: {{nameservers: [{}], authorities: [{}]}}\n"
POLICY = """\
version: 1
name: net
extends: python
warm: !remove
network:
  allow:
    - {host: www.example.test, ports: [80, 443]}
    - {host: "*.api.test", ports: [443]}
    - {host: echo.example.test, ports: [7]}
    - {host: inside.example.test, ports: [80]}
    - {host: gone.example.test, ports: [80]}
    - {cidr: 10.91.7.0/24, ports: [80]}
  deny:
    - {host: bad.api.test}
"""


FETCH = "import urllib.request as u; print(u.urlopen('http://www.example.test/').read().decode(), end='')"
FOUND = "www.example.test /\n"

TALK = """
import socket
def talk(size):
    got = 0
    try:
        with socket.create_connection(('echo.example.test', 7), timeout=20) as s:
            data = memoryview(bytes(size))
            while data:
                data = data[s.send(data[:4096]):]
                while got < size - len(data):
                    read = len(s.recv(65536))
                    if not read: return got, 'end'
                    got += read
            return got, 'whole'
    except OSError as error:
        return got, type(error).__name__
"""


def workers(daemon: Daemon) -> list[psutil.Process]:
    """The processes that serve the network for this daemon."""
    found = []
    for child in psutil.Process(daemon.process.pid).children():
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if "sandboxd.egress" in child.cmdline():
                found.append(child)
    return found


def add_policy(daemon: Daemon, name: str, text: str) -> None:
    """Write a policy and wait until it is in force."""
    (daemon.policies / f"{name}.yaml").write_text(text)
    until(lambda: name in [policy.name for policy in daemon.client().policies()], f"{name} is in force")


@contextmanager
def start_networked(directory: Path, config: str = "", authorities: str = "") -> Iterator[Daemon]:
    """A daemon that asks the DNS of the world, with the policy ``net``."""
    with start_daemon(directory, config=CONFIG.format(DNS, authorities) + config) as daemon:
        add_policy(daemon, "net", POLICY)
        yield daemon


def fill(world: World) -> None:
    """Give the world the hosts that the policy speaks of."""
    world.records |= {
        "www.example.test": [WWW],
        "one.api.test": [WWW],
        "bad.api.test": [WWW],
        "echo.example.test": [WWW],
        "inside.example.test": [PRIVATE],
        "rebound.api.test": [PRIVATE],
        "other.example.test": [OTHER],
    }
    for address in (WWW, OTHER, PRIVATE):
        world.serve(address, 80)
    world.serve(WWW, 443, tls="www.example.test")
    world.serve(WWW, 7, Echo)


def out(call: Invocation) -> str:
    """What a call printed."""
    assert call.stdout is not None
    assert call.stderr is not None
    assert call.stderr.text == ""
    return call.stdout.text or ""


def reached(call: Invocation) -> list[tuple[str, int, bool]]:
    """The limits that it reached."""
    return [(limit.limit, limit.value, limit.ended) for limit in call.limits_reached]
