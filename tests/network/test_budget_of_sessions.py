"""What all calls of a session may use of the network together: never more, whatever happens between them."""

from __future__ import annotations

import random
import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from daemons import PATIENCE, until
from networked import TALK, add_policy, out, reached, start_networked, workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation

POLICY = """\
version: 1
name: {name}
extends: python
warm: !remove
network:
  allow: [{{host: echo.example.test, ports: [7]}}]
  budget: {{{own}session: {{{session}}}}}
"""
IN_PIECES = "\nimport sys\nprint(sum(talk(int(size))[0] for size in sys.argv[1:]))"


@pytest.fixture
def policy(networked: Daemon) -> Callable[..., str]:
    """Put a policy with this budget in force."""

    def add(name: str, session: str, own: str = "") -> str:
        add_policy(networked, name, POLICY.format(name=name, session=session, own=own))
        return name

    return add


@pytest.fixture
def session(networked: Daemon) -> Iterator[Callable[..., str]]:
    """Make a session."""
    with ExitStack() as stack:
        client = networked.client()

        def make(**fields: Any) -> str:
            made = client.create_session(**fields).id
            stack.callback(client.delete_session, made)
            return made

        yield make


def talk(daemon: Daemon, policy: str, session: str | None, *sizes: int) -> Invocation:
    """One call that has so many bytes echoed, on connections one after another."""
    return daemon.run("python3", "-c", TALK + IN_PIECES, *map(str, sizes), policy=policy, session=session)


def used(daemon: Daemon, session: str) -> dict[str, int]:
    """What a session says that its calls used."""
    return daemon.client().session(session).network.model_dump()


def test_calls_share_it_one_after_another(
    networked: Daemon, policy: Callable[..., str], session: Callable[..., str]
) -> None:
    name, found = policy("shared", "bytes: 50000B, connections: 5"), session()
    first = talk(networked, name, found, 10_000)
    assert (out(first), reached(first)) == ("10000\n", [])
    assert used(networked, found) == {
        "bytes": 20_000, "bytes_in": 10_000, "bytes_out": 10_000, "connections": 1, "requests": 0,
    }  # fmt: skip
    second = talk(networked, name, found, 20_000)
    assert reached(second) == [("network.budget.session.bytes", 50_000, False)]
    assert second.usage is not None
    assert second.usage.network_in + second.usage.network_out == 30_000
    third = talk(networked, name, found, 1, 1, 1)
    assert (out(third), third.usage and third.usage.network_out) == ("0\n", 0)
    assert reached(third) == [("network.budget.session.bytes", 50_000, False)]
    fourth = talk(networked, name, found, 1)
    assert reached(fourth) == [("network.budget.session.connections", 5, False)]
    assert used(networked, found)["bytes"] == 50_000
    other = talk(networked, name, session(), 10_000)  # each session has its own
    alone = talk(networked, name, None, 10_000)
    assert reached(other) == reached(alone) == []


def test_the_calls_own_is_kept_beside_it(
    networked: Daemon, policy: Callable[..., str], session: Callable[..., str]
) -> None:
    name, found = policy("both", "bytes: 50000B", "bytes: 20000B, "), session()
    for _ in range(2):
        call = talk(networked, name, found, 15_000)
        assert reached(call) == [("network.budget.bytes", 20_000, False)]
    last = talk(networked, name, found, 15_000)
    assert reached(last) == [("network.budget.session.bytes", 50_000, False)]
    assert used(networked, found)["bytes"] == 50_000


def test_it_counts_what_calls_of_other_policies_used(
    networked: Daemon, policy: Callable[..., str], session: Callable[..., str]
) -> None:
    name, found = policy("counted", "connections: 2"), session()
    talk(networked, "net", found, 10, 10)
    assert used(networked, found)["connections"] == 2
    assert reached(talk(networked, name, found, 10)) == [("network.budget.session.connections", 2, False)]


def test_a_fork_begins_with_what_was_used(
    networked: Daemon, policy: Callable[..., str], session: Callable[..., str]
) -> None:
    name, found = policy("forked", "connections: 2"), session()
    talk(networked, name, found, 10)
    client = networked.client()
    fork = client.fork_session(found).id
    try:
        assert used(networked, fork) == used(networked, found)
        call = talk(networked, name, fork, 10, 10)
        assert reached(call) == [("network.budget.session.connections", 2, False)]
        assert used(networked, found)["connections"] == 1
    finally:
        client.delete_session(fork)


def test_a_call_that_is_cancelled_is_counted(
    networked: Daemon, policy: Callable[..., str], session: Callable[..., str]
) -> None:
    name, found = policy("cancelled", "bytes: 50000B"), session()
    code = TALK + "\nprint(talk(10000), flush=True)\nimport time\ntime.sleep(50)"
    client = networked.client()
    call = client.start(["python3", "-c", code], policy=name, session=found)
    until(lambda: b"whole" in b"".join(client.stdout(call.id)), "it has talked")
    client.cancel(call.id)
    assert used(networked, found)["bytes"] == 20_000


def robbed(daemon: Daemon, policy: str, session: str) -> Invocation:
    """A call whose process for the network dies between two connections."""
    code = f"import sys\n{TALK}\nprint(talk(3000), flush=True)\nsys.stdin.readline()\nprint(talk(3000))"
    client = daemon.client()
    call = client.start(["python3", "-c", code], policy=policy, session=session, stdin="stream")
    until(lambda: b"whole" in b"".join(client.stdout(call.id)), "it has talked")
    for worker in workers(daemon):
        worker.kill()
    client.write_stdin(call.id, b"go\n")
    done = client.wait(call.id, timeout=60 * PATIENCE)
    assert "failed" in [one.network.verdict for one in list(client.events(call.id)) if one.network]
    return done


def test_never_more_in_any_order(
    networked: Daemon, policy: Callable[..., str], session: Callable[..., str]
) -> None:
    """Calls of random sizes, some of whose processes for the network die meanwhile."""
    most = {"bytes": 60_000, "bytes_out": 40_000, "connections": 12}
    name = policy("property", "bytes: 60000B, bytes_out: 40000B, connections: 12", "bytes: 15000B, ")
    choose = random.Random(6)
    found, went = session(), {"bytes": 0, "bytes_out": 0, "connections": 0}
    for number in range(10):
        sizes = [choose.randrange(1, 9000) for _ in range(choose.randrange(1, 4))]
        done = robbed(networked, name, found) if number == 4 else talk(networked, name, found, *sizes)
        assert done.usage is not None
        went["bytes"] += done.usage.network_in + done.usage.network_out
        went["bytes_out"] += done.usage.network_out
        went["connections"] += done.usage.connections
        told = used(networked, found)
        assert all(went[what] <= told[what] <= limit for what, limit in most.items()), (went, told)
    assert any(told[what] == limit for what, limit in most.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_survives_the_daemon(world: World, tmp_path: Path, number: int) -> None:
    """What a killed daemon's call may have used counts as used, as far as the call's own budget goes."""
    text = POLICY.format(name="kept", session="bytes: 60000B", own="bytes: 30000B, ")
    code = TALK + "\nprint(talk(5000), flush=True)\nimport time\ntime.sleep(50)"
    with start_networked(tmp_path) as first:
        add_policy(first, "kept", text)
        client = first.client()
        found = client.create_session("lasting").id
        talk(first, "kept", found, 5000)
        call = client.start(["python3", "-c", code], policy="kept", session=found)
        until(lambda: b"whole" in b"".join(client.stdout(call.id)), "it has talked")
        first.process.send_signal(number)
        if number == signal.SIGTERM:
            until(lambda: client.health().status == "draining", "it drains")
            first.process.send_signal(signal.SIGTERM)
        first.process.wait(60)
    with start_networked(tmp_path) as second:
        assert used(second, found)["bytes"] == (20_000 if number == signal.SIGTERM else 40_000)
        last = talk(second, "kept", found, 20_000)
        assert last.usage is not None
        went = last.usage.network_in + last.usage.network_out
        assert went == (30_000 if number == signal.SIGTERM else 20_000)


def test_what_is_used_is_known_of_a_process_that_dies(networked: Daemon) -> None:
    code = (
        TALK
        + """
import sys
print(talk(10000), flush=True)
try: socket.create_connection(('198.51.100.7', 25), timeout=5)
except OSError: pass
sys.stdin.readline()
print(talk(20000))
"""
    )
    client = networked.client()
    call = client.start(["python3", "-c", code], policy="net", stdin="stream")
    until(lambda: b"whole" in b"".join(client.stdout(call.id)), "it has talked")

    def refused() -> bool:
        events = [one.network for one in client.events(call.id, follow=False)]
        return "denied" in [one.verdict for one in events if one is not None]

    until(refused, "it was refused")
    time.sleep(1)  # several times as long as nothing is told
    (worker,) = workers(networked)
    worker.kill()
    until(lambda: worker not in workers(networked), "it is gone")
    client.write_stdin(call.id, b"go\n")
    done = client.wait(call.id, timeout=60 * PATIENCE)
    assert out(done).count("whole") == 2
    assert done.usage is not None
    assert done.usage.connections == 2
    assert (done.usage.network_out, done.usage.network_in) == (30_000, 30_000)
    assert [(denial.name, denial.count) for denial in done.denials] == [("198.51.100.7:25", 1)]
