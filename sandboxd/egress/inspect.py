"""A connection whose rules look into HTTP: TLS is ended here, with a certificate of the daemon's authority.

The server is connected to first where it can be, so that both sides speak the version of HTTP that it chose;
where it cannot, the program is told why by an answer of HTTP.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import anyio

from sandboxd.egress.http1 import Http1
from sandboxd.egress.http2 import Http2
from sandboxd.egress.streams import Broken, Counted, Plain
from sandboxd.egress.tls import ClientTls, ServerTls
from sandboxd.egress.upstream import Unreachable

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from sandboxd.egress.hello import Hello
    from sandboxd.egress.leaves import Leaves
    from sandboxd.egress.servers import Servers
    from sandboxd.egress.site import Site
    from sandboxd.egress.streams import Stream

__all__ = ["Inspection"]

H2, HTTP1 = "h2", "http/1.1"
ALERT_SECONDS = 2.0
LEAST = 4  # bytes that tell it from every method
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, section 3.4


class Inspection:
    """One connection to ``site``; ``connect`` makes one to the server, in plain."""

    def __init__(
        self,
        client: Counted,
        site: Site,
        connect: Callable[[], Awaitable[socket.socket]],
        *,
        leaves: Leaves,
        servers: Servers,
    ) -> None:
        self._client = client
        self._site = site
        self._connect = connect
        self._leaves = leaves
        self._servers = servers
        self._held = ExitStack()
        self._offered: tuple[str, ...] = ()
        """Of the protocols that a server may choose from."""

    async def run(self, hello: Hello | None, first: bytes) -> None:
        """Until either side ends; ``hello`` is None of plain HTTP. Raises OSError, Cut."""
        with self._held:
            if hello is not None:
                await self._over_tls(hello)
            elif len(first) >= LEAST and PREFACE.startswith(first[: len(PREFACE)]):
                await Http2(self._client, self._site, self._reach).run()
            else:
                await Http1(self._client, self._site, self._reach).run()

    async def _over_tls(self, hello: Hello) -> None:
        self._offered = tuple(each for each in (H2, HTTP1) if each in hello.protocols)
        server: Stream | None = None
        try:
            server, chosen = await self._reach_with_protocol()
        except (Broken, Unreachable):  # it is tried again for each request, whose answer says why
            chosen = HTTP1 if HTTP1 in self._offered or not self._offered else H2
        protocol = H2 if chosen == H2 else HTTP1  # a server that chooses none speaks that
        client = ServerTls(self._client, self._leaves.connection(self._site.name, [protocol.encode()]))
        try:
            await client.handshake()
        except Broken:
            await self._client.finish()
            with anyio.move_on_after(ALERT_SECONDS):  # so that it is read before the connection is reset
                while await self._client.receive():
                    pass
            raise
        self._offered = (protocol,) if self._offered else ()  # what follows is of what was agreed on
        serve = Http2 if protocol == H2 else Http1
        await serve(client, self._site, self._reach, server).run()

    async def _reach(self) -> Stream:
        stream, chosen = await self._reach_with_protocol()
        if H2 in self._offered and chosen != H2:
            raise Broken("the server does not speak HTTP/2, which was agreed on with the program")
        return stream

    async def _reach_with_protocol(self) -> tuple[Stream, str | None]:
        """A connection to the server; the one before it ends. Raises Broken, Unreachable."""
        self._held.close()
        sock = self._held.enter_context(await self._connect())
        stream = Plain(sock)
        if self._site.scheme == "http":
            return stream, None
        tls = ClientTls(stream, self._servers.context(self._offered), self._site.name)
        try:
            return tls, await tls.handshake()
        except Broken:
            raise
        except OSError as error:
            raise Broken(f"TLS with the server: {error}") from error
