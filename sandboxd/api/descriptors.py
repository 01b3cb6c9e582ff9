"""The socket beside the API's over which callers pass directories, since HTTP has no place for a
descriptor.

Theory of operation.  A caller connects and sends one byte, or a line, with one descriptor (SCM_RIGHTS,
unix(7)). It gets a line of JSON: ``{"handle": …}``, or a problem as the API's. The handle is good once,
for the same uid, as long as the connection is open and no longer than ``WAIT``: whoever goes away leaves
nothing here. The kernel says who it is, as for the API, and who is nobody there is nobody here.

What is passed may be anything, and may sleep when it is closed: a socket with SO_LINGER, a FUSE file. So
no descriptor of a peer's, nor a connection that may still have some in its queue, is closed in the event
loop; ``lanes`` are where, and the connection counts until then. All that one message can carry is
received, since the kernel closes the rest of it in the thread that receives.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pydantic_core
import structlog

from sandboxd import errors
from sandboxd.api import problem
from sandboxd.api.identity import peer_of
from sandboxd.api.listener import bind
from sandboxd.config import default_socket
from sandboxd.kernel import descriptors
from sandboxd.workspace.checkout import Owner
from sandboxd.workspace.handles import Handed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.api.identity import Identity, Peer
    from sandboxd.config import SocketConfig
    from sandboxd.lanes import Lanes
    from sandboxd.workspace.handles import Handles

__all__ = ["Descriptors", "listening_beside", "path_beside"]

SUFFIX = ".fds"
SEND = 5.0
"""Seconds that a peer has to send its descriptor, and to read the answer."""
WAIT = 60.0
CONNECTIONS = 32
"""Of one uid."""
CLOSING = 256
"""Connections of one uid beyond that, which wait to be closed; with more, nobody's are accepted."""
MAX_MESSAGE = 4096
SCM_MAX_FD = 253
"""Descriptors of one message: net/scm.h."""
NOBODY = -1

log = structlog.get_logger(__name__)


def path_beside(api: Path) -> Path:
    """Where the socket is, beside that of the API: ``sandboxd.sock`` has ``sandboxd.fds.sock``."""
    return api.with_name(f"{api.stem}{SUFFIX}{api.suffix}")


@contextmanager
def listening_beside(api: socket.socket, config: SocketConfig) -> Iterator[socket.socket]:
    """The socket, beside the one that the API has, with its mode and group. Raises ConfigInvalid."""
    # One that was inherited has the name that it was bound to; ours was bound to another, and renamed.
    name = api.getsockname()
    inherited = isinstance(name, str) and name != "" and Path(name).is_socket()
    path = path_beside(Path(name) if inherited else config.path or default_socket())
    with bind(path, mode=config.mode, group=config.group) as sock:
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


class Descriptors:
    """Takes directories from callers for ``handles``; ``lanes`` are where what they passed is closed."""

    def __init__(self, handles: Handles, identity: Identity, lanes: Lanes) -> None:
        self._handles = handles
        self._lanes = lanes
        self._fewer = anyio.Event()
        self._identity = identity
        self._connections: Counter[int] = Counter()

    async def serve(self, sock: socket.socket) -> None:
        """Serve on a listening socket that does not block, until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                while any(count >= CONNECTIONS + CLOSING for count in self._connections.values()):
                    self._fewer = anyio.Event()
                    await self._fewer.wait()
                await anyio.wait_readable(sock)
                try:
                    connection, _ = sock.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError as error:
                    log.warning("no descriptor can be taken", error=str(error))
                    await anyio.sleep(0.1)
                    continue
                connection.setblocking(False)
                try:
                    peer = peer_of(connection)
                except OSError:  # it has gone already; the kernel knows no more whose lane this is
                    tasks.start_soon(self._close, connection, NOBODY)
                    continue
                self._connections[peer.uid] += 1
                tasks.start_soon(self._serve, connection, peer)

    async def _serve(self, connection: socket.socket, peer: Peer) -> None:
        try:
            with suppress(OSError):
                if self._connections[peer.uid] <= CONNECTIONS:
                    await self._one(connection, peer)
        finally:
            await self._close(connection, peer.uid)
            self._connections[peer.uid] -= 1
            if not self._connections[peer.uid]:
                del self._connections[peer.uid]
            self._fewer.set()

    async def _close(self, connection: socket.socket, uid: int) -> None:
        await self._lanes.run(uid, connection.close, always=True)

    async def _one(self, connection: socket.socket, peer: Peer) -> None:
        handle: str | None = None
        try:
            try:
                handle = await self._handle(connection, peer)
                answer = pydantic_core.to_json({"handle": handle})
            except errors.Refused as error:
                answer = problem.document(error.status, error.code, str(error), error.details)
            with anyio.move_on_after(SEND):
                await _sent(connection, answer + b"\n")
            if handle is not None:
                with anyio.move_on_after(WAIT):
                    await anyio.wait_readable(connection)  # its end: what it passed goes with it
        finally:
            found = None if handle is None else self._handles.drop(handle)
            if found is not None:
                await self._lanes.run(peer.uid, lambda: found.__exit__(None, None, None), always=True)

    async def _handle(self, connection: socket.socket, peer: Peer) -> str:
        handed = await self._received(connection, peer)
        try:
            return self._handles.add(handed)
        except errors.QueueFull:
            await self._lanes.run(peer.uid, lambda: _close_all([handed.directory]), always=True)
            raise

    async def _received(self, connection: socket.socket, peer: Peer) -> Handed:
        if self._identity.caller(peer).role == "none":
            raise errors.NotIdentified(
                f"no rule of the configuration's `callers` matches uid {peer.uid}", uid=peer.uid
            )
        with anyio.move_on_after(SEND) as late:
            await anyio.wait_readable(connection)
        if late.cancelled_caught:
            raise errors.RequestTimeout(f"no descriptor came within {SEND:g} s")
        _, fds, flags = descriptors.receive(connection, MAX_MESSAGE, SCM_MAX_FD)
        if len(fds) != 1 or flags & socket.MSG_CTRUNC:
            await self._lanes.run(peer.uid, lambda: _close_all(fds), always=True)
            raise errors.InvalidRequest(
                "one descriptor comes with the first bytes, and no more", field="directory"
            )
        return Handed(fds[0], Owner(peer.uid, peer.gid, peer.pid, peer.groups))


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with suppress(OSError):  # of its flush; it is closed
            os.close(fd)


async def _sent(connection: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[connection.send(data) :]
        except BlockingIOError:
            await anyio.wait_writable(connection)
