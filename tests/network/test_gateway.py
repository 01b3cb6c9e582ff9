"""The daemon's side of a process that serves connections, when that process is somebody else's."""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import dns.message
import pytest
from gateways import Unconfined, knock, pretend, served

from sandboxd import errors
from sandboxd.config import NetworkConfig
from sandboxd.engine.probe import probe_shape
from sandboxd.journal.spool import Spool
from sandboxd.kernel.inside import in_network_namespace
from sandboxd.models import NetworkUse
from sandboxd.network.authority import Authority
from sandboxd.network.entrance import Entrances
from sandboxd.network.gateway import Gateway
from sandboxd.network.questions import Answer, Question
from sandboxd.network.served import MAX_EVENTS
from sandboxd.plan import Grant
from sandboxd.reach import Allow, NetworkRules
from sandboxd.secrets import SecretStore, place_of
from sandboxd.supervisor.network import CallNetwork
from sandboxd.supervisor.secrets import CallSecrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sandboxd.kernel.cgroup import CgroupLimits
    from sandboxd.models import NetworkEvent

pytestmark = pytest.mark.anyio

AUTHORITY = Authority.make()
RULES = NetworkRules((Allow("www.example.test", (80,), "net.yaml:1"),), ())
ASKING = NetworkRules((Allow("www.example.test", (80,), "net.yaml:1", ask=True),), ())
CONFIG = NetworkConfig.model_validate({"nameservers": ["192.0.2.53"]})
EVENT = '["event", {"id": "ID", "verdict": "denied"}]'

ASK = (
    '["ask", {"id": "ID", "number": 1, "protocol": "tcp", "name": "a", "address": "", "port": 1, '
    '"method": "", "path": "", "rule": null}]'
)

CONNECT = '["connect", {"id": "ID", "number": 1, "address": "ADDRESS", "port": 80}]'
QUERY = '["query", {"number": 1, "server": "192.0.2.53", "data": "QQ=="}]'
NOWHERE = [
    "127.0.0.1", "::1", "0.0.0.0", "::", "10.1.2.3", "192.168.1.1", "169.254.169.254", "::ffff:127.0.0.1",
    "64:ff9b::7f00:1", "fe80::1", "fe80::1%1", "fd00::1", "224.0.0.1", "198.18.0.1", "name.example",
]  # fmt: skip


class Refusing(Unconfined):
    """None can be made."""

    async def confine(self, name: str, pid: int, limits: CgroupLimits) -> None:
        raise errors.HostFailed("no cgroup")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def hostile(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have every process that serves be one that says these messages, once it has a container."""

    def say(*messages: str) -> None:
        pretend(monkeypatch, tmp_path_factory.mktemp("hostile"), "serve", *messages)

    return say


async def undecided(question: Question) -> Answer:
    """Who has better things to do."""
    await anyio.sleep_forever()
    raise AssertionError(question)


async def serve_until_given_up(confining: Unconfined) -> list[NetworkEvent]:
    """The events of a call whose container no process serves in the end."""
    events: list[NetworkEvent] = []
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(CONFIG, confining, tasks, AUTHORITY)
        with served(RULES) as (namespace, made), anyio.fail_after(60):
            await gateway.serve("call", 0, made, events.append, decide=undecided)
            knock(namespace)
            while made.doors.tcp >= 0:  # noqa: ASYNC110  (no event tells)
                await anyio.sleep(0.01)
            await gateway.begin_end("call")
            await gateway.end("call")
        tasks.cancel_scope.cancel()
    return events


@pytest.mark.parametrize(
    "message",
    [
        "{}",
        "[" * 100_000,
        '["event", []]',
        '["event", {"id": "other", "verdict": "denied"}]',
        '["event", {"id": ["ID"], "verdict": "denied"}]',
        '["event", {"verdict": "denied"}]',
        '["event", {"id": "ID", "verdict": "fine"}]',
        '["event", {"id": "ID", "verdict": "denied", "why": "%s"}]' % ("x" * 5000),
        '["event", {"id": "ID", "verdict": "denied", "why": "\\ud800"}]',
        '["event", {"id": "ID", "verdict": "denied", "bytes_in": 1%s}]' % ("0" * 30),
        '["name", {"id": "ID", "name": "a", "address": "::1"}]',
        '["name", {"id": "ID", "name": "a"}]',
        '["ended", {"id": "ID", "connections": -1}]',
        '["ended", {"id": "ID", "bytes_out": 1%s}]' % ("0" * 30),
        '["ended", {"id": "ID", "refusals": [{"protocol": "tcp"}]}]',
        '["fault", {"id": "ID"}]',
        '["serve", {"id": "ID"}]',
        ASK.replace('"name": "a", ', ""),
        ASK.replace('"number": 1', '"number": -1'),
        ASK.replace('"name": "a"', '"name": "%s"' % ("a" * 2000)),
        f"{ASK}\n{ASK}",
        "\n".join(ASK.replace('"number": 1', f'"number": {number}') for number in range(1, 66)),
        *(CONNECT.replace("ADDRESS", address) for address in NOWHERE),
        CONNECT.replace("ADDRESS", "93.184.216.34").replace("80", "81"),
        CONNECT.replace("ADDRESS", "93.184.216.34").replace("80", "0"),
        CONNECT.replace("ADDRESS", "93.184.216.53").replace('"id": "ID", ', "").replace("80", "53"),
        CONNECT.replace("ADDRESS", "192.0.2.53").replace('"id": "ID", ', ""),
        QUERY.replace("192.0.2.53", "127.0.0.1"),
        QUERY.replace("QQ==", "QQ"),
        QUERY.replace("QQ==", "QQ==" * 1000),
        f"{QUERY}\n{QUERY}",
        '["enough", {}]',
        '["withdraw", {"id": "ID"}]',
        '["withdraw", {"id": "ID", "number": []}]',
        "\n".join([EVENT] * (MAX_EVENTS + 1)),
    ],
    ids=range(25 + 9 + len(NOWHERE)),
)
async def test_what_says_more_than_it_may_is_ended(hostile: Callable[..., None], message: str) -> None:
    hostile(message)
    events = await serve_until_given_up(Unconfined())
    assert len([event for event in events if event.verdict == "failed"]) == 4


async def test_a_process_that_cannot_be_confined_serves_nobody_and_holds_up_nobody() -> None:
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(NetworkConfig(), Refusing(), tasks, AUTHORITY)
        with served(RULES) as (_, made), anyio.fail_after(20):
            for _ in range(3):
                with pytest.raises(errors.HostFailed, match="no cgroup"):
                    await gateway.serve("call", 0, made, lambda _: None)
        tasks.cancel_scope.cancel()


async def test_a_last_word_that_does_not_come_is_not_waited_for(hostile: Callable[..., None]) -> None:
    hostile(EVENT)
    events: list[NetworkEvent] = []
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(NetworkConfig(), Unconfined(), tasks, AUTHORITY)
        with served(RULES) as (namespace, made), anyio.fail_after(20):
            await gateway.serve("call", 0, made, events.append)
            knock(namespace)
            while not events:  # noqa: ASYNC110  (no event tells)
                await anyio.sleep(0.01)
            await gateway.begin_end("call")
            await gateway.end("call")
        assert events[-1].verdict == "failed"
        tasks.cancel_scope.cancel()


async def test_where_nothing_happens_no_process_is_told_anything(hostile: Callable[..., None]) -> None:
    hostile('["nonsense", {"id": "ID"}]')
    events: list[NetworkEvent] = []
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(NetworkConfig(), Unconfined(), tasks, AUTHORITY)
        for number in range(3):
            with served(RULES) as (_, made), anyio.fail_after(1 if number else 20):
                await gateway.serve("call", 0, made, events.append)
                gateway.renew("call", {"NAME": (1, b"value")})
                await gateway.begin_end("call")
                assert await gateway.end("call") == NetworkUse()
        [worker] = gateway._workers[0]
        assert worker.process.poll() is None
        assert worker.containers == {}
        assert events == []
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_whoever_wanted_something_at_the_very_end_is_served_still(kind: socket.SocketKind) -> None:
    """And is told of: by a real process, which is given the container when its call has ended."""
    events: list[NetworkEvent] = []
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(CONFIG, Unconfined(), tasks, AUTHORITY)
        with served(RULES) as (namespace, made), anyio.fail_after(30):
            await gateway.serve("call", 0, made, events.append)
            if kind == socket.SOCK_DGRAM:
                query = dns.message.make_query("refused.test.", "A").to_wire()
                knock(namespace, query)
            else:
                sock = in_network_namespace(namespace, lambda: socket.socket(socket.AF_INET, kind))
                with sock:
                    sock.setblocking(False)
                    sock.connect_ex(("198.18.0.1", 80))
            await gateway.begin_end("call")
            use = await gateway.end("call")
        tasks.cancel_scope.cancel()
    assert [one.count for one in use.refusals] == [1]
    assert [one.verdict for one in events] == ["denied"]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Spool]:
    """A spool that has no room for anything more."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        spool = Spool.create(tmp_path / "c", {"stdout": 1 << 20, "stderr": 0})
        with pytest.raises(errors.HostFailed):
            spool.append("stdout", bytes(100_000))
        yield spool
        with pytest.raises(errors.HostFailed):
            spool.close(durable=False)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


async def test_an_event_that_the_disk_has_no_room_for_is_a_fault_of_its_call(
    hostile: Callable[..., None], full: Spool, tmp_path: Path
) -> None:
    hostile(EVENT)
    secrets = CallSecrets(SecretStore(tmp_path, place_of(None, tmp_path, {})), probe_shape())
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(NetworkConfig(), Unconfined(), tasks, AUTHORITY)
        network = CallNetwork(gateway, Entrances(gateway), "call", 0, full, secrets=secrets)
        with served(RULES) as (namespace, made), anyio.fail_after(20):
            await network.begin(made)
            knock(namespace)
            while network.fault is None:  # noqa: ASYNC110  (no event tells)
                await anyio.sleep(0.01)
            await network.end()
        assert "no space" in str(network.fault)
        tasks.cancel_scope.cancel()


ASK_FOR_A_SECRET = json.dumps(
    ["ask", {"id": "ID", "number": 1, "protocol": "http", "name": "a.test", "address": "", "port": 80,
             "method": "GET", "path": "/of/the-value-of-it", "rule": None}]
)  # fmt: skip


async def test_whoever_decides_is_told_no_secret(hostile: Callable[..., None], tmp_path: Path) -> None:
    hostile(ASK_FOR_A_SECRET)
    store = SecretStore.open(tmp_path / "secrets", place_of(None, tmp_path, {}))
    store.set("TOLD", b"the-value-of-it")
    questions: list[Question] = []

    async def decide(question: Question) -> Answer:
        questions.append(question)
        return Answer(allowed=False)

    spool = Spool.create(tmp_path / "spool", {"stdout": 0, "stderr": 0})
    shape = replace(probe_shape(), secrets=(Grant("TOLD", "proxy"),))
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(NetworkConfig(), Unconfined(), tasks, AUTHORITY)
        with CallSecrets(store, shape) as secrets, served(ASKING) as (namespace, made), anyio.fail_after(20):
            await secrets.take()
            network = CallNetwork(
                gateway, Entrances(gateway), "call", 0, spool, secrets=secrets, decide=decide
            )
            await network.begin(made)
            knock(namespace)
            while not questions:  # noqa: ASYNC110  (no event tells)
                await anyio.sleep(0.01)
            await network.end()
        tasks.cancel_scope.cancel()
    spool.close(durable=False)
    assert questions[0].path == "/of/[redacted:TOLD]"
