"""The daemon's side of the network without a daemon: namespaces to serve, and processes that pretend to."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import dns.message
from world import DNS

from sandboxd.config import NetworkConfig
from sandboxd.kernel.inside import in_network_namespace, in_new_network_namespace
from sandboxd.network.authority import Authority
from sandboxd.network.chain import write_chain
from sandboxd.network.gateway import Gateway
from sandboxd.network.namespace import open_doors
from sandboxd.network.questions import nobody
from sandboxd.reach import DNS_PORT, Reach

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import pytest

    from sandboxd.kernel.cgroup import CgroupLimits
    from sandboxd.models import NetworkEvent, NetworkUse
    from sandboxd.network.questions import Decide
    from sandboxd.reach import NetworkRules

AUTHORITY = Authority.make()
PRETENDER = """\
#!{python}
import json, socket, sys
sock = socket.socket(fileno=int(sys.argv[4]))
held = []
while True:
    data, fds, _, _ = socket.recv_fds(sock, 1 << 20, 5)
    if not data: break
    kind, content = json.loads(data)
    held += fds
    if kind == {kind!r}:
        for message in open({said!r}).read().split("\\n"):
            if message:
                message = message.replace("NUMBER", str(content.get("number")))
                sock.send(message.replace("ID", content["id"]).encode())
"""


class Unconfined:
    """No cgroups."""

    async def confine(self, name: str, pid: int, limits: CgroupLimits) -> None: ...

    async def release(self, name: str) -> None: ...


class Part:
    """What of a slot concerns its network."""

    def __init__(self, doors: Any, rules: NetworkRules) -> None:
        self.doors, self.shape = doors, self
        self.network, self.digest, self.expose, self.kept = rules, "shape", (), False


@contextmanager
def served(rules: NetworkRules) -> Iterator[tuple[int, Any]]:
    """A network namespace of its own with these rules, and what of a slot concerns it."""
    namespace = in_new_network_namespace(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY))
    try:
        doors = open_doors(namespace, write_chain(Reach(rules)))
        try:
            yield namespace, Part(doors, rules)
        finally:
            doors.close()
    finally:
        os.close(namespace)


def knock(namespace: int, said: bytes = b"?") -> None:
    """Ask the resolver of a namespace something, so that somebody has to serve it."""
    with in_network_namespace(namespace, lambda: socket.socket(type=socket.SOCK_DGRAM)) as sock:
        sock.sendto(said, ("127.0.0.53", DNS_PORT))


def pretend(monkeypatch: pytest.MonkeyPatch, place: Path, kind: str, *messages: str) -> None:
    """Have every process that serves be one that says these messages when it is told something of a kind."""
    said, program = place / "said", place / "program"
    said.write_text("\n".join(messages))
    program.write_text(PRETENDER.format(python=sys.executable, said=str(said), kind=kind))
    program.chmod(0o700)
    monkeypatch.setattr("sandboxd.network.process.sys.executable", str(program))


class Served:
    """A namespace whose connections a real process serves, for the call ``id``."""

    def __init__(self, gateway: Gateway, namespace: int, part: Part, id: str) -> None:  # noqa: A002
        self.gateway, self.namespace, self.part, self.id = gateway, namespace, part, id
        self.events: list[NetworkEvent] = []

    async def begin(self, decide: Decide) -> None:
        """Hand it over."""
        slot: Any = self.part
        await self.gateway.serve(self.id, 0, slot, self.events.append, decide=decide)

    async def end(self) -> NetworkUse:
        """The call is over."""
        await self.gateway.begin_end(self.id)
        return await self.gateway.end(self.id)

    @property
    def process(self) -> int:
        """The pid of the process that serves it."""
        [worker] = self.gateway._workers[0]
        return worker.process.pid

    def sock(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """One of a program's."""
        sock = in_network_namespace(self.namespace, lambda: socket.socket(type=kind))
        sock.settimeout(30)
        return sock

    def address(self, name: str) -> str:
        """What the resolver says."""
        with self.sock(socket.SOCK_DGRAM) as sock:
            sock.sendto(dns.message.make_query(f"{name}.", "A").to_wire(), ("127.0.0.53", 53))
            return str(dns.message.from_wire(sock.recv(4096)).answer[0][0])

    async def connect(self, name: str, port: int) -> socket.socket:
        """A connection of a program's."""
        address = await anyio.to_thread.run_sync(self.address, name)
        sock = self.sock()
        await anyio.to_thread.run_sync(sock.connect, (address, port))
        return sock

    async def told(self, count: int) -> list[NetworkEvent]:
        """The events, once there are so many."""
        while len(self.events) < count:  # noqa: ASYNC110  (no event tells)
            await anyio.sleep(0.01)
        return self.events


@asynccontextmanager
async def serving(
    rules: NetworkRules, *, nameserver: str = DNS, decide: Decide = nobody, beside: int = 0
) -> AsyncIterator[Any]:
    """One; with ``beside`` as many more, whom the same process serves: then all of them."""
    async with anyio.create_task_group() as tasks:
        config = NetworkConfig.model_validate({"nameservers": [nameserver]})
        gateway = Gateway(config, Unconfined(), tasks, AUTHORITY)
        with ExitStack() as stack, anyio.fail_after(90):
            all_of_them = []
            for number in range(1 + beside):
                namespace, part = stack.enter_context(served(rules))
                all_of_them.append(Served(gateway, namespace, part, f"call-{number}"))
                await all_of_them[-1].begin(decide)
            yield all_of_them if beside else all_of_them[0]
        tasks.cancel_scope.cancel()


async def read(sock: socket.socket, until: bytes) -> bytes:
    """What comes, up to something; or all of it."""

    def reading() -> bytes:
        data = b""
        while until not in data and (more := sock.recv(1 << 16)):
            data += more
        return data

    return await anyio.to_thread.run_sync(reading)
