"""The part of ``Client`` that is about the files of sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.calls import files
from sandboxd.client.sync.exchanges import Exchanges

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Unpack

    from sandboxd import models
    from sandboxd.client.calls.files import ListingFields, ReadFields
    from sandboxd.client.sync.stream import Stream

__all__ = ["Files"]


class Files(Exchanges):
    """The files of sessions."""

    def diff_session(
        self,
        session: str,
        since: str | None = None,
        to: str | None = None,
        *,
        text: bool = False,
        limit: int = 1000,
    ) -> models.SessionDiff:
        """What differs between two checkpoints; from the session's first to where it stands, without them."""
        return self._do(files.diff(session, since, to, text=text, limit=limit))

    def session_files(self, session: str, path: str = "", **fields: Unpack[ListingFields]) -> models.FileList:
        """What a directory of a session has, or all beneath it, with digests if asked."""
        return self._do(files.listing(session, path, **fields))

    def read_file(self, session: str, path: str, **fields: Unpack[ReadFields]) -> Stream[bytes]:
        """The bytes of a file of a session, in chunks: all, or ``length`` of them from ``offset`` on.

        With the digest ``match`` they are of the file that has it. Raises NotFound, StateConflict,
        PreconditionFailed, RangeNotSatisfiable where nothing is behind ``offset``.
        """
        return self._raw(files.read(session, path, **fields))

    def write_file(
        self,
        session: str,
        path: str,
        data: bytes | Iterable[bytes],
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
        return self._do(call, chunks)

    def make_directory(self, session: str, path: str) -> models.FileWritten:
        """Make a directory of a session, and those above it. Raises StateConflict where something is."""
        return self._do(files.make_directory(session, path))

    def remove_file(
        self, session: str, path: str, *, recursive: bool = False, match: str | None = None
    ) -> models.FileWritten:
        """Remove a file or directory of a session. Raises NotFound, PreconditionFailed, StateConflict."""
        return self._do(files.remove(session, path, recursive=recursive, match=match))

    def export_session(
        self, session: str, *, since: str | None = None, to: str | None = None, times: bool = False
    ) -> Stream[bytes]:
        """The files of a session, or what makes them of a checkpoint's, as the tar of an OCI image layer.

        ``omitted`` of what comes back is how many sockets and devices were left out. Raises StateConflict.
        """
        return self._raw(files.export(session, since, to, times=times))

    def import_session(
        self,
        session: str,
        data: bytes | Iterable[bytes],
        *,
        match: str | None = None,
        own: bool = False,
    ) -> models.CheckpointInfo:
        """Put a layer's tar over the files of a session, all of it or nothing.

        ``match`` is the digest of the checkpoint that the session has to stand on; with ``own`` all that
        comes is the session's owner's, whatever the tar says. Raises InvalidRequest, PreconditionFailed,
        TooLarge, QuotaExceeded.
        """
        chunks = (data,) if isinstance(data, bytes) else data
        return self._do(files.bring(session, match=match, own=own), chunks)
