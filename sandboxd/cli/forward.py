"""``sandboxd forward``: a port of a running call's container as a socket of this host."""

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
from sandboxd.cli.calls import AlsoRemote, Id, find
from sandboxd.cli.options import REMOTE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.client.aio import AsyncClient

__all__ = ["forward"]

CHUNK = 65536
BACKLOG = 128
NOT_YET = 0.2  # seconds between two questions whether the call runs by now
UNIX = "unix:"


def forward(
    call_id: Id,
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
    """Take connections here and pass each on to a server inside a running call, until the call ends.

    Whoever can connect to the address is let in, so it is this host's loopback unless another is given.
    The address is printed on stdout when it takes connections.
    """
    client = remote.client()
    found = find(client, call_id)
    if not 0 < port < 65536:
        raise errors.InvalidRequest(f"{port} is not the number of a port", field="PORT")
    from sandboxd.client.aio import AsyncClient  # noqa: PLC0415 - `--help` must not pay for it

    with _listening(listen) as (listener, address):
        anyio.run(_Forward(AsyncClient(remote.socket), found, port).run, listener, address, remote.json)


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
        ours = path.lstat()
        try:
            sock.listen(BACKLOG)
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                now = path.lstat()
                if (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino):
                    path.unlink()


class _Forward:
    """One port of one call."""

    def __init__(self, client: AsyncClient, call: str, port: int) -> None:
        self._client = client
        self._call = call
        self._port = port

    async def run(self, listener: socket.socket, address: str, as_json: bool) -> None:  # noqa: FBT001 - of anyio.run
        """Until the call ends. Raises Refused."""
        await self._allowed()
        if as_json:
            terminal.print_json({"address": address})
        else:
            terminal.print_text(address)
        sys.stdout.flush()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._accept, listener)
            await self._ended()
            tasks.cancel_scope.cancel()
        terminal.complain("the call has ended")

    async def _allowed(self) -> None:
        """Wait until the call runs. Raises PortNotExposed, NotFound, CallEnded."""
        while True:
            try:
                ports = await self._client.ports(self._call)
            except errors.CallNotStarted:
                await anyio.sleep(NOT_YET)
                continue
            if self._port not in ports:
                listed = ", ".join(map(str, ports))
                raise errors.PortNotExposed(
                    f"port {self._port} is not exposed; `expose` of the policy has {listed}", exposed=ports
                )
            return

    async def _ended(self) -> None:
        async with await self._client.events(self._call, follow=True) as events:
            async for event in events:
                if event.invocation is not None or event.type == "ended":
                    return

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
                there = await self._client.connect(self._call, self._port)
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
