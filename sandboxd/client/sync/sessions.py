"""The part of ``Client`` that is about sessions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from sandboxd.client import lending
from sandboxd.client.calls import files, sessions
from sandboxd.client.sync.exchanges import Exchanges

if TYPE_CHECKING:
    import os
    from contextlib import AbstractContextManager
    from typing import Unpack

    from sandboxd import models
    from sandboxd.client.calls.sessions import PageFields, SessionFields

__all__ = ["Sessions"]


class Sessions(Exchanges):
    """Sessions: lines of calls that share files."""

    def create_session(
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
        with nullcontext() if directory is None else self._lent(directory) as handle:
            return self._do(sessions.create_session(name, checkout=handle, **fields))

    def _lent(self, directory: str | os.PathLike[str]) -> AbstractContextManager[str]:
        return lending.lent(self._paths, directory, self._connect_timeout)

    def lend(self, session: str, directory: str | os.PathLike[str]) -> models.SessionInfo:
        """Give a session the directory that it stands on again, after a restart of the daemon.

        Raises StateConflict for another one.
        """
        with self._lent(directory) as handle:
            return self._do(files.lend(session, handle))

    def fork_session(
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
        return self._do(sessions.fork_session(session, name, checkpoint, **fields))

    def sessions(self, **page: Unpack[PageFields]) -> models.SessionList:
        """A page of sessions, newest first."""
        return self._do(sessions.sessions(**page))

    def session(self, named: str) -> models.SessionInfo:
        """One session, by its name or id. Raises NotFound."""
        return self._do(sessions.session(named))

    def delete_session(self, named: str) -> None:
        """Remove a session and its files. Raises NotFound, SessionBusy while calls are in it."""
        self._do(sessions.delete_session(named))

    def checkpoints(self, named: str, **page: Unpack[PageFields]) -> models.CheckpointList:
        """A page of the checkpoints of a session, newest first. Raises NotFound."""
        return self._do(sessions.checkpoints(named, **page))

    def rollback_session(self, named: str, checkpoint: str) -> models.SessionInfo:
        """Let a session stand on one of its checkpoints, by id or digest. Raises NotFound, SessionBusy."""
        return self._do(sessions.rollback_session(named, checkpoint))

    def checkpoint_session(self, named: str) -> models.CheckpointInfo:
        """Make a checkpoint of the files in the container that a session keeps (``isolation: session``).

        Waits for the calls before. Where nothing has changed, the one that there is. Raises NotFound,
        StateConflict where it keeps none, QuotaExceeded, WorkspaceUnfit.
        """
        return self._do(sessions.checkpoint_session(named))

    def end_session(self, named: str, *, discard: bool = False) -> models.SessionInfo:
        """End the container that a session keeps, after a checkpoint of its files, unless ``discard``.

        Raises NotFound, SessionBusy, StateConflict where it keeps none, QuotaExceeded, WorkspaceUnfit.
        """
        return self._do(sessions.end_session(named, discard=discard))

    def discard_session(self, named: str) -> models.SessionInfo:
        """Forget the checkpoints that a session does not stand on. Raises NotFound, SessionBusy."""
        return self._do(sessions.discard_session(named))
