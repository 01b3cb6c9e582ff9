"""What every method of ``AsyncClient`` goes through: an exchange on a connection of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio

from sandboxd.client import async_transport
from sandboxd.client.aio.stream import AsyncStream
from sandboxd.client.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

    from anyio.abc import SocketStream

    from sandboxd.client import wire
    from sandboxd.client.calls.call import Call

__all__ = ["Exchanges", "single"]

T = TypeVar("T")


class Exchanges(Endpoint):
    """Exchanges with the daemon."""

    async def _open(
        self, exchange: wire.Exchange, chunks: AsyncIterable[bytes] | None = None
    ) -> async_transport.AsyncAnswer:
        return await async_transport.exchange(
            self._paths,
            exchange,
            connect_timeout=self._connect_timeout,
            timeout=self._timeout,
            chunks=chunks,
        )

    async def _do(self, call: Call[T], chunks: AsyncIterable[bytes] | None = None) -> T:
        answer = await self._open(call.exchange, chunks)
        try:
            return call.decode(await answer.read())
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()

    async def _raw(self, exchange: wire.Exchange) -> AsyncStream[bytes]:
        answer = await self._open(exchange)
        return AsyncStream(answer, answer.chunks())

    async def _switch(self, exchange: wire.Exchange) -> SocketStream:
        return await async_transport.switch(
            self._paths, exchange, connect_timeout=self._connect_timeout, timeout=self._timeout
        )


async def single(data: bytes) -> AsyncIterator[bytes]:
    """Bytes in one piece."""
    yield data
