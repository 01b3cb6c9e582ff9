"""Questions to a container's resolver as they come over its sockets, and the answers on their way back."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from sandboxd.egress.streams import write

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ["NameServer"]

SILENT_SECONDS = 10.0  # that a stream of questions may be
IPV6_PKTINFO = 50
READ = 4096


class NameServer:
    """``answer`` gives what goes back to a question, if anything does; ``fault`` is told that it raised."""

    def __init__(self, answer: Callable[[bytes], bytes | None], fault: Callable[[], None]) -> None:
        self._answer = answer
        self._fault = fault

    async def datagrams(self, sock: socket.socket) -> None:
        """Serve a socket of UDP."""
        while True:
            try:
                question, ancillary, _, sender = sock.recvmsg(READ, 256)
            except BlockingIOError:
                await anyio.wait_readable(sock)
                continue
            except OSError:
                continue
            try:
                answer = self._answer(question)
            except Exception:  # noqa: BLE001  (one question's, and no reason to end the others)
                self._fault()
                answer = None
            if answer is not None:
                with suppress(OSError):  # whoever asked may be gone
                    sock.sendmsg([answer], list(_from_where(ancillary)), 0, sender)
            await anyio.lowlevel.checkpoint()

    async def stream(self, client: socket.socket) -> None:
        """Serve a connection of TCP, each message after its length (RFC 1035, section 4.2.2)."""
        data = b""
        with anyio.move_on_after(SILENT_SECONDS) as scope:
            while True:
                while len(data) >= 2 and len(data) >= (size := 2 + int.from_bytes(data[:2])):
                    answer = self._answer(data[2:size])
                    data = data[size:]
                    if answer is not None:
                        await write(client, struct.pack(">H", len(answer)) + answer)
                    scope.deadline = anyio.current_time() + SILENT_SECONDS
                await anyio.wait_readable(client)
                read = client.recv(READ)
                if not read:
                    return
                data += read


def _from_where(ancillary: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """So that an answer comes from where the question went."""
    return [(level, kind, data[:16] + bytes(4)) for level, kind, data in ancillary if kind == IPV6_PKTINFO]
