"""How much of the network a call may use: bytes, connections, how fast."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE, until
from networked import TALK, add_policy, out, reached, workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import Invocation

POLICY = """\
version: 1
name: {name}
extends: python
warm: !remove
network:
  allow: [{{host: echo.example.test, ports: [7]}}]
  budget: {{{budget}}}
"""


@pytest.fixture
def under(networked: Daemon) -> Callable[[str, str, str], Invocation]:
    """Run code under a policy with this budget."""

    def run(name: str, budget: str, code: str) -> Invocation:
        add_policy(networked, name, POLICY.format(name=name, budget=budget))
        return networked.run("python3", "-c", TALK + code, policy=name)

    return run


@pytest.mark.parametrize(
    ("budget", "limit", "value"),
    [
        ("bytes: 100KiB", "bytes", 100 << 10),
        ("bytes_in: 50KiB", "bytes_in", 50 << 10),
        ("bytes_out: 50KiB", "bytes_out", 50 << 10),
    ],
)
def test_bytes(under: Callable[..., Invocation], budget: str, limit: str, value: int) -> None:
    call = under(limit.replace("_", "-"), budget, "print(talk(1 << 20), talk(1))")
    assert out(call).count("Reset") >= 1
    assert reached(call) == [(f"network.budget.{limit}", value, False)]
    assert call.usage is not None
    used = {
        "bytes": call.usage.network_in + call.usage.network_out,
        "bytes_in": call.usage.network_in,
        "bytes_out": call.usage.network_out,
    }
    assert used[limit] == value
    assert call.denials == []


def test_what_just_fits_is_whole(under: Callable[..., Invocation]) -> None:
    call = under("fits", "bytes: 20000B", "print(talk(10000))")
    assert out(call) == "(10000, 'whole')\n"
    assert reached(call) == []


def test_connections(under: Callable[..., Invocation]) -> None:
    call = under("three", "connections: 3", "print([talk(1) for _ in range(5)])")
    assert out(call).count("whole") == 3
    assert out(call).count("Reset") == 2
    assert reached(call) == [("network.budget.connections", 3, False)]
    assert call.usage is not None
    assert call.usage.connections == 3


def test_connections_each_second(under: Callable[..., Invocation]) -> None:
    code = "import time\nprint([talk(1) for _ in range(30)])\ntime.sleep(1.1)\nprint(talk(1))"
    call = under("rate", "connection_rate: 10", code)
    first, last = out(call).splitlines()
    assert 10 <= first.count("whole") < 30
    assert "whole" in last
    assert reached(call) == [("network.budget.connection_rate", 10, False)]


def test_bandwidth(under: Callable[..., Invocation]) -> None:
    begun = time.monotonic()
    call = under("slow", "bandwidth: 1MiB", "print(talk(1 << 20))")
    assert out(call) == f"({1 << 20}, 'whole')\n"
    assert time.monotonic() - begun > 1.5  # two MiB, there and back
    assert reached(call) == []


def test_a_budget_does_not_begin_anew_when_the_process_that_counts_dies(networked: Daemon) -> None:
    add_policy(networked, "recount", POLICY.format(name="recount", budget="connections: 1"))
    code = """
import socket, sys
with socket.create_connection(('echo.example.test', 7), timeout=10) as s:
    s.sendall(b'x'); s.recv(1)
    address = s.getpeername()
print('one', flush=True)
sys.stdin.readline()
try: socket.create_connection(address, timeout=10).recv(1)
except OSError as error: print(type(error).__name__)
"""
    client = networked.client()
    call = client.start(["python3", "-c", code], policy="recount", stdin="stream")
    until(lambda: (out := client.get(call.id).stdout) and out.size, "a connection was made")
    (worker,) = workers(networked)
    worker.kill()
    until(lambda: worker not in workers(networked), "it is gone")
    client.write_stdin(call.id, b"go\n")
    done = client.wait(call.id, timeout=60 * PATIENCE)
    assert done.stdout is not None
    assert done.stdout.text in {"one\nConnectionRefusedError\n", "one\nConnectionResetError\n"}
