"""What a process that serves connections asks the daemon for, when it is no longer itself."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from sandboxd.network.outward import Outward

if TYPE_CHECKING:
    from collections.abc import Sequence

SERVERS = ["127.0.0.53", "2001:0DB8::1"]


async def told(what: dict[str, Any], *, server: bool = False) -> list[dict[str, Any]]:
    """What the process is told of one thing that it asks for."""
    said: list[dict[str, Any]] = []

    async def send(message: bytes, fds: Sequence[int]) -> None:
        said.append({"message": json.loads(message), "fds": len(fds)})

    refused = None
    async with anyio.create_task_group() as tasks:
        outward = Outward(tasks, send, SERVERS, 53)
        try:
            outward.connect(what, None if server else lambda _address, _port: True)
        except ValueError as error:
            refused = error
    if refused is not None:
        raise refused
    return said


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("scope", ["\0", "é" + "x" * 70, "lo", "1"])
async def test_an_address_with_a_scope_is_refused(scope: str) -> None:
    with pytest.raises(ValueError, match="scope"):
        await told({"number": 1, "address": f"2600::1%{scope}", "port": 443})


async def test_a_host_that_makes_no_socket_is_told_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", none)
    (said,) = await told({"number": 7, "address": "2600::1", "port": 443})
    assert said["fds"] == 0
    assert said["message"][1] == {"number": 7, "code": 97}


async def test_a_name_server_is_known_however_it_is_written() -> None:
    with pytest.raises(ValueError, match="no name server"):
        await told({"number": 1, "address": "2001:db8::2", "port": 53}, server=True)
    assert len(await told({"number": 1, "address": "2001:db8::1", "port": 53}, server=True)) == 1
