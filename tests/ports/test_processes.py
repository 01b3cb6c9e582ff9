"""The daemon's side of connections to ports, when the process that serves them is somebody else's."""

from __future__ import annotations

import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from gateways import Unconfined, pretend

from sandboxd import errors
from sandboxd.config import NetworkConfig
from sandboxd.kernel.inside import in_new_network_namespace
from sandboxd.network.authority import Authority
from sandboxd.network.entrance import Entrances
from sandboxd.network.gateway import Gateway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.models import NetworkEvent
    from sandboxd.network.entrance import Entrance

pytestmark = pytest.mark.anyio

END = '["inward", {"id": "call", "number": NUMBER, "why": "", "bytes_in": 1, "bytes_out": 2}]'


class Shape:
    """What of a shape concerns its ports."""

    expose = (8080,)


class Slot:
    """What of a slot does; its PID 1 is this process."""

    shape = Shape()

    def __init__(self) -> None:
        self.init_pid = os.getpid()
        self.init_pidfd = os.pidfd_open(self.init_pid)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def process(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have every process that serves be one that says these messages when it gets a connection."""

    def say(*messages: str) -> None:
        pretend(monkeypatch, tmp_path_factory.mktemp("hostile"), "enter", *messages)

    return say


def _listen() -> tuple[int, socket.socket]:
    from fcntl import ioctl  # noqa: PLC0415  (here alone)
    from struct import pack  # noqa: PLC0415

    with socket.socket() as sock:
        ioctl(sock, 0x8914, pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY), socket.create_server(("127.0.0.1", 8080))


@contextmanager
def entered(entrances: Entrances, on_event: Callable[[NetworkEvent], None]) -> Iterator[Entrance]:
    """The way into a namespace with a server."""
    namespace, server = in_new_network_namespace(_listen)
    slot: Any = Slot()
    with server:
        try:
            entrance = entrances.enter("call", 0, slot, on_event)
            os.dup2(namespace, entrance._namespace)  # what a container's PID 1 would have been in
            yield entrance
        finally:
            os.close(namespace)
            os.close(slot.init_pidfd)


async def served(on_event: Callable[[NetworkEvent], None], *, ends: bool = True) -> float:
    """One connection, until what its process says of it has arrived; how long the end took."""
    async with anyio.create_task_group() as tasks:
        entrances = Entrances(Gateway(NetworkConfig(), Unconfined(), tasks, Authority.make()))
        with entered(entrances, on_event) as entrance, anyio.fail_after(60):
            ours, theirs = socket.socketpair()
            with ours:
                with await entrance.connect(8080) as passage, theirs:
                    await passage.serve(theirs, b"", "")
                while ends and entrances.open[0]:  # noqa: ASYNC110  (no event tells)
                    await anyio.sleep(0.01)
                begun = time.monotonic()
                await entrance.end()
                took = time.monotonic() - begun
                with pytest.raises(errors.CallEnded):
                    await entrance.connect(8080)
            assert not entrances.open
        tasks.cancel_scope.cancel()
    return took


@pytest.mark.parametrize(
    "message",
    [
        "no message",
        END.replace("NUMBER", "999"),
        END.replace("NUMBER", "[]"),
        END.replace('"call"', '"call", "more": 1'),
        END.replace('"bytes_in": 1', '"bytes_in": -1'),
        END.replace('"bytes_in": 1', '"bytes_in": 1' + "0" * 30),
        END.replace('"why": ""', '"why": "' + "x" * 5000 + '"'),
        END.replace('"why": ""', '"why": "\\ud800"'),
        END.replace('"why": "", ', ""),
        '["event", {"id": "call", "verdict": "allowed", "direction": "in"}]',
    ],
    ids=range(10),
)
async def test_a_process_that_says_what_it_may_not_is_ended(
    process: Callable[..., None], message: str
) -> None:
    process(message)
    events: list[NetworkEvent] = []
    await served(events.append)
    assert [(event.verdict, event.why, event.bytes_in) for event in events] == [
        ("failed", "the process that served the connection ended, and it with it", 0)
    ]


async def test_an_end_is_told_once(process: Callable[..., None]) -> None:
    process(END, END)
    events: list[NetworkEvent] = []
    await served(events.append)
    assert [(event.verdict, event.direction, event.bytes_in, event.bytes_out) for event in events] == [
        ("allowed", "in", 1, 2)
    ]


async def test_a_process_that_does_not_end_them_is_ended_with_the_call(process: Callable[..., None]) -> None:
    process("")
    events: list[NetworkEvent] = []
    assert await served(events.append, ends=False) < 10
    assert [event.verdict for event in events] == ["failed"]
