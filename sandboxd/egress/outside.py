"""The host's network, of which this process has no socket but those that the daemon hands to it.

It can make none, and connect none: each connection is asked for by address and port, and the daemon looks at
its rules again before it makes one. Of name servers it gets connections too, but no socket of UDP, from which
a datagram could be sent anywhere: those go through the daemon, which reads nothing in them.
"""

from __future__ import annotations

import base64
import errno
import os
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn

import anyio
import dns.asyncbackend
import dns.exception

from sandboxd.egress.streams import Plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.reach import Address

__all__ = ["MAX_ASKED", "MAX_QUERY", "MAX_REPLY", "NameServers", "Outside"]

MAX_ASKED = 128  # that the daemon is asked for at once, of connections and of queries each
MAX_QUERY = 1024  # bytes
MAX_REPLY = 4096


class _Asked:
    """What is waited for."""

    def __init__(self) -> None:
        self.came = anyio.Event()
        self.fd = -1
        self.code = errno.EIO
        self.replies: deque[bytes] = deque()


class Outside:
    """``say`` takes what the daemon is told."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._asked: dict[int, _Asked] = {}
        self._last = 0
        self._connects, self._queries = anyio.Semaphore(MAX_ASKED), anyio.Semaphore(MAX_ASKED)

    async def connect(self, container: str | None, address: Address | str, port: int) -> socket.socket:
        """A connection, which may still be on its way. Raises OSError.

        ``container``: by whose rules; None: to one of the name servers.
        """
        async with self._connects:
            number, asked = self._begin()
            try:
                self._say("connect", id=container, number=number, address=str(address), port=port)
                await asked.came.wait()
            except BaseException:
                if asked.fd >= 0:
                    os.close(asked.fd)
                raise
            finally:
                del self._asked[number]
        if asked.fd < 0:
            raise OSError(asked.code, os.strerror(asked.code))
        return socket.socket(fileno=asked.fd)

    def connected(self, number: int, code: int, fds: list[int]) -> None:
        """What the daemon has made; where nobody wants it any more, it is closed."""
        asked = self._asked.get(number)
        if asked is None or not fds:
            for fd in fds:
                os.close(fd)
        else:
            asked.fd = fds[0]
        if asked is not None:
            asked.code = code
            asked.came.set()

    def query(self, server: str) -> _Query:
        """Datagrams to and from a name server."""
        return _Query(self, server)

    def replied(self, number: int, data: str | None) -> None:
        """What a name server has said; None: there is none."""
        if (asked := self._asked.get(number)) is not None:
            asked.replies.append(b"" if data is None else base64.b64decode(data))
            asked.came.set()

    def _begin(self) -> tuple[int, _Asked]:
        self._last += 1
        asked = self._asked[self._last] = _Asked()
        return self._last, asked


class _Query(dns.asyncbackend.DatagramSocket):
    """As dnspython wants it: one question, and what is said to it."""

    def __init__(self, outside: Outside, server: str) -> None:
        super().__init__(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
        self._outside = outside
        self._server = server
        self._number, self._asked = outside._begin()  # noqa: SLF001
        self._from: Any = None
        self._held = False

    async def sendto(self, what: bytes, destination: Any, timeout: float | None) -> int:  # noqa: ASYNC109
        """The question, of which there is one."""
        with anyio.move_on_after(timeout) as scope:
            await self._outside._queries.acquire()  # noqa: SLF001
            self._held = True
        if scope.cancelled_caught:
            raise dns.exception.Timeout(timeout=timeout)
        self._from = destination
        data = base64.b64encode(what).decode()
        self._outside._say("query", number=self._number, server=self._server, data=data)  # noqa: SLF001
        return len(what)

    async def recvfrom(self, size: int, timeout: float | None) -> tuple[bytes, Any]:  # noqa: ASYNC109
        """One datagram, of the name server alone: the kernel lets no other through."""
        del size
        until = None if timeout is None else time.monotonic() + timeout
        while not self._asked.replies:
            with anyio.move_on_after(None if until is None else until - time.monotonic()) as scope:
                self._asked.came = anyio.Event()
                await self._asked.came.wait()
            if scope.cancelled_caught:
                raise dns.exception.Timeout(timeout=timeout)
        data = self._asked.replies.popleft()
        if not data:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the name server takes no questions")
        return data, self._from

    async def close(self) -> None:
        """Nothing more is waited for."""
        if self._outside._asked.pop(self._number, None) is not None and self._held:  # noqa: SLF001
            self._outside._say("enough", number=self._number)  # noqa: SLF001
            self._outside._queries.release()  # noqa: SLF001


class _Stream(dns.asyncbackend.StreamSocket):
    """A connection to a name server, as dnspython wants it."""

    def __init__(self, sock: socket.socket, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._sock = sock
        self._plain = Plain(sock)
        self._left = b""

    async def sendall(self, what: bytes, timeout: float | None) -> None:  # noqa: ASYNC109
        with anyio.move_on_after(timeout) as scope:
            await self._plain.send(what)
        if scope.cancelled_caught:
            raise dns.exception.Timeout(timeout=timeout)

    async def recv(self, size: int, timeout: float | None) -> bytes:  # noqa: ASYNC109
        with anyio.move_on_after(timeout) as scope:
            self._left = self._left or await self._plain.receive()
        if scope.cancelled_caught:
            raise dns.exception.Timeout(timeout=timeout)
        found, self._left = self._left[:size], self._left[size:]
        return found

    async def close(self) -> None:
        self._sock.close()


class NameServers(dns.asyncbackend.Backend):
    """Sockets for dnspython."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside

    def name(self) -> str:
        return "sandboxd"

    async def make_socket(  # noqa: PLR0917  (so it is called)
        self,
        af: int,
        socktype: int,
        proto: int = 0,
        source: Any = None,
        destination: Any = None,
        timeout: float | None = None,  # noqa: ASYNC109
        ssl_context: Any = None,
        server_hostname: str | None = None,
    ) -> _Query | _Stream:
        """``destination`` is the name server."""
        del proto, source, ssl_context, server_hostname
        if socktype == socket.SOCK_DGRAM:
            return self._outside.query(destination[0])
        with anyio.move_on_after(timeout) as scope:
            return _Stream(await self._outside.connect(None, destination[0], destination[1]), af)
        assert scope.cancelled_caught  # noqa: S101
        raise dns.exception.Timeout(timeout=timeout)

    def datagram_connection_required(self) -> bool:
        """So that ``make_socket`` is told which name server it is for."""
        return True

    async def sleep(self, interval: float) -> None:
        await anyio.sleep(interval)

    def get_transport_class(self) -> NoReturn:
        raise NotImplementedError

    async def wait_for(self, awaitable: Any, timeout: float | None) -> Any:  # noqa: ASYNC109
        with anyio.move_on_after(timeout) as scope:
            return await awaitable
        assert scope.cancelled_caught  # noqa: S101
        raise dns.exception.Timeout(timeout=timeout)
