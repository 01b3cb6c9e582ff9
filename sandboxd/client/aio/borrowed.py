"""Blocking work for a task: in a thread, with a client whose exchanges the task's event loop performs.

What is written for ``Client`` and reads and writes files serves ``AsyncClient`` in this way. Where the task
is cancelled, the exchange that is under way ends at once and no other begins; the task waits for its thread,
so that nothing goes on behind its back.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import from_thread, to_thread
from anyio.lowlevel import checkpoint

from sandboxd.client.sync import Client
from sandboxd.client.transport import Body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

    from sandboxd.client import wire
    from sandboxd.client.aio.exchanges import Exchanges
    from sandboxd.client.async_transport import AsyncAnswer

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(owner: Exchanges, work: Callable[[Client], T]) -> T:
    """What work with a blocking client gives. Raises what it raises."""
    found: list[T] = []
    raised: list[BaseException] = []

    async def run() -> None:
        try:
            # A limiter of its own: its exchanges take threads of the common one, and must not wait for it.
            one = anyio.CapacityLimiter(1)
            found.append(await to_thread.run_sync(work, _Borrowed(owner), limiter=one))
        except Exception as error:  # noqa: BLE001 - raised below, and in no group
            raised.append(error)

    # The group waits for the thread, however its task is cancelled.
    async with anyio.create_task_group() as group:
        group.start_soon(run)
    await checkpoint()  # where it was cancelled, this says so
    if raised:
        raise raised[0]
    return found[0]


class _Borrowed(Client):
    """The client of a thread; the task that waits for it has the connections."""

    def __init__(self, owner: Exchanges) -> None:
        self._owner = owner

    def _open(self, exchange: wire.Exchange, chunks: Iterable[bytes] | None = None) -> Body:
        from_thread.check_cancelled()
        return _Answer(from_thread.run(self._opened, exchange, chunks))

    async def _opened(self, exchange: wire.Exchange, chunks: Iterable[bytes] | None) -> AsyncAnswer:
        if chunks is None:
            return await self._owner._open(exchange)  # noqa: SLF001 - it stands for its owner
        async with aclosing(_from_thread(chunks)) as pieces:
            return await self._owner._open(exchange, pieces)  # noqa: SLF001 - same


class _Answer(Body):
    def __init__(self, answer: AsyncAnswer) -> None:
        super().__init__(answer.location, answer.omitted)
        self._answer = answer
        self._chunks = answer.chunks()

    def set_timeout(self, timeout: float | None) -> None:
        self._answer.set_timeout(timeout)

    def chunks(self) -> Iterator[bytes]:
        while (chunk := self._piece()) is not None:
            yield chunk

    def _piece(self) -> bytes | None:
        from_thread.check_cancelled()
        return from_thread.run(self._next)

    async def _next(self) -> bytes | None:
        return await anext(self._chunks, None)

    def close(self) -> None:
        from_thread.run(self._close)

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._chunks.aclose()
            await self._answer.aclose()


async def _from_thread(chunks: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The same, each made in a thread: files are read for it."""
    found = iter(chunks)
    try:
        while (chunk := await to_thread.run_sync(next, found, None)) is not None:
            yield chunk
    finally:
        if isinstance(found, Generator):
            found.close()  # it has a file open
