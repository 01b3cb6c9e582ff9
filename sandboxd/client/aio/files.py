"""The part of ``AsyncClient`` that is about the files of sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.aio.exchanges import Exchanges, single
from sandboxd.client.calls import files

if TYPE_CHECKING:
    from collections.abc import AsyncIterable
    from typing import Unpack

    from sandboxd import models
    from sandboxd.client.aio.stream import AsyncStream
    from sandboxd.client.calls.files import ListingFields, ReadFields

__all__ = ["Files"]


class Files(Exchanges):
    """The files of sessions."""

    async def diff_session(
        self,
        session: str,
        since: str | None = None,
        to: str | None = None,
        *,
        text: bool = False,
        limit: int = 1000,
    ) -> models.SessionDiff:
        """What differs between two checkpoints; from the session's first to where it stands, without them."""
        return await self._do(files.diff(session, since, to, text=text, limit=limit))

    async def session_files(
        self, session: str, path: str = "", **fields: Unpack[ListingFields]
    ) -> models.FileList:
        """What a directory of a session has, or all beneath it, with digests if asked."""
        return await self._do(files.listing(session, path, **fields))

    async def read_file(self, session: str, path: str, **fields: Unpack[ReadFields]) -> AsyncStream[bytes]:
        """The bytes of a file of a session, in chunks: all, or ``length`` of them from ``offset`` on.

        With the digest ``match`` they are of the file that has it. Raises NotFound, StateConflict,
        PreconditionFailed, RangeNotSatisfiable where nothing is behind ``offset``.
        """
        return await self._raw(files.read(session, path, **fields))

    async def write_file(
        self,
        session: str,
        path: str,
        data: bytes | AsyncIterable[bytes],
        *,
        mode: int | None = None,
        match: str | None = None,
        new: bool = False,
    ) -> models.FileWritten:
        """Write a file of a session: where it has the digest ``match``, or with ``new`` where nothing is.

        With a ``match`` of ``*`` it is written where anything is there.
        Raises PreconditionFailed, StateConflict, QuotaExceeded.
        """
        whole, chunks = (data, None) if isinstance(data, bytes) else (None, data)
        call = files.put(session, path, whole, mode=mode, match=match, new=new)
        return await self._do(call, chunks)

    async def make_directory(self, session: str, path: str) -> models.FileWritten:
        """Make a directory of a session, and those above it. Raises StateConflict where something is."""
        return await self._do(files.make_directory(session, path))

    async def remove_file(
        self, session: str, path: str, *, recursive: bool = False, match: str | None = None
    ) -> models.FileWritten:
        """Remove a file or directory of a session. Raises NotFound, PreconditionFailed, StateConflict."""
        return await self._do(files.remove(session, path, recursive=recursive, match=match))

    async def export_session(
        self, session: str, *, since: str | None = None, to: str | None = None, times: bool = False
    ) -> AsyncStream[bytes]:
        """The files of a session, or what makes them of a checkpoint's, as the tar of an OCI image layer.

        ``omitted`` of what comes back is how many sockets and devices were left out. Raises StateConflict.
        """
        return await self._raw(files.export(session, since, to, times=times))

    async def import_session(
        self,
        session: str,
        data: bytes | AsyncIterable[bytes],
        *,
        match: str | None = None,
        own: bool = False,
    ) -> models.CheckpointInfo:
        """Put a layer's tar over the files of a session, all of it or nothing.

        ``match`` is the digest of the checkpoint that the session has to stand on; with ``own`` all that
        comes is the session's owner's, whatever the tar says. Raises InvalidRequest, PreconditionFailed,
        TooLarge, QuotaExceeded.
        """
        chunks = single(data) if isinstance(data, bytes) else data
        return await self._do(files.bring(session, match=match, own=own), chunks)
