"""What the routes call. The composition root implements it; the routes decide nothing.

Each method raises a leaf of ``errors.Refused`` when it will not do what was asked. What belongs to
another caller raises NotFound, as if it did not exist, unless the caller is an operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from sandboxd import errors, models
    from sandboxd.api.identity import Caller
    from sandboxd.config import Config
    from sandboxd.journal.search import Query
    from sandboxd.network.entrance import Entrance
    from sandboxd.workspace.edit import Condition
    from sandboxd.workspace.layertar import Export

__all__ = ["Service", "SessionService"]


class SessionService(Protocol):
    """Sessions, by their ids or names. All raise NotFound for one that is not the caller's."""

    async def create(self, caller: Caller, asked: models.SessionRequest) -> models.SessionInfo:
        """A new one. Raises SessionExists, QuotaExceeded, NotPermitted."""
        ...

    async def list(self, caller: Caller, *, before: str | None, limit: int) -> models.SessionList:
        """A page of them, newest first."""
        ...

    async def get(self, caller: Caller, named: str) -> models.SessionInfo:
        """One."""
        ...

    async def delete(self, caller: Caller, named: str) -> None:
        """Remove one. Raises SessionBusy, as do those that follow."""
        ...

    async def checkpoints(
        self, caller: Caller, named: str, *, before: str | None, limit: int
    ) -> models.CheckpointList:
        """A page of its checkpoints, newest first."""
        ...

    async def fork(self, caller: Caller, named: str, asked: models.SessionFork) -> models.SessionInfo:
        """A new one that begins with a checkpoint of it."""
        ...

    async def lend(self, caller: Caller, named: str, handle: str) -> models.SessionInfo:
        """Give it the directory that it stands on again. Raises StateConflict."""
        ...

    async def checkpoint(self, caller: Caller, named: str) -> models.CheckpointInfo:
        """A checkpoint of the container that a session keeps."""
        ...

    async def end(self, caller: Caller, named: str, *, discard: bool) -> models.SessionInfo:
        """End the container that a session keeps."""
        ...

    async def rollback(self, caller: Caller, named: str, checkpoint: str) -> models.SessionInfo:
        """Move it to a checkpoint."""
        ...

    async def discard(self, caller: Caller, named: str) -> models.SessionInfo:
        """Forget the checkpoints that it does not stand on."""
        ...


class FileService(Protocol):
    """The files of sessions. All raise NotFound for a session that is not the caller's."""

    async def diff(
        self, caller: Caller, named: str, *, since: str, to: str | None, text: bool, limit: int
    ) -> models.SessionDiff:
        """What differs between two checkpoints."""
        ...

    async def list(
        self,
        caller: Caller,
        named: str,
        path: str,
        *,
        checkpoint: str | None,
        recursive: bool,
        digest: bool,
        after: str | None,
        limit: int,
    ) -> models.FileList:
        """What a directory has, from a path on. Raises StateConflict for what is none."""
        ...

    def read(
        self, caller: Caller, named: str, path: str, *, checkpoint: str | None
    ) -> AbstractAsyncContextManager[tuple[models.FileInfo, Callable[[int, int], AsyncIterator[bytes]]]]:
        """A file, and its bytes from a place on, so many. Raises StateConflict for what is no file."""
        ...

    async def write(
        self,
        caller: Caller,
        named: str,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        condition: Condition,
        mode: int | None,
    ) -> models.FileWritten:
        """Write a file. Raises PreconditionFailed, StateConflict, TooLarge, QuotaExceeded."""
        ...

    async def make_directory(
        self, caller: Caller, named: str, path: str, *, condition: Condition
    ) -> models.FileWritten:
        """Make a directory. Raises PreconditionFailed, StateConflict."""
        ...

    async def remove(
        self, caller: Caller, named: str, path: str, *, condition: Condition, recursive: bool
    ) -> models.FileWritten:
        """Remove what is at a path. Raises PreconditionFailed, StateConflict."""
        ...

    def export(
        self, caller: Caller, named: str, *, since: str | None, to: str | None, times: bool
    ) -> AbstractAsyncContextManager[tuple[Export, AsyncIterator[bytes]]]:
        """A layer's tar. Raises StateConflict for a name that no layer can have."""
        ...

    async def bring(
        self,
        caller: Caller,
        named: str,
        chunks: AsyncIterator[bytes],
        *,
        match: frozenset[str] | None,
        own: bool,
    ) -> models.CheckpointInfo:
        """Put a layer's tar over a session's files, if it stands on a checkpoint of those of ``match``.

        Raises InvalidRequest, PreconditionFailed, TooLarge, QuotaExceeded.
        """
        ...


class Service(Protocol):
    """The daemon, as its API sees it."""

    @property
    def config(self) -> Config:
        """The configuration that the daemon runs with."""
        ...

    @property
    def sessions(self) -> SessionService:
        """The sessions of all callers."""
        ...

    @property
    def files(self) -> FileService:
        """The files of their sessions."""
        ...

    async def submit(self, caller: Caller, request: models.Request, *, tied: bool) -> models.Invocation:
        """Accept a call durably, or find the one that has this key.

        ``tied``: the call ends when its caller goes away; the routes then call ``cancel``.
        """
        ...

    async def wait(self, caller: Caller, id: str) -> models.Invocation:  # noqa: A002  # the field's name
        """The invocation, once it has ended."""
        ...

    async def get(self, caller: Caller, id: str) -> models.Invocation:  # noqa: A002
        """The invocation as it stands."""
        ...

    async def list(
        self,
        caller: Caller,
        *,
        policy: str | None,
        cause: models.Cause | None,
        state: models.State | None,
        key: str | None = None,
        label: Mapping[str, str],
        before: str | None,
        limit: int,
    ) -> models.InvocationList:
        """A page of invocations, newest first; each label must be there with its value.

        With a ``key``, of the caller's own alone.
        """
        ...

    async def readable(self, caller: Caller, id: str) -> None:  # noqa: A002
        """Raise what keeps its events and output from being read."""
        ...

    def events(self, caller: Caller, id: str, *, after: int, follow: bool) -> AsyncIterator[models.Event]:  # noqa: A002
        """The events with a number above ``after``; with ``follow``, up to ``ended``.

        Of a call that was pruned ``ended`` alone.
        """
        ...

    def stream(
        self,
        caller: Caller,
        id: str,  # noqa: A002
        name: Literal["stdout", "stderr"],
        *,
        offset: int,
        length: int | None = None,
        follow: bool,
    ) -> AsyncIterator[bytes]:
        """The bytes of a stream from an offset, in pieces of up to 256 KiB.

        Of more than ``length`` nobody wants to know; of a call that runs they may be told all the same.
        """
        ...

    async def write_stdin(
        self,
        caller: Caller,
        id: str,  # noqa: A002
        *,
        offset: int,
        chunks: AsyncIterator[bytes],
        eof: bool,
    ) -> int:
        """Write to standard input at its offset; returns the new one. ``eof`` closes it afterwards.

        Raises StateConflict if the call did not ask for ``stdin: stream``, its offset is another, or it
        has ended without taking all of this. ``chunks`` raises RequestTimeout if the peer goes away or
        stalls before the end.
        """
        ...

    async def signal(self, caller: Caller, id: str, signal: int) -> None:  # noqa: A002
        """Send a signal to the tool. Raises StateConflict if it does not run."""
        ...

    async def callback(self, caller: Caller, id: str) -> models.CallbackState:  # noqa: A002
        """What became of a call's callback. Raises NotFound, also where it has none."""
        ...

    async def cancel(self, caller: Caller, id: str) -> models.Invocation:  # noqa: A002
        """End a call; the invocation as it then stands, unchanged if it had ended."""
        ...

    async def entrance(self, caller: Caller, id: str) -> Entrance:  # noqa: A002
        """The way to the servers of a running call. Raises CallNotStarted, CallEnded, PortNotExposed."""
        ...

    async def session_entrance(self, caller: Caller, named: str) -> Entrance:
        """The way to the servers of what runs in a session. Raises NotFound, SessionIdle, PortNotExposed."""
        ...

    async def artifact(
        self,
        caller: Caller,
        id: str,  # noqa: A002
        path: str,
    ) -> models.Artifact:
        """A released file, whose bytes ``blob`` has."""
        ...

    async def policies(self, caller: Caller) -> Sequence[models.PolicyInfo]:
        """The policies that the caller may use."""
        ...

    async def policy(self, caller: Caller, name: str) -> models.PolicyInfo:
        """One policy with its resolved form."""
        ...

    async def check_policy(
        self, caller: Caller, text: str, name: str | None
    ) -> Sequence[models.PolicyProblem]:
        """All that is wrong with the text of a policy file."""
        ...

    async def plan(self, caller: Caller, request: models.Request) -> models.PlanDocument:
        """What would run, and where each value came from; nothing runs."""
        ...

    async def images(self, caller: Caller) -> Sequence[models.ImageInfo]:
        """The images of the store."""
        ...

    def slots(self, caller: Caller) -> Sequence[models.SlotInfo]:
        """The containers that the daemon holds. Raises NotPermitted for who is no operator."""
        ...

    async def metrics(self, caller: Caller) -> bytes:
        """What the daemon counts, in the text format of Prometheus. Raises NotPermitted likewise."""
        ...

    def may_store(self, caller: Caller) -> None:
        """Raise NotPermitted for who may not deal with secrets; as do the methods that follow."""
        ...

    async def secrets(self, caller: Caller) -> Sequence[models.SecretInfo]:
        """The stored secrets, without their values."""
        ...

    async def secret(self, caller: Caller, name: str) -> models.SecretInfo:
        """One of them."""
        ...

    async def set_secret(self, caller: Caller, name: str, value: bytes) -> models.SecretInfo:
        """Store one. Raises StateConflict if it is there."""
        ...

    async def rotate_secret(self, caller: Caller, name: str, value: bytes) -> models.SecretInfo:
        """Give one a new value."""
        ...

    async def remove_secret(self, caller: Caller, name: str) -> None:
        """Forget one."""
        ...

    async def search(self, caller: Caller, query: Query) -> models.SearchResults:
        """A page of calls that fit, newest first: the caller's own, or for an operator all."""
        ...

    async def replay(self, caller: Caller, id: str, policy: str | None) -> models.Replay:  # noqa: A002
        """Run a recorded call again, under another policy if one is named, and say what differs."""
        ...

    async def replay_session(
        self, caller: Caller, named: str, policy: str | None, *, keep: bool
    ) -> AsyncGenerator[models.ReplayEvent]:
        """Run the calls of a session again, in a fresh one, and say of each what differs as it ends."""
        ...

    async def lineage(self, caller: Caller, digest: str) -> models.Lineage:
        """The caller's calls that released a content, or all for an operator."""
        ...

    def blob(self, digest: str, size: int, start: int, length: int) -> AsyncIterator[bytes]:
        """Bytes of a content, of which ``lineage`` or ``artifact`` found the whole for the caller."""
        ...

    async def prune(self, caller: Caller, *, age: int | None, size: int | None) -> models.Pruning:
        """Remove the oldest bodies and files now; for operators."""
        ...

    async def refused(self, caller: Caller, error: errors.Refused, summary: dict[str, Any]) -> None:
        """Record a refusal. A caller with the role ``none`` matched no rule."""
        ...

    def health(self) -> models.Health:
        """Whether the daemon takes calls."""
        ...
