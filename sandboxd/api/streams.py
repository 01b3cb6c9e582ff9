"""Responses that are made while they are sent, and callers that go away meanwhile.

A stream is pulled piece by piece: uvicorn's flow control suspends ``send`` while the socket is full,
so a slow reader holds nothing but one piece, and never the tool. Since a reader that has gone away
says nothing, one task waits for the disconnection and ends the stream (or the wait) at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import structlog
from starlette.responses import Response

from sandboxd.errors import HostFailed, RequestTimeout, SandboxdError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

    from starlette.types import Receive, Scope, Send

__all__ = ["StreamResponse", "begun", "until_gone", "while_there"]

T = TypeVar("T")

log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def until_gone(receive: Receive) -> AsyncGenerator[anyio.CancelScope, None]:
    """A cancel scope that ends when the peer goes away. The request's body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    with anyio.CancelScope() as scope:
        watcher = asyncio.create_task(watch())
        try:
            yield scope
        finally:
            watcher.cancel()


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """What it gives; it is cancelled when the peer goes away. The request's body must have been read."""
    async with until_gone(receive):
        return await work
    raise RequestTimeout("the peer has gone")


async def begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, of which the first is there: what is wrong by then is raised, and can be answered."""
    return _Begun(await anext(pieces, None), pieces)


class _Begun:
    """No generator: one that nobody has asked for anything runs nothing when it is closed."""

    def __init__(self, first: bytes | None, rest: AsyncIterator[bytes]) -> None:
        self._first = first
        self._rest = rest

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        first, self._first = self._first, None
        return await anext(self._rest) if first is None else first

    async def aclose(self) -> None:
        await _close(self._rest)


async def _close(pieces: AsyncIterator[bytes]) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()


class StreamResponse(Response):
    """The pieces of an iterator, sent as they come; ``gone`` is called if the peer leaves before the end.

    An iterator that fails, or gives another number of bytes than the head says, ends the connection without
    the end of the body, so that no reader takes what it got for all there is.
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        media_type: str,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        gone: Callable[[], Awaitable[Any]] | None = None,
    ) -> None:
        self.pieces = pieces
        self.gone = gone
        self.status_code = status
        self.background = None
        self.body = b""
        length = (headers or {}).get("content-length")
        self.left = None if length is None else int(length)
        self.raw_headers = [
            (b"content-type", media_type.encode()),
            (b"x-content-type-options", b"nosniff"),
            *((key.lower().encode(), value.encode("latin-1")) for key, value in (headers or {}).items()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        del scope
        ended = False
        try:
            async with until_gone(receive) as watched:
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                async for piece in self.pieces:
                    self._count(piece)
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    # uvicorn's send does not suspend while the socket takes it, nor once the peer has
                    # gone: without this, one long stream would have the event loop to itself.
                    await asyncio.sleep(0)
                ended = not watched.cancel_called
                if self.left and ended:  # uvicorn would take the end for one, and keep the connection
                    raise HostFailed(f"the body has {self.left} bytes less than its head says")
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except SandboxdError as error:
            log.warning("stream cut", code=error.code, reason=str(error))
        finally:
            with anyio.CancelScope(shield=True):
                await _close(self.pieces)
                if not ended and self.gone is not None:
                    await self.gone()

    def _count(self, piece: bytes) -> None:
        if self.left is not None:
            self.left -= len(piece)
            if self.left < 0:
                raise HostFailed("the body has more bytes than its head says")
