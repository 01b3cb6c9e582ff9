"""The file that a bound Unix socket has in the file system (unix(7)), which does not go with the socket."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["removed"]


@contextmanager
def removed(path: Path) -> Iterator[None]:
    """The file that is there now is removed at the end, unless another has taken its place."""
    ours = path.lstat()
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            now = path.lstat()
            if (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino):
                path.unlink()
