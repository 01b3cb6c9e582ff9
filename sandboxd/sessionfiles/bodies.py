"""Bodies that come for the files of sessions, on disk while the change waits for its turn."""

from __future__ import annotations

import tempfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from sandboxd import errors, units
from sandboxd.kernel.compressed import decompressed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import BinaryIO

    from sandboxd.api.identity import Caller
    from sandboxd.kernel.compressed import Readable
    from sandboxd.room import Held, Room
    from sandboxd.sessions import Sessions
    from sandboxd.workspace.effort import Effort

__all__ = ["Bodies", "Body", "Unpacked"]

BEYOND = 1 << 20
"""Bytes that a body may be larger than what is left for files: an archive has more than their content."""


class Bodies:
    """Counted, as long as they are there, for each caller and in all."""

    def __init__(self, sessions: Sessions, scratch: Path, room: Room, time: int) -> None:
        """They are kept in ``scratch``, in ``room``, and come within ``time`` µs."""
        self._sessions = sessions
        self._scratch = scratch
        self._room = room
        self._time = time

    @asynccontextmanager
    async def spooled(
        self, caller: Caller, named: str, chunks: AsyncIterator[bytes], most: int
    ) -> AsyncIterator[BinaryIO]:
        """A body of at most so many bytes.

        Nothing of it is read where the session is not the caller's. It counts in the room until it is gone.
        """
        async with self._sessions.standing(caller, named):
            with self._room.held(caller.uid) as held, tempfile.TemporaryFile(dir=self._scratch) as file:
                with anyio.move_on_after(self._time / 1e6) as late:
                    await self._spool(caller, chunks, file, held, most)
                if late.cancelled_caught:
                    raise errors.RequestTimeout(
                        f"the body did not arrive within {units.format_duration(self._time)}"
                    )
                file.seek(0)
                yield file

    async def _spool(
        self, caller: Caller, chunks: AsyncIterator[bytes], file: BinaryIO, held: Held, most: int
    ) -> None:
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > most:
                raise errors.TooLarge(f"the body is over {units.format_size(most)}", limit=most)
            _check(size, self._sessions.left(caller), caller.sessions.size)
            held.grow(len(chunk))
            try:
                await anyio.to_thread.run_sync(file.write, chunk)
            except OSError as error:
                raise errors.HostFailed(f"the body cannot be kept: {error.strerror}") from error


def _check(size: int, left: int, allowed: int) -> None:
    """Raises QuotaExceeded for a body of more bytes than are left."""
    if size > left + BEYOND:
        raise errors.QuotaExceeded(
            f"the body is over the {units.format_size(left)} that are left to all your sessions",
            quota="sessions.size",
            asked=allowed - left + size,
            allowed=allowed,
        )


class Body:
    """A body that is read as long as somebody waits for what becomes of it."""

    def __init__(self, file: BinaryIO, effort: Effort) -> None:
        self._file = file
        self.effort = effort

    def read(self, size: int, /) -> bytes:
        """As a file's."""
        self.effort.step()
        return self._file.read(size)


class Unpacked:
    """A body that may be compressed, as it is without that; it has to be as small as one that comes so."""

    def __init__(self, body: Body, left: int, allowed: int) -> None:
        """``left`` bytes are what a caller's sessions may still grow by, of those that are allowed."""
        self._body = body
        self._left = left
        self._allowed = allowed
        self._size = 0
        self._stream: Readable | None = None

    def read(self, size: int, /) -> bytes:
        """As a file's. Raises InvalidRequest, QuotaExceeded."""
        self._body.effort.step()
        if self._stream is None:  # here, since the first bytes are read in the thread that reads the others
            self._stream = decompressed(self._body)
        data = self._stream.read(size)
        self._size += len(data)
        _check(self._size, self._left, self._allowed)
        return data
