"""What comes piece by piece from the daemon, for threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from sandboxd.client.transport import Body

__all__ = ["Stream"]

T = TypeVar("T")


class Stream(Generic[T]):
    """Items of an answer as they arrive. An iterator and a context manager; ``close`` hangs up.

    Closing the stream of ``Client.stream`` before its end makes the caller go away: the daemon cancels
    the call unless it has a key.
    """

    def __init__(self, answer: Body, items: Iterator[T] | None = None) -> None:
        self._answer = answer
        self._items: Iterator[T] = iter(()) if items is None else items
        self._limit: float | None = None

    def set_timeout(self, timeout: float | None) -> None:
        """Bound the wait for each further item to so many seconds."""
        self._limit = timeout
        self._answer.set_timeout(timeout)

    def continue_with(self, answer: Body) -> None:
        """Go on with another answer, in the place of one that was cut."""
        self._answer.close()
        self._answer = answer
        if self._limit is not None:
            answer.set_timeout(self._limit)

    @property
    def omitted(self) -> int:
        """Files that the daemon says are not in it."""
        return self._answer.omitted

    @property
    def limit(self) -> float | None:
        """Seconds that the next item may take."""
        return self._limit

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._answer.close()

    def feed(self, items: Iterator[T]) -> None:
        """Say where the items come from."""
        self._items = items

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except BaseException:
            self.close()  # the end, an error: either way nothing more comes
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
