"""Digests of large files that were read once, known for as long as their inodes say that they are the same.

Theory of operation: what asks for a part of a file, or whether it has changed, has to know the digest of all
of it, and shall not read all of it each time. A file that is written to, cut, linked or replaced has another
inode, size, or time of change, which nobody sets. What a disk loses, or what is written past the file system,
is not seen in them: it is found when the file is read as a whole, or by another daemon. Nothing is remembered
of small files, which are read as fast, nor beyond ``MOST``: then those that were asked for longest ago go.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SMALL", "Digests", "Identity", "identity"]

SMALL = 1 << 20
"""Bytes of a file that is read each time."""
MOST = 2048

Identity: TypeAlias = "tuple[int, int, int, int, int]"


def identity(file: int) -> Identity:
    """What tells an open file from any other, and from itself after a change. Raises OSError."""
    found = os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Digests:
    """Those of one daemon, for files that only it writes to. Threads may share it."""

    def __init__(self, most: int = MOST) -> None:
        """At most so many are remembered."""
        self._most = most
        self._lock = threading.Lock()
        self._known: OrderedDict[Identity, str] = OrderedDict()

    def find(self, file: Identity) -> str | None:
        """The digest that a file was found to have, as ``sha256:…``; None for one that has to be read."""
        with self._lock:
            found = self._known.get(file)
            if found is not None:
                self._known.move_to_end(file)
            return found

    def add(self, before: Identity, after: Identity, digest: str) -> None:
        """What was read has this digest; it is remembered if the file was the same all the while."""
        if before != after or after[2] <= SMALL:
            return
        with self._lock:
            self._known[after] = digest
            self._known.move_to_end(after)
            while len(self._known) > self._most:
                self._known.popitem(last=False)

    def of(self, file: int, size: int, read: Callable[[], str]) -> str:
        """The digest of the ``size`` bytes of an open file, which ``read`` finds out where it is not known.

        Raises OSError.
        """
        before = identity(file)
        if before[2] != size or (known := self.find(before)) is None:
            known = read()
            if before[2] == size:
                self.add(before, identity(file), known)
        return known
