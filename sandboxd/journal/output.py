"""One stream of a call while it is written: its file, and what of it has a number."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd.journal.index import Summary

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["OLD", "Output", "boundary", "opened", "pwrite", "sync_directory"]

OLD = 20_000  # microseconds after which pending output gets its number when more comes


@dataclass
class Output:
    """What is stored, and what is pending from ``sealed`` to ``size``. Its file is made when it is needed."""

    path: Path
    cap: int
    fd: int = -1
    size: int = 0
    sealed: int = 0
    since: int = 0
    dropped: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def pending(self) -> int:
        """Bytes that have no number yet."""
        return self.size - self.sealed

    def is_old(self, now: int) -> bool:
        """Whether something is pending for long."""
        return self.pending > 0 and not 0 <= now - self.since < OLD  # the clock may be set back

    def write(self, data: bytes | memoryview) -> None:
        """Put bytes after those that are stored; ``size`` is the caller's to move. Raises OSError."""
        if self.fd < 0:
            self.fd = opened(self.path)
        pwrite(self.fd, data, self.size)
        self.digest.update(data)

    def sync(self) -> None:
        """Bring its bytes to disk, also those that an earlier daemon wrote. Raises OSError."""
        if self.fd < 0 and self.size:
            self.fd = opened(self.path)
        if self.fd >= 0:
            os.fdatasync(self.fd)

    def summary(self) -> Summary:
        """What a closed spool says of the stream."""
        digest = "sha256:" + self.digest.hexdigest()
        return Summary(size=self.size, digest=digest, dropped=self.dropped)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def opened(path: Path) -> int:
    """A file of a spool, for writing. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def pwrite(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data``. Raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def boundary(data: bytes | memoryview) -> int:
    """How much of ``data`` can be kept without cutting a UTF-8 character that goes on after it."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # not a continuation: the character starts here
            length = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if length > back else len(data)
    return len(data)
