"""``sandboxd forward``: a port of a running call's container, or a session's, as a socket of this host."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
from anyio.abc import SocketStream
from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.calls import AlsoRemote, find
from sandboxd.cli.options import REMOTE
from sandboxd.kernel import socketfile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sandboxd.client import Client
    from sandboxd.client.aio import AsyncClient

__all__ = ["forward"]

CHUNK = 65536
BACKLOG = 128
NOT_YET = 0.2  # seconds between two questions whether the call runs by now
LOOK_AGAIN = 2.0  # seconds between two looks whether a session is still there
UNIX = "unix:"


def forward(
    named: Annotated[
        str,
        Parameter(name="ID", help="A session's name or id, or a call's id, or the beginning or end of that."),
    ],
    port: Annotated[int, Parameter(name="PORT", help="The port inside; the policy has to expose it.")],
    *,
    listen: Annotated[
        str,
        Parameter(
            help="Where to take connections: HOST:PORT (port 0: any that is free), or unix:PATH for a socket "
            "that only this user may connect to."
        ),
    ] = "127.0.0.1:0",
    remote: AlsoRemote = REMOTE,
) -> None:
    """Take connections here and pass each on to a server inside a call, until that ends, or a session.

    Of a session, each connection goes to the call that runs in it then; it ends when the session is removed.
    Whoever can connect to the address is let in, so it is this host's loopback unless another is given.
    The address is printed on stdout when it takes connections.
    """
    client = remote.client()
    if not 0 < port < 65536:
        raise errors.InvalidRequest(f"{port} is not the number of a port", field="PORT")
    from sandboxd.client.aio import AsyncClient  # noqa: PLC0415 - `--help` must not pay for it

    with _listening(listen) as (listener, address):
        target = _target(client, AsyncClient(remote.socket), named)
        anyio.run(_Forward(target, port).run, listener, address, remote.json)


def _target(client: Client, later: AsyncClient, named: str) -> _Call | _Session:
    """Whose container it is about: a session's, where there is one of that name, else a call's."""
    try:
        return _Session(later, client.session(named).id)
    except errors.NotFound:
        return _Call(later, find(client, named))


@contextlib.contextmanager
def _listening(where: str) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens there, and its address as a text. Raises InvalidRequest, OSError."""
    if where.startswith(UNIX):
        with _unix(Path(where.removeprefix(UNIX))) as sock:
            yield sock, where
        return
    host, colon, port = where.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise errors.InvalidRequest(f"{where!r} is neither HOST:PORT nor unix:PATH", field="--listen")
    host = host.removeprefix("[").removesuffix("]")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host or None, int(port), type=socket.SOCK_STREAM
        )[0]
        sock = socket.socket(family, kind, protocol)
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(place)
            sock.listen(BACKLOG)
            name, bound = sock.getsockname()[:2]
            yield sock, f"[{name}]:{bound}" if ":" in name else f"{name}:{bound}"
    except socket.gaierror as error:
        raise errors.InvalidRequest(f"{where!r}: {error.strerror}", field="--listen") from None


@contextlib.contextmanager
def _unix(path: Path) -> Iterator[socket.socket]:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise errors.InvalidRequest(f"{path} is there already, and no socket", field="--listen")
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(os.fspath(path))
            raise errors.InvalidRequest(f"somebody listens on {path} already", field="--listen")
        path.unlink()  # its listener is gone
    with socket.socket(socket.AF_UNIX) as sock:
        before = os.umask(0o177)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(before)
        with socketfile.removed(path):
            sock.listen(BACKLOG)
            yield sock


class _Call:
    """The container of one call, which is there while it runs."""

    gone = "the call has ended"

    def __init__(self, client: AsyncClient, id: str) -> None:  # noqa: A002
        self._client = client
        self._id = id

    async def ports(self) -> Sequence[int] | None:
        """Those that can be reached, once it runs. Raises CallEnded, PortNotExposed."""
        while True:
            try:
                return await self._client.ports(self._id)
            except errors.CallNotStarted:
                await anyio.sleep(NOT_YET)

    async def connect(self, port: int) -> SocketStream:
        """One more connection."""
        return await self._client.connect(self._id, port)

    async def ended(self) -> None:
        """Wait for its end."""
        async with await self._client.events(self._id, follow=True) as events:
            async for event in events:
                if event.invocation is not None or event.type == "ended":
                    return


class _Session:
    """The container of whatever runs in a session."""

    gone = "the session was removed"

    def __init__(self, client: AsyncClient, id: str) -> None:  # noqa: A002
        self._client = client
        self._id = id

    async def ports(self) -> Sequence[int] | None:
        """Those that can be reached now; None: nothing runs that would say. Raises PortNotExposed."""
        try:
            return await self._client.session_ports(self._id)
        except errors.SessionIdle:
            return None

    async def connect(self, port: int) -> SocketStream:
        """One more connection. Raises SessionIdle."""
        return await self._client.connect_session(self._id, port)

    async def ended(self) -> None:
        """Wait until it is removed."""
        with contextlib.suppress(errors.NotFound):
            while True:
                await self._client.session(self._id)
                await anyio.sleep(LOOK_AGAIN)


class _Forward:
    """One port of one of them."""

    def __init__(self, target: _Call | _Session, port: int) -> None:
        self._target = target
        self._port = port

    async def run(self, listener: socket.socket, address: str, as_json: bool) -> None:  # noqa: FBT001 - of anyio.run
        """Until its end. Raises Refused."""
        await self._allowed()
        if as_json:
            terminal.print_json({"address": address})
        else:
            terminal.print_text(address)
        sys.stdout.flush()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._accept, listener)
            await self._target.ended()
            tasks.cancel_scope.cancel()
        terminal.complain(self._target.gone)

    async def _allowed(self) -> None:
        """Raise PortNotExposed, NotFound, CallEnded before anybody connects, as far as it is known then."""
        ports = await self._target.ports()
        if ports is not None and self._port not in ports:
            listed = ", ".join(map(str, ports))
            raise errors.PortNotExposed(
                f"port {self._port} is not exposed; `expose` of the policy has {listed}", exposed=ports
            )

    async def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        async with anyio.create_task_group() as tasks:
            while True:
                await anyio.wait_readable(listener)
                try:
                    accepted, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError:  # no descriptor is left
                    await anyio.sleep(NOT_YET)
                    continue
                tasks.start_soon(self._serve, accepted)

    async def _serve(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        wrap = anyio.abc.UNIXSocketStream if accepted.family == socket.AF_UNIX else SocketStream
        async with await wrap.from_socket(accepted) as here:
            try:
                there = await self._target.connect(self._port)
            except errors.SandboxdError as error:
                terminal.complain(str(error))
                return
            async with there:
                await _both_ways(here, there)


async def _both_ways(here: SocketStream, there: SocketStream) -> None:
    """Until both sides have ended, or one is gone."""

    async def copy(source: SocketStream, sink: SocketStream) -> None:
        try:
            async for data in source:
                await sink.send(data)
            await sink.send_eof()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(copy, here, there)
        tasks.start_soon(copy, there, here)
