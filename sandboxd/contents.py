"""What is kept under a digest, compared with it when it is read.

Theory of operation: what is damaged must not pass for what the digest names. Whether a content is there,
and as long as it was, is seen before its first byte is given; one of up to ``SMALL`` bytes is digested before
that too, also where a part of it is asked for. A larger one is digested while it is read, and its last piece
is held back until the digest is known to be right: whoever reads it has fewer bytes than there should be, and
an error. Of a part of a larger one that does not tell anything, since the digest is of the whole: before the
first of them all of it is read, and what came of that is remembered (``digests``) for as long as the file is
the same by its inode. Who asks for parts of the same one meanwhile waits, and does not read it once more.
"""

from __future__ import annotations

import errno
import hashlib
import os
from typing import TYPE_CHECKING, BinaryIO
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from sandboxd import errors
from sandboxd.digests import SMALL, identity
from sandboxd.journal.evidence import opened

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sandboxd.digests import Digests, Identity

__all__ = ["Contents"]

PIECE = 256 * 1024  # bytes that are read at once
COMPARED = 4 << 20  # the same, of what nobody gets
ANOTHER = {errno.EINVAL, errno.EISDIR, errno.ELOOP}  # of what is opened as a regular file, and is none


class Contents:
    """Reads them, for one event loop."""

    def __init__(self, digests: Digests) -> None:
        self._digests = digests
        self._comparing: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def read(
        self, path: Path, digest: str, size: int, *, what: str, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes]:
        """Bytes of a content from ``start`` on, ``length`` of them or all, in pieces.

        ``size`` and ``digest`` are of the whole, ``what`` is what errors call it. Raises JournalCorrupt where
        it is not there, or not what they say, HostFailed where it cannot be read: before the first piece as
        far as the module says so.
        """
        content = _Content(path, digest, size, what, self._digests)
        end = size if length is None else min(size, start + length)
        with await anyio.to_thread.run_sync(content.open):
            if size <= SMALL:
                data = (await anyio.to_thread.run_sync(content.whole))[start:end]
                for at in range(0, len(data), PIECE):
                    yield data[at : at + PIECE]
                return
            content.at, content.is_whole = start, (start, end) == (0, size)
            if not content.is_whole and start < end:
                lock = self._comparing.setdefault(digest, anyio.Lock())
                async with lock:
                    await _compare(content)
                content.at = start
            while content.at < end:
                yield await anyio.to_thread.run_sync(content.next, end)


async def _compare(content: _Content) -> None:
    """Read all of it, unless that was done before."""
    if content.is_known():
        return
    content.at, content.is_whole = 0, True
    while content.at < content.size:
        await anyio.to_thread.run_sync(content.next, content.size, COMPARED)
    content.is_whole = False


class _Content:
    """One that is being read. Its methods block on the disk, and raise JournalCorrupt, HostFailed."""

    def __init__(self, path: Path, digest: str, size: int, what: str, digests: Digests) -> None:
        self._path = path
        self._expected = digest
        self.size = size
        self._what = what
        self._digests = digests
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._identity: Identity = (0, 0, 0, 0, 0)
        self.at = 0
        self.is_whole = False

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Open it, if it is as long as it was; leaving what is returned closes it."""
        try:
            file = opened(self._path)
            self._identity = identity(file.fileno())
        except FileNotFoundError:
            raise self._damaged("is gone from the store, though records name it") from None
        except OSError as error:
            if error.errno in ANOTHER:
                raise self._damaged("is damaged: what is there is no regular file") from error
            raise self._unreadable(error) from error
        found = self._identity[2]
        if found != self.size:
            file.close()
            raise self._damaged(f"is damaged: it has {found} bytes, and was recorded with {self.size}")
        self._file = file
        return file

    def is_known(self) -> bool:
        """Whether it was found to be right before, as it is now."""
        found = self._digests.find(self._identity)
        if found is not None:
            self._check(found)
        return found is not None

    def whole(self) -> bytes:
        """All of it, which is small."""
        self.is_whole = True
        pieces = []
        while self.at < self.size:
            pieces.append(self.next(self.size))
        self._check(self._found())  # of an empty one there is no piece
        return b"".join(pieces)

    def next(self, end: int, most: int = PIECE) -> bytes:
        """The next piece of what ends at ``end``; the last one only where the digest is right."""
        assert self._file is not None  # noqa: S101  (it was opened)
        try:
            data = os.pread(self._file.fileno(), min(most, end - self.at), self.at)
            if not data:
                raise self._damaged("has lost its end")
            self.at += len(data)
            if self.is_whole:
                self._digest.update(data)
            if self.at == end:
                self._end(identity(self._file.fileno()))
        except OSError as error:
            raise self._unreadable(error) from error
        return data

    def _end(self, now: Identity) -> None:
        """All was read that was asked for, of a file that is this one now."""
        if self.is_whole:
            found = self._found()
            self._digests.add(self._identity, now, found)  # a wrong one too: it is not read again and again
            self._check(found)
        elif now != self._identity:
            raise self._damaged("was changed while it was read")

    def _found(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"

    def _check(self, found: str) -> None:
        if found != self._expected:
            raise self._damaged(f"is damaged: what is there has the digest {found}")

    def _unreadable(self, error: OSError) -> errors.HostFailed:
        return errors.HostFailed(f"{self._what} {self._expected} cannot be read: {error.strerror}")

    def _damaged(self, how: str) -> errors.JournalCorrupt:
        return errors.JournalCorrupt(f"{self._what} {self._expected} {how}", digest=self._expected)
