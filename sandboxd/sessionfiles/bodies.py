"""Bodies that come for the files of sessions, on disk while the change waits for its turn."""

from __future__ import annotations

import tempfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from sandboxd import errors, units

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import BinaryIO

    from sandboxd.api.identity import Caller
    from sandboxd.room import Held, Room
    from sandboxd.sessions import Sessions
    from sandboxd.workspace.effort import Effort

__all__ = ["Bodies", "Body"]

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
            if size > (left := self._sessions.left(caller)) + BEYOND:
                raise errors.QuotaExceeded(
                    f"the body is over the {units.format_size(left)} that are left to all your sessions",
                    quota="sessions.size",
                    asked=caller.sessions.size - left + size,
                    allowed=caller.sessions.size,
                )
            held.grow(len(chunk))
            try:
                await anyio.to_thread.run_sync(file.write, chunk)
            except OSError as error:
                raise errors.HostFailed(f"the body cannot be kept: {error.strerror}") from error


class Body:
    """A body that is read as long as somebody waits for what becomes of it."""

    def __init__(self, file: BinaryIO, effort: Effort) -> None:
        self._file = file
        self._effort = effort

    def read(self, size: int, /) -> bytes:
        """As a file's."""
        self._effort.step()
        return self._file.read(size)
