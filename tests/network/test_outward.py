"""What a process that serves connections asks the daemon for, when it is no longer itself."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import pytest

from sandboxd.kernel.descriptors import Sender, receive
from sandboxd.network.outward import Outward

if TYPE_CHECKING:
    from collections.abc import Iterator

Ends: TypeAlias = "tuple[socket.socket, socket.socket]"
SERVERS = ["127.0.0.53", "2001:0DB8::1"]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The daemon's end of the connection to a process, and the process's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def heard(sock: socket.socket) -> list[tuple[Any, int]]:
    """What has come, each with the number of its descriptors."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            data, fds, _ = receive(sock, 1000, 4)
            found.append((json.loads(data), len(fds)))
            for fd in fds:
                os.close(fd)
    return found


async def told(ends: Ends, what: dict[str, Any], *, server: bool = False) -> list[tuple[Any, int]]:
    """What the process is told of one thing that it asks for."""
    refused = None
    async with anyio.create_task_group() as tasks:
        outward = Outward(tasks, Sender(ends[0]), SERVERS, 53)
        try:
            outward.connect(what, None if server else lambda _address, _port: True)
        except ValueError as error:
            refused = error
    if refused is not None:
        raise refused
    return heard(ends[1])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("scope", ["\0", "é" + "x" * 70, "lo", "1"])
async def test_an_address_with_a_scope_is_refused(ends: Ends, scope: str) -> None:
    with pytest.raises(ValueError, match="scope"):
        await told(ends, {"number": 1, "address": f"2600::1%{scope}", "port": 443})


async def test_a_host_that_makes_no_socket_is_told_and_survived(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", none)
    (said,) = await told(ends, {"number": 7, "address": "2600::1", "port": 443})
    assert said == (["connected", {"number": 7, "code": 97}], 0)


async def test_a_name_server_is_known_however_it_is_written(ends: Ends) -> None:
    with pytest.raises(ValueError, match="no name server"):
        await told(ends, {"number": 1, "address": "2001:db8::2", "port": 53}, server=True)
    assert len(await told(ends, {"number": 1, "address": "2001:db8::1", "port": 53}, server=True)) == 1


async def test_a_process_that_does_not_read_is_told_when_there_is_room(ends: Ends) -> None:
    ours, theirs = ends
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b'"before"')
    async with anyio.create_task_group() as tasks:
        outward = Outward(tasks, Sender(ours), SERVERS, 53)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            outward.connect({"number": 3, "address": "127.0.0.1", "port": port}, lambda *_: True)
            await anyio.sleep(0.05)
            assert {message for message, _ in heard(theirs)} == {"before"}
            await anyio.wait_readable(theirs)
            assert heard(theirs) == [(["connected", {"number": 3, "code": 0}], 1)]


async def test_a_process_that_is_gone_is_told_nothing(ends: Ends) -> None:
    ends[1].close()
    async with anyio.create_task_group() as tasks:
        outward = Outward(tasks, Sender(ends[0]), SERVERS, 53)
        outward.connect({"number": 3, "address": "127.0.0.1", "port": 9}, lambda *_: True)
