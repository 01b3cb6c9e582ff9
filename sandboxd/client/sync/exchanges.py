"""What every method of ``Client`` goes through: an exchange on a connection of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from sandboxd.client import transport
from sandboxd.client.endpoint import Endpoint
from sandboxd.client.sync.stream import Stream

if TYPE_CHECKING:
    import socket as sockets
    from collections.abc import Iterable

    from sandboxd.client import wire
    from sandboxd.client.calls.call import Call

__all__ = ["Exchanges"]

T = TypeVar("T")


class Exchanges(Endpoint):
    """Exchanges with the daemon."""

    def _open(self, exchange: wire.Exchange, chunks: Iterable[bytes] | None = None) -> transport.Body:
        return transport.exchange(
            self._paths,
            exchange,
            connect_timeout=self._connect_timeout,
            timeout=self._timeout,
            chunks=chunks,
        )

    def _do(self, call: Call[T], chunks: Iterable[bytes] | None = None) -> T:
        with self._open(call.exchange, chunks) as answer:
            return call.decode(answer.read())

    def _raw(self, exchange: wire.Exchange) -> Stream[bytes]:
        answer = self._open(exchange)
        return Stream(answer, answer.chunks())

    def _switch(self, exchange: wire.Exchange) -> sockets.socket:
        return transport.switch(
            self._paths, exchange, connect_timeout=self._connect_timeout, timeout=self._timeout
        )
