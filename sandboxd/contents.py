"""What is kept under a digest, compared with it while it is read.

Theory of operation: what is damaged must not pass for what the digest names. Whether a content is there,
and as long as it was, is seen before its first byte is given; one of up to ``SMALL`` bytes is digested before
that too, also where a part of it is asked for. A larger one is digested while it is read, and its last piece
is held back until the digest is known to be right: whoever reads it has fewer bytes than there should be, and
an error. Of a part of a larger one nothing but the length is checked, since the digest is of the whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
from typing import TYPE_CHECKING, BinaryIO

import anyio.to_thread

from sandboxd import errors
from sandboxd.journal.evidence import opened

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["SMALL", "read"]

SMALL = 1 << 20
PIECE = 256 * 1024  # bytes that are read at once
ANOTHER = {errno.EINVAL, errno.EISDIR, errno.ELOOP}  # of what is opened as a regular file, and is none


async def read(
    path: Path, digest: str, size: int, *, what: str, start: int = 0, length: int | None = None
) -> AsyncGenerator[bytes]:
    """Bytes of a content from ``start`` on, ``length`` of them or all, in pieces.

    ``size`` and ``digest`` are of the whole, ``what`` is what errors call it. Raises JournalCorrupt where
    it is not there, or not what they say, HostFailed where it cannot be read: before the first piece as far
    as the module says so.
    """
    content = _Content(path, digest, size, what)
    end = size if length is None else min(size, start + length)
    with await anyio.to_thread.run_sync(content.open):
        if size <= SMALL:
            data = (await anyio.to_thread.run_sync(content.whole))[start:end]
            for at in range(0, len(data), PIECE):
                yield data[at : at + PIECE]
            return
        content.at, content.is_whole = start, (start, end) == (0, size)
        while content.at < end:
            yield await anyio.to_thread.run_sync(content.next, end)


class _Content:
    """One that is being read. Its methods block on the disk, and raise JournalCorrupt, HostFailed."""

    def __init__(self, path: Path, digest: str, size: int, what: str) -> None:
        self._path = path
        self._expected = digest
        self._size = size
        self._what = what
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self.at = 0
        self.is_whole = False

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Open it, if it is as long as it was; leaving what is returned closes it."""
        try:
            file = opened(self._path)
            found = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise self._damaged("is gone from the store, though records name it") from None
        except OSError as error:
            if error.errno in ANOTHER:
                raise self._damaged("is damaged: what is there is no regular file") from error
            raise self._unreadable(error) from error
        if found != self._size:
            file.close()
            raise self._damaged(f"is damaged: it has {found} bytes, and was recorded with {self._size}")
        self._file = file
        return file

    def whole(self) -> bytes:
        """All of it, which is small."""
        self.is_whole = True
        pieces = []
        while self.at < self._size:
            pieces.append(self.next(self._size))
        self._check()  # of an empty one there is no piece
        return b"".join(pieces)

    def next(self, end: int) -> bytes:
        """The next piece of what ends at ``end``; the last one only where the digest is right."""
        assert self._file is not None  # noqa: S101  (it was opened)
        try:
            data = os.pread(self._file.fileno(), min(PIECE, end - self.at), self.at)
        except OSError as error:
            raise self._unreadable(error) from error
        if not data:
            raise self._damaged("has lost its end")
        self.at += len(data)
        if self.is_whole:
            self._digest.update(data)
            if self.at == end:
                self._check()
        return data

    def _check(self) -> None:
        if (found := f"sha256:{self._digest.hexdigest()}") != self._expected:
            raise self._damaged(f"is damaged: what is there has the digest {found}")

    def _unreadable(self, error: OSError) -> errors.HostFailed:
        return errors.HostFailed(f"{self._what} {self._expected} cannot be read: {error.strerror}")

    def _damaged(self, how: str) -> errors.JournalCorrupt:
        return errors.JournalCorrupt(f"{self._what} {self._expected} {how}", digest=self._expected)
