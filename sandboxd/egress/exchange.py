"""One request of a caller to a server in a container, and its answer: HTTP/1.1, made anew on both sides.

Both are parsed and written again by h11, headers that speak of one connection (RFC 9110, 7.6.1) stay on it,
and the answer says ``Connection: close``: where a message ends, what follows it and whether anything may
follow is never left to the server.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import h11

from sandboxd import errors
from sandboxd.egress.streams import READ, write

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from sandboxd.egress.messages import Enter

__all__ = ["Exchange", "Gone", "Invalid"]

MAX_HEAD = 1 << 16  # bytes of the head of an answer
MAX_INTERIM = 32  # answers before the answer, such as 100 and 103; none of them is passed on
DISCARD_SECONDS, DISCARD_BYTES = 5.0, 16 << 20  # of a request that was answered before its end
OF_ONE_CONNECTION = {
    b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
    b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
OURS = {b"host", b"expect", b"x-forwarded-prefix", b"x-forwarded-proto", b"x-forwarded-host"}

Headers = list[tuple[bytes, bytes]]


class Gone(Exception):
    """Raised when the caller has closed its connection, or breaks off its request."""


class Invalid(Exception):
    """Raised for what a server said that is no HTTP, or is cut short."""


class Exchange:
    """Of one connection; ``first`` is what the caller has sent so far, from the head of its request on."""

    def __init__(self, caller: socket.socket, tool: socket.socket, enter: Enter, first: bytes) -> None:
        self._caller_sock = caller
        self._tool_sock = tool
        self._enter = enter
        self._caller = h11.Connection(h11.SERVER, max_incomplete_event_size=len(first) + READ)
        self._caller.receive_data(first)
        self._tool = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._asked = anyio.Event()
        self._upgrade: bytes | None = None
        self.received = 0
        """Bytes that the server got."""
        self.sent = 0

    async def run(self) -> tuple[bytes, bytes] | None:
        """Ask and answer. For an upgrade that the server took, what both sides said after it; else None.

        Raises Invalid, Gone, OSError; the caller has been told as much as it still could be.
        """
        request = self._caller.next_event()
        assert isinstance(request, h11.Request)  # noqa: S101  (the daemon has parsed it before)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._ask, request)
                upgraded = await self._answer()
                tasks.cancel_scope.cancel()
        except* h11.RemoteProtocolError as group:
            await self._failed(f"the answer is no HTTP: {group.exceptions[0]}")
        except* Invalid as group:
            await self._failed(str(group.exceptions[0]))
        except* ConnectionError:
            await self._failed("the server closed the connection before it had answered")
        if upgraded is None:
            await self._discard()
        return upgraded

    # what is asked

    async def _ask(self, request: h11.Request) -> None:
        try:
            await self._to_tool(self._request(request))
            self._asked.set()
            if self._caller.they_are_waiting_for_100_continue:
                await self._to_caller(h11.InformationalResponse(status_code=100, headers=[]))
            while not isinstance(event := await self._from_caller(), h11.EndOfMessage):
                await self._to_tool(event)
            await self._to_tool(h11.EndOfMessage())
        except ConnectionError:
            self._asked.set()  # it takes no more, and may have answered all the same

    def _request(self, request: h11.Request) -> h11.Request:
        listed = list(request.headers)
        headers = _passed_on(listed, without=OURS)
        if _coded(request):
            headers.append((b"transfer-encoding", b"chunked"))
        self._upgrade = _upgrade(listed)
        if self._upgrade is None:
            headers.append((b"connection", b"close"))
        else:
            headers += [(b"connection", b"Upgrade"), (b"upgrade", self._upgrade)]
        headers += [
            (b"host", b"localhost:%d" % self._enter.port),
            (b"x-forwarded-prefix", self._enter.prefix.encode()),
            (b"x-forwarded-proto", b"http"),
        ]
        target = request.target[len(self._enter.prefix) :]
        return h11.Request(method=request.method, target=target, headers=headers)

    async def _from_caller(self) -> h11.Data | h11.EndOfMessage:
        try:
            while (event := self._caller.next_event()) is h11.NEED_DATA:
                self._caller.receive_data(await read(self._caller_sock))
        except (h11.RemoteProtocolError, ConnectionError) as error:
            raise Gone from error
        assert isinstance(event, h11.Data | h11.EndOfMessage)  # noqa: S101  (nothing else follows a request)
        return event

    async def _to_tool(self, event: h11.Event) -> None:
        data = self._tool.send(event) or b""
        await write(self._tool_sock, data)
        self.received += len(data)

    # what is answered

    async def _answer(self) -> tuple[bytes, bytes] | None:
        await self._asked.wait()
        interim = 0
        while isinstance(event := await self._from_tool(), h11.InformationalResponse):
            if event.status_code == 101:
                return await self._switched(event)
            interim += 1
            if interim > MAX_INTERIM:
                raise Invalid(
                    f"more than {MAX_INTERIM} answers that are none, with status {event.status_code}"
                )
        assert isinstance(event, h11.Response)  # noqa: S101  (nothing else comes first)
        headers = _passed_on(list(event.headers))
        await self._to_caller(
            h11.Response(
                status_code=event.status_code,
                headers=[*headers, (b"connection", b"close")],
                reason=event.reason,
            )
        )
        while not isinstance(event := await self._from_tool(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise Invalid("the answer is cut short")
            await self._to_caller(event)
        await self._to_caller(h11.EndOfMessage())
        return None

    async def _switched(self, event: h11.InformationalResponse) -> tuple[bytes, bytes]:
        listed = list(event.headers)
        if self._upgrade is None or _upgrade(listed) != self._upgrade:
            raise Invalid("the server switches to a protocol that was not asked for")
        headers = [*_passed_on(listed), (b"connection", b"Upgrade"), (b"upgrade", self._upgrade)]
        await self._to_caller(
            h11.InformationalResponse(status_code=101, headers=headers, reason=event.reason)
        )
        return self._caller.trailing_data[0], self._tool.trailing_data[0]

    async def _from_tool(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._tool.next_event()) is h11.NEED_DATA:
            data = await read(self._tool_sock)
            if not data and self._tool.their_state is h11.SEND_RESPONSE and not self._tool.trailing_data[0]:
                raise Invalid("the server closed the connection before it had answered")
            self.sent += len(data)
            self._tool.receive_data(data)
        return event  # type: ignore[return-value]  # NEED_DATA is what the loop leaves out

    async def _to_caller(self, event: h11.Event) -> None:
        try:
            await write(self._caller_sock, self._caller.send(event) or b"")
        except ConnectionError as error:
            raise Gone from error

    async def _failed(self, why: str) -> None:
        """Tell the caller in place of an answer, where that has not begun. Raises Invalid."""
        if self._caller.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            kind = errors.PortAnswerInvalid
            said = f"port {self._enter.port}: {why}"
            problem = {"type": "about:blank", "title": "Bad Gateway", "status": kind.status}
            body = json.dumps({**problem, "code": kind.code, "detail": said}).encode()
            headers = [
                (b"content-type", b"application/problem+json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
            ]
            with suppress(OSError, Gone):
                await self._to_caller(h11.Response(status_code=kind.status, headers=headers))
                await self._to_caller(h11.Data(data=body))
                await self._to_caller(h11.EndOfMessage())
                await self._discard()
        raise Invalid(why)

    async def _discard(self) -> None:
        """Read what the caller goes on to send for a while, so that it gets to read why it need not."""
        if self._caller.their_state is not h11.SEND_BODY:
            return
        left = DISCARD_BYTES
        with anyio.move_on_after(DISCARD_SECONDS), suppress(OSError):
            self._caller_sock.shutdown(1)  # SHUT_WR
            while left > 0 and (data := await read(self._caller_sock)):
                left -= len(data)


def _passed_on(headers: Headers, without: Iterable[bytes] = ()) -> Headers:
    """Those that do not speak of the connection that they came on."""
    left_out = OF_ONE_CONNECTION | set(_listed(headers, b"connection")) | set(without)
    left_out -= {b"content-length"}  # it frames the message, whatever is said of it,
    if any(name == b"transfer-encoding" for name, _ in headers):
        left_out |= {b"content-length"}  # unless this does (RFC 9112, 6.3)
    return [(name, value) for name, value in headers if name not in left_out]


def _coded(event: h11.Request) -> bool:
    return any(name == b"transfer-encoding" for name, _ in event.headers)


def _listed(headers: Headers, wanted: bytes) -> list[bytes]:
    values = [value for name, value in headers if name == wanted]
    return [each.strip().lower() for value in values for each in value.split(b",")]


def _upgrade(headers: Headers) -> bytes | None:
    """The protocol that is asked for, or taken, if it is one."""
    asked = _listed(headers, b"upgrade")
    return asked[0] if b"upgrade" in _listed(headers, b"connection") and len(asked) == 1 else None


async def read(sock: socket.socket) -> bytes:
    """What comes next; nothing at the end. Raises OSError."""
    while True:
        try:
            return sock.recv(READ)
        except BlockingIOError:
            await anyio.wait_readable(sock)
