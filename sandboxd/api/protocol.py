"""HTTP/1.1 on one connection of the Unix socket: uvicorn's, with an identity and with bounds.

Theory of operation. uvicorn's h11 protocol bounds the size of a header and nothing else. This one
reads the peer's credentials when it connects, puts the caller into the scope of each request, and
keeps one deadline per connection, which says what the peer owes us now:

    idle      a first byte: ``header_timeout`` after connecting, ``keep_alive`` after a response
    header    the end of the header: ``header_timeout`` after its first byte; later bytes buy nothing
    body      the next piece of the body: ``body_timeout``, not counted while we have stopped reading
    discard   the rest of a body that was refused: ``DISCARD_TIME`` and ``DISCARD_BYTES``, so that a
              peer that is still sending gets to read why, and then the connection closes
    (none)    nothing: the request is complete and the answer is ours to give

A deadline is a number that a timer looks at, not a timer that is set anew for each piece of data.
Connections are counted, in total and per uid; one too many is told so and closed. The total does not
hold for operators, or two agents could keep them out.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import h11
import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sandboxd.api import problem
from sandboxd.api.identity import Caller, Identity, peer_of

if TYPE_CHECKING:
    from uvicorn.server import ServerState

    from sandboxd.config import HttpLimits

__all__ = ["CALLER", "DETACH", "BoundedProtocol", "ServerConfig"]

CALLER = "sandboxd.caller"
"""The key of the ``Caller`` in ``scope["state"]``."""

DETACH = "sandboxd.detach"
"""The key of ``BoundedProtocol.detach`` there."""
PASSED_ON = re.compile(rb"/v1/(?:invocations|sessions)/[^/?]+/ports/[^/?]+")
"""Targets of requests that the daemon reads the head of, and somebody else the rest."""

STRANGERS = 16  # connections that peers without a role hold together
DISCARD_TIME = 5.0  # seconds
DISCARD_BYTES = 16 * 2**20
DETACH_TIME = 2.0  # seconds that a peer has to read the answers before its last request
BULK = 128 * 1024  # bytes of one write from which on a connection gets a larger buffer in the kernel
SEND_BUFFER = 512 * 1024  # bytes; socket(7)
SO_SNDBUFFORCE = 32  # asm-generic/socket.h: beyond net.core.wmem_max, for who has CAP_NET_ADMIN
CLOSE = [(b"content-type", problem.MEDIA_TYPE.encode()), (b"connection", b"close")]

log = structlog.get_logger(__name__)


class JoinedWrites:
    """A transport that sends together what is written within one turn of the event loop.

    An answer is a head and a body, and each write wakes the peer: it would get up twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []
        self._is_wide = False

    def write(self, data: bytes) -> None:
        """Have it sent at the end of this turn."""
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)

    def _flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        if not pieces:
            return
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(data) >= BULK and not self._is_wide:
            self._is_wide = True
            with contextlib.suppress(OSError):  # else it is sent in more pieces
                sock = self._transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
        self._transport.write(data)

    def get_write_buffer_size(self) -> int:
        """Bytes that are not sent yet."""
        return sum(map(len, self._pieces)) + self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Close once what was written is sent."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(h11.Connection):
    """h11's of one peer, which stops after the head of a request whose rest is not the daemon's to read."""

    def __init__(self, headers: int) -> None:
        super().__init__(h11.SERVER, headers)
        self.held = False

    def next_event(self) -> Any:
        """As h11's; PAUSED while it is held."""
        if self.held:
            return h11.PAUSED
        event = super().next_event()
        self.held = isinstance(event, h11.Request) and PASSED_ON.match(event.target) is not None
        return event


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration with what ``BoundedProtocol`` needs, shared by all connections."""

    def __init__(self, app: Any, limits: HttpLimits, identity: Identity) -> None:
        super().__init__(
            app,
            http=BoundedProtocol,
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # what uvicorn would log is logged here or in app, as structured data
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=limits.headers,
            timeout_graceful_shutdown=5,
        )
        self.limits = limits
        self.identity = identity
        self.per_uid: Counter[int] = Counter()
        self.strangers = 0


class BoundedProtocol(H11Protocol):
    """One connection. See the module's theory of operation."""

    config: ServerConfig

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = config.limits
        self.conn: Connection = Connection(config.limits.headers)
        self.caller: Caller | None = None
        self.phase: Literal["idle", "header", "body", "discard"] | None = "idle"
        self.deadline = self.loop.time() + self.limits.header_timeout / 1e6
        self.discarded = 0
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read who connected, and turn away one too many."""
        super().connection_made(transport)
        self.transport = JoinedWrites(transport, self.loop)  # type: ignore[assignment]  # all that is used of one
        try:
            self.caller = self.config.identity.caller(peer_of(transport.get_extra_info("socket")))
        except OSError as error:
            log.warning("peer without credentials", error=str(error))
            transport.abort()
            return
        self.app_state = {
            CALLER: self.caller,
            DETACH: self.detach,
        }  # uvicorn copies it into the scope of each request
        self.config.per_uid[self.caller.uid] += 1
        self.config.strangers += self.caller.role == "none"
        over = self._over()
        if over is not None:
            log.warning("connection refused", uid=self.caller.uid, reason=over)
            self._refuse(503, "queue_full", over)
            return
        self.timer = self.loop.call_at(self.deadline, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the connection counted."""
        super().connection_lost(exc)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self._unset_keepalive_if_required()
        if self.caller is not None:
            self.config.per_uid[self.caller.uid] -= 1
            if not self.config.per_uid[self.caller.uid]:
                del self.config.per_uid[self.caller.uid]
            self.config.strangers -= self.caller.role == "none"

    def _over(self) -> str | None:
        operator = self.caller is not None and self.caller.role == "operator"
        if len(self.connections) > self.limits.connections and not operator:
            return f"more than {self.limits.connections} connections"
        if self.caller is None or self.caller.role == "none":
            return "too many peers that match no caller" if self.config.strangers > STRANGERS else None
        if self.config.per_uid[self.caller.uid] > self.limits.connections_per_uid:
            return f"more than {self.limits.connections_per_uid} connections of one user"
        return None

    def data_received(self, data: bytes) -> None:
        """Let h11 have the data, unless it belongs to a body that was refused for too long already."""
        if self.transport.is_closing():
            return
        if self.phase == "discard":
            self.discarded += len(data)
            if self.discarded > DISCARD_BYTES:
                self.transport.close()
                return
        elif self.phase == "body":
            self.deadline = self.loop.time() + self.limits.body_timeout / 1e6
        super().data_received(data)

    def handle_events(self) -> None:
        """Have uvicorn act on what came, then see what the peer owes us next."""
        super().handle_events()
        self._owed()

    def on_response_complete(self) -> None:
        """A response ended: the peer may rest for ``keep_alive``, or finish what it was sending."""
        held, self.conn.held = self.conn.held, False
        super().on_response_complete()
        self._unset_keepalive_if_required()  # the deadline below does its work
        if held and not self.transport.is_closing():
            self.handle_events()  # what it was not read for is a body that was refused
        self._owed()

    async def detach(self) -> tuple[socket.socket, bytes]:
        """Give up the connection of a request that is held: it, and what came after the request's head.

        Whoever takes it has it to close. Raises ConnectionError when the peer is gone, or does not read.
        """
        end = self.loop.time() + DETACH_TIME
        while self.transport.get_write_buffer_size():
            if self.loop.time() > end:
                raise ConnectionError("the peer does not read what it asked for before")
            await asyncio.sleep(0.005)
        if not self.conn.held or self.cycle is None or self.transport.is_closing():
            raise ConnectionError("the peer has gone away")
        taken = self.transport.get_extra_info("socket").dup()
        rest, _ = self.conn.trailing_data
        self.cycle.disconnected = True  # uvicorn has nothing to answer any more
        self.transport.abort()  # closes this process's end alone
        return taken, rest

    def _owed(self) -> None:
        state, before = self.conn.their_state, self.phase
        if state is h11.IDLE:
            partial = bool(self.conn.trailing_data[0])
            phase: Literal["idle", "header", "body", "discard"] | None = "header" if partial else "idle"
            limit = (self.limits.header_timeout if partial else self.limits.keep_alive) / 1e6
        elif state is h11.SEND_BODY:
            answered = self.cycle is not None and self.cycle.response_complete
            phase = "discard" if answered else "body"
            limit = DISCARD_TIME if answered else self.limits.body_timeout / 1e6
        else:
            phase, limit = None, 0.0
        if phase != before:
            self.phase = phase
            self.discarded = 0
            self.deadline = self.loop.time() + limit
            if phase is not None and not self.transport.is_closing():
                self._watch()

    def _watch(self) -> None:
        """Have the timer look no later than the deadline."""
        if self.timer is None or self.timer.cancelled():
            self.timer = self.loop.call_at(self.deadline, self._check)
        elif self.timer.when() > self.deadline:
            self.timer.cancel()
            self.timer = self.loop.call_at(self.deadline, self._check)

    def _check(self) -> None:
        self.timer = None
        if self.phase is None or self.transport.is_closing():
            return
        now = self.loop.time()
        if self.phase == "body" and self.flow.read_paused:
            self.deadline = now + self.limits.body_timeout / 1e6
        if now < self.deadline:
            self.timer = self.loop.call_at(self.deadline, self._check)
        elif self.phase in {"idle", "discard"}:
            self.transport.close()
        else:
            part = "header" if self.phase == "header" else "body"
            self._refuse(408, "request_timeout", f"the {part} of the request did not arrive in time")

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or a header over its limit; ``msg`` is uvicorn's."""
        limit = self.limits.headers
        if len(self.conn.trailing_data[0]) > limit and self.phase != "body":
            self._refuse(413, "too_large", f"the header is larger than {limit} bytes", {"limit": limit})
        else:
            self._refuse(400, "invalid_request", msg)

    def _refuse(self, status: int, code: str, detail: str, details: dict[str, Any] | None = None) -> None:
        """Answer with a problem if an answer has not begun, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        else:
            begun = False
        if not begun and self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            body = problem.document(status, code, detail, details)
            headers = [*CLOSE, (b"content-length", str(len(body)).encode())]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
