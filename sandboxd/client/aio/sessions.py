"""The part of ``AsyncClient`` that is about sessions."""

from __future__ import annotations

from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync

from sandboxd.client import lending
from sandboxd.client.aio.exchanges import Exchanges
from sandboxd.client.calls import files, sessions

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator
    from typing import Unpack

    from sandboxd import models
    from sandboxd.client.calls.sessions import PageFields, SessionFields

__all__ = ["Sessions"]


class Sessions(Exchanges):
    """Sessions: lines of calls that share files."""

    async def create_session(
        self,
        name: str | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        **fields: Unpack[SessionFields],
    ) -> models.SessionInfo:
        """Make a session: calls with ``session=`` its name or id find the files that those before left.

        ``fields`` are those of ``SessionFields``. ``directory`` is lent to it, not copied:
        its files are there from the start, and what calls change of them is the session's alone. Raises
        SessionExists, QuotaExceeded, NotPermitted, NotFound for a policy that is unknown, InvalidRequest for
        a directory that cannot be lent, OSError for one that you cannot open.
        """
        async with nullcontext() if directory is None else self._lent(directory) as handle:
            return await self._do(sessions.create_session(name, checkout=handle, **fields))

    @asynccontextmanager
    async def _lent(self, directory: str | os.PathLike[str]) -> AsyncIterator[str]:
        lent = lending.lent(self._paths, directory, self._connect_timeout)
        handle = await run_sync(lent.__enter__)
        try:
            yield handle
        finally:
            lent.__exit__(None, None, None)

    async def lend(self, session: str, directory: str | os.PathLike[str]) -> models.SessionInfo:
        """Give a session the directory that it stands on again, after a restart of the daemon.

        Raises StateConflict for another one.
        """
        async with self._lent(directory) as handle:
            return await self._do(files.lend(session, handle))

    async def fork_session(
        self,
        session: str,
        name: str | None = None,
        *,
        checkpoint: str | None = None,
        **fields: Unpack[SessionFields],
    ) -> models.SessionInfo:
        """Make a session that begins with a checkpoint of another, else with where that stands.

        Raises NotFound, SessionExists, QuotaExceeded, NotPermitted.
        """
        return await self._do(sessions.fork_session(session, name, checkpoint, **fields))

    async def sessions(self, **page: Unpack[PageFields]) -> models.SessionList:
        """A page of sessions, newest first."""
        return await self._do(sessions.sessions(**page))

    async def session(self, named: str) -> models.SessionInfo:
        """One session, by its name or id. Raises NotFound."""
        return await self._do(sessions.session(named))

    async def delete_session(self, named: str) -> None:
        """Remove a session and its files. Raises NotFound, SessionBusy while calls are in it."""
        await self._do(sessions.delete_session(named))

    async def checkpoints(self, named: str, **page: Unpack[PageFields]) -> models.CheckpointList:
        """A page of the checkpoints of a session, newest first. Raises NotFound."""
        return await self._do(sessions.checkpoints(named, **page))

    async def rollback_session(self, named: str, checkpoint: str) -> models.SessionInfo:
        """Let a session stand on one of its checkpoints, by id or digest. Raises NotFound, SessionBusy."""
        return await self._do(sessions.rollback_session(named, checkpoint))

    async def checkpoint_session(self, named: str) -> models.CheckpointInfo:
        """Make a checkpoint of the files in the container that a session keeps (``isolation: session``).

        Waits for the calls before. Where nothing has changed, the one that there is. Raises NotFound,
        StateConflict where it keeps none, QuotaExceeded, WorkspaceUnfit.
        """
        return await self._do(sessions.checkpoint_session(named))

    async def end_session(self, named: str, *, discard: bool = False) -> models.SessionInfo:
        """End the container that a session keeps, after a checkpoint of its files, unless ``discard``.

        Raises NotFound, SessionBusy, StateConflict where it keeps none, QuotaExceeded, WorkspaceUnfit.
        """
        return await self._do(sessions.end_session(named, discard=discard))

    async def discard_session(self, named: str) -> models.SessionInfo:
        """Forget the checkpoints that a session does not stand on. Raises NotFound, SessionBusy."""
        return await self._do(sessions.discard_session(named))
