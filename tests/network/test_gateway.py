"""The daemon's side of a process that serves connections, when that process is somebody else's."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import anyio
import pytest
from gateways import Unconfined, pretend, served

from sandboxd import errors
from sandboxd.config import NetworkConfig
from sandboxd.engine.probe import probe_shape
from sandboxd.journal.spool import Spool
from sandboxd.models import NetworkUse
from sandboxd.network.authority import Authority
from sandboxd.network.entrance import Entrances
from sandboxd.network.gateway import Gateway
from sandboxd.network.served import MAX_EVENTS
from sandboxd.reach import Allow, NetworkRules
from sandboxd.secrets import SecretStore, place_of
from sandboxd.supervisor.network import CallNetwork
from sandboxd.supervisor.secrets import CallSecrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sandboxd.kernel.cgroup import CgroupLimits
    from sandboxd.models import NetworkEvent
    from sandboxd.network.questions import Answer, Question

pytestmark = pytest.mark.anyio

AUTHORITY = Authority.make()
RULES = NetworkRules((Allow("www.example.test", (80,), "net.yaml:1"),), ())
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
        with served(RULES) as (_, made), anyio.fail_after(60):
            await gateway.serve("call", 0, made, events.append, decide=undecided)
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
    hostile('["awake", {"id": "ID"}]', EVENT)
    events: list[NetworkEvent] = []
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(NetworkConfig(), Unconfined(), tasks, AUTHORITY)
        with served(RULES) as (_, made), anyio.fail_after(20):
            await gateway.serve("call", 0, made, events.append)
            while not events:  # noqa: ASYNC110  (no event tells)
                await anyio.sleep(0.01)
            await gateway.begin_end("call")
            await gateway.end("call")
        assert events[-1].verdict == "failed"
        tasks.cancel_scope.cancel()


async def test_where_nothing_happened_nobody_waits_for_it_and_one_that_is_silent_is_ended(
    hostile: Callable[..., None],
) -> None:
    hostile("")
    events: list[NetworkEvent] = []
    async with anyio.create_task_group() as tasks:
        gateway = Gateway(NetworkConfig(), Unconfined(), tasks, AUTHORITY)
        with served(RULES) as (_, made), anyio.fail_after(20):
            await gateway.serve("call", 0, made, events.append)
            [worker] = gateway._workers[0]
            with anyio.fail_after(1):
                await gateway.begin_end("call")
                assert await gateway.end("call") == NetworkUse()
            while worker.process.poll() is None:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        assert events == []
        tasks.cancel_scope.cancel()


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
        with served(RULES) as (_, made), anyio.fail_after(20):
            await network.begin(made)
            while network.fault is None:  # noqa: ASYNC110  (no event tells)
                await anyio.sleep(0.01)
            await network.end()
        assert "no space" in str(network.fault)
        tasks.cancel_scope.cancel()
