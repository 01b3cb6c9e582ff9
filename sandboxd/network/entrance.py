"""The ways into containers: whose servers their callers reach, on the ports that the policy exposes.

Theory of operation.  From hand-over to its end a call has an ``Entrance``, and a container that a session
keeps has one for as long as it lives. It holds the network namespace of its container as a descriptor: no
number is looked up that may be another's by then. A connection is begun in there, by a thread that joins
it, to the loopback of the container, where its packet filter lets everything through. Once it stands, it
goes with the caller's own to the caller's process of ``sandboxd.egress``, the only one that reads what the
server says. That process says once how it ended.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import anyio
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sandboxd import errors, units
from sandboxd.egress.messages import Enter, encode
from sandboxd.kernel.inside import in_network_namespace
from sandboxd.models import NetworkEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.base import Slot
    from sandboxd.network.gateway import Gateway
    from sandboxd.network.process import Server

__all__ = ["Entrance", "Entrances", "Passage", "not_exposed"]

LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
CONNECT_SECONDS = 5.0  # on a loopback only a server with a full backlog lets anybody wait
END_SECONDS = 5.0  # that a process has to say how the connections of a call ended
MAX_OPEN = 256  # connections to one container at once
MAX_OF_CALLER = 1024  # and to all those of one caller: its process holds the bytes that are on their way
MAX_EVENTS = 1000  # of a call

log = structlog.get_logger("sandboxd.network")


class _Ended(BaseModel):
    """What a process says of a connection that has ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    why: str = Field(max_length=4096)
    bytes_in: int = Field(ge=0, le=units.MAX)
    bytes_out: int = Field(ge=0, le=units.MAX)


class Entrances:
    """Of all containers that this daemon has in use."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.open: Counter[int] = Counter()
        """Connections by the uid of the container's caller."""
        self.sessions: dict[str, Entrance | None] = {}
        """Of each session that has a container now, by its id; None: no port is exposed."""
        self._last = 0

    def next_number(self) -> int:
        """A number for one more connection."""
        self._last += 1
        return self._last

    def enter(
        self,
        id: str,  # noqa: A002
        uid: int,
        slot: Slot,
        on_event: Callable[[NetworkEvent], None],
    ) -> Entrance:
        """The way into a slot, which the caller ``uid`` has as ``id``; to be closed. Raises HostFailed."""
        try:
            namespace = os.open(f"/proc/{slot.init_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise errors.HostFailed(f"the container's network namespace cannot be held: {error}") from error
        ended = select.poll()
        ended.register(slot.init_pidfd, select.POLLIN)
        if ended.poll(0):  # then the number may be another's
            os.close(namespace)
            raise errors.EngineFailed("the container's PID 1 ended before the command began")
        return Entrance(self, id, uid, namespace=namespace, ports=slot.shape.expose, on_event=on_event)


class Entrance:
    """The way into one container."""

    def __init__(
        self,
        entrances: Entrances,
        id: str,  # noqa: A002
        uid: int,
        *,
        namespace: int,
        ports: tuple[int, ...],
        on_event: Callable[[NetworkEvent], None],
    ) -> None:
        self.ports = ports
        self._entrances = entrances
        self._id = id
        self._uid = uid
        self._namespace = namespace
        self._on_event = on_event
        self._events = 0
        self._missed: list[NetworkEvent] = []
        self._open: dict[int, Server | None] = {}
        """Connections by number, and the process that serves each once it does."""
        self._connecting: set[anyio.CancelScope] = set()
        self._empty = anyio.Event()
        self._closed = False

    def tell(self, on_event: Callable[[NetworkEvent], None] | None) -> None:
        """Who is told from now on, and of what nobody was told; None: nobody, until somebody comes."""
        self._on_event = self._missed.append if on_event is None else on_event
        self._events = 0
        if on_event is not None:
            missed, self._missed = self._missed, []
            for event in missed:
                on_event(event)

    async def connect(self, port: int) -> Passage:
        """A connection to a server inside, on its way to a caller; a context manager.

        Raises PortNotExposed, PortNotAnswering, QueueFull, CallEnded.
        """
        if port not in self.ports:
            raise not_exposed(self.ports, port)
        self._check_open()
        if len(self._open) >= MAX_OPEN or self._entrances.open[self._uid] >= MAX_OF_CALLER:
            raise errors.QueueFull(
                f"at once, {MAX_OPEN} connections to the ports of one call can be open, and {MAX_OF_CALLER} "
                "to those of all calls of one caller",
                retry_after=1,
            )
        passage = Passage(self, port, self._entrances.next_number())
        self._open[passage.number] = None
        self._entrances.open[self._uid] += 1
        try:
            with anyio.CancelScope() as scope:
                self._connecting.add(scope)
                for family, host in LOOPBACKS:
                    sock = await self._reach(family, host, port)
                    if sock is not None:
                        passage.sock, passage.address = sock, host
                        break
            self._check_open()
        except BaseException:
            passage.close()
            raise
        finally:
            self._connecting.discard(scope)
        if passage.sock is not None:
            return passage
        passage.close()
        raise errors.PortNotAnswering(
            f"nobody in the container takes a connection to port {port}, on 127.0.0.1 or on ::1", port=port
        )

    async def _reach(self, family: int, host: str, port: int) -> socket.socket | None:
        try:
            sock = in_network_namespace(self._namespace, lambda: _begin(family, host, port))
        except OSError:  # a kernel without IPv6
            return None
        try:
            with anyio.move_on_after(CONNECT_SECONDS):
                await anyio.wait_writable(sock)
                # whoever connects to a free port from that same port has connected to itself
                if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) and not _to_itself(sock):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return sock
        except OSError:
            pass
        except BaseException:
            sock.close()
            raise
        sock.close()
        return None

    async def serve(self, passage: Passage, caller: socket.socket, first: bytes, prefix: str) -> None:
        """Hand a connection and its caller's over; ``first`` is what the caller has sent. Raises HostFailed.

        ``prefix`` is what the paths of its request begin with and the server's do not; an empty text makes
        it a tunnel.
        """
        head = os.memfd_create("head", os.MFD_CLOEXEC)
        try:
            left = memoryview(first)
            while left:
                left = left[os.write(head, left) :]
            asked = Enter(self._id, passage.number, passage.port, prefix)
            fds = (caller.fileno(), passage.sock.fileno(), head)
            passage.served = True
            server = await self._entrances.gateway.enter(self._uid, asked, fds, passage.ended)
        except BaseException:
            passage.served = False
            raise
        finally:
            os.close(head)
        if passage.number in self._open:
            self._open[passage.number] = server
            if self._closed:
                await self._cut(server)

    def _check_open(self) -> None:
        if self._closed:
            raise errors.CallEnded(f"{self._id!r} has ended")

    def ended(self, passage: Passage, said: _Ended | None) -> None:
        """Count a connection no more, and tell of it where it was served; None: nobody says how it ended."""
        if self._open.pop(passage.number, self) is self:
            return
        self._entrances.open[self._uid] -= 1
        if not self._entrances.open[self._uid]:
            del self._entrances.open[self._uid]
        if not self._open and self._closed:
            self._empty.set()
        if passage.served and self._events < MAX_EVENTS:
            self._events += 1
            self._on_event(passage.event(said))

    async def begin_end(self) -> None:
        """Take nobody in any more, and have what is left delivered and cut; ``end`` waits for that."""
        if self._closed:
            return
        self._closed = True
        if not self._open:
            self._empty.set()
        for scope in self._connecting:
            scope.cancel()
        for server in self._servers():
            await self._cut(server)

    def _servers(self) -> list[Server]:
        return list({id(server): server for server in self._open.values() if server is not None}.values())

    async def _cut(self, server: Server) -> None:
        with suppress(OSError):  # a process that is gone has cut them
            await server.send(encode("cut", {"id": self._id}))

    async def end(self) -> None:
        """Cut what is left, and give the container up. Safe to call twice."""
        await self.begin_end()
        with anyio.move_on_after(END_SECONDS):
            await self._empty.wait()
        if self._open:
            log.error("a network process does not end its connections", id=self._id, count=len(self._open))
            for server in self._servers():
                server.kill()  # they end with it
            with anyio.move_on_after(END_SECONDS):
                await self._empty.wait()
        if self._namespace >= 0:
            os.close(self._namespace)
            self._namespace = -1
        if self._entrances.sessions.get(self._id) is self:
            del self._entrances.sessions[self._id]


@dataclass(eq=False)
class Passage:
    """A connection into a container that nobody reads yet; a context manager until it is served."""

    entrance: Entrance
    port: int
    number: int
    sock: socket.socket = None  # type: ignore[assignment]  # until it stands
    address: str = ""
    served: bool = False
    begun: float = 0.0

    def __post_init__(self) -> None:
        self.begun = time.monotonic()

    async def serve(self, caller: socket.socket, first: bytes, prefix: str) -> None:
        """As ``Entrance.serve``."""
        await self.entrance.serve(self, caller, first, prefix)

    def ended(self, said: dict[str, Any] | None) -> None:
        """What the process that served it says of its end. Raises ValidationError."""
        try:
            end = None if said is None else _Ended.model_validate(said)
        except ValidationError:
            self.entrance.ended(self, None)
            raise
        self.entrance.ended(self, end)

    def event(self, end: _Ended | None) -> NetworkEvent:
        """What is told of it."""
        why, sent, received = "the process that served the connection ended, and it with it", 0, 0
        if end is not None:
            why, sent, received = end.why, end.bytes_out, end.bytes_in
        return NetworkEvent(
            direction="in",
            verdict="failed" if why else "allowed",
            protocol="tcp",
            address=self.address,
            port=self.port,
            why=why,
            bytes_out=sent,
            bytes_in=received,
            duration=int((time.monotonic() - self.begun) * 1e6),
        )

    def close(self) -> None:
        """Close this process's end; nobody serves it unless somebody was given it."""
        if self.sock is not None:
            self.sock.close()
        if not self.served:
            self.entrance.ended(self, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def not_exposed(ports: tuple[int, ...], port: int | None = None) -> errors.PortNotExposed:
    """The refusal of a port, or of all, which names those that there are."""
    if not ports:
        return errors.PortNotExposed(
            "the policy of this call exposes no port: it has no `expose`", exposed=[]
        )
    listed = ", ".join(map(str, ports))
    said = f"port {port} is not exposed; `expose` of the policy has {listed}"
    return errors.PortNotExposed(said, port=port, exposed=list(ports))


def _begin(family: int, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.connect_ex((host, port))  # what became of it, the socket says
    return sock


def _to_itself(sock: socket.socket) -> bool:
    return bool(sock.getsockname()[:2] == sock.getpeername()[:2])
