"""What files say, remembered for as long as the kernel says that they are the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Remembered"]

T = TypeVar("T")
MOST = 1024  # files; beyond that all are read again


class Remembered(Generic[T]):
    """Values read from small files that are replaced by a rename, never written in place."""

    def __init__(self, read: Callable[[Path], T]) -> None:
        """``read`` gives the value of a file; what it raises is not remembered."""
        self._read = read
        self._known: dict[Path, tuple[tuple[int, ...], T]] = {}

    def get(self, path: Path) -> T:
        """The value. Raises OSError where the file cannot be looked at, and what ``read`` does."""
        # before the file is read: one that is replaced in between is seen as one more change
        found = path.stat()
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        known = self._known.get(path)
        if known is not None and known[0] == state:
            return known[1]
        value = self._read(path)
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[path] = (state, value)
        return value
