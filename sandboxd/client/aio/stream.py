"""What comes piece by piece from the daemon, for tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from sandboxd.client.async_transport import AsyncAnswer

__all__ = ["AsyncStream", "decoded"]

T = TypeVar("T")


class AsyncStream(Generic[T]):
    """Items of an answer as they arrive. An async iterator and context manager; ``aclose`` hangs up."""

    def __init__(self, answer: AsyncAnswer, items: AsyncGenerator[T, None] | None = None) -> None:
        self._answer = answer
        self._items: AsyncGenerator[T, None] = _none() if items is None else items

    @property
    def omitted(self) -> int:
        """Files that the daemon says are not in it."""
        return self._answer.omitted

    def feed(self, items: AsyncGenerator[T, None]) -> None:
        """Say where the items come from."""
        self._items = items

    async def continue_with(self, answer: AsyncAnswer) -> None:
        """Go on with another answer, in the place of one that was cut."""
        before, self._answer = self._answer, answer
        with anyio.CancelScope(shield=True):
            await before.aclose()

    async def aclose(self) -> None:
        """Hang up. May be called twice."""
        with anyio.CancelScope(shield=True):
            await self._items.aclose()
            await self._answer.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await anext(self._items)
        except BaseException:
            await self.aclose()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _none() -> AsyncGenerator[Any, None]:
    """No items: those of the stream are said later, by ``feed``."""
    return
    yield


async def decoded(answer: AsyncAnswer, decode: Callable[[bytes], T]) -> AsyncGenerator[T, None]:
    """What the lines of an answer are."""
    async for line in answer.lines():
        yield decode(line)
