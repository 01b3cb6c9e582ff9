"""The asynchronous client, for asyncio and trio."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import anyio
from anyio.to_thread import run_sync

from sandboxd import errors, models
from sandboxd.client import async_transport, calls, files, lending, location, wire
from sandboxd.client.destination import Destination
from sandboxd.client.patience import RECONNECT, Patience

if TYPE_CHECKING:
    import signal as signals
    from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
    from typing import Any, Unpack

    from anyio.abc import SocketStream

__all__ = ["AsyncClient", "AsyncStream"]

T = TypeVar("T")


class AsyncStream(Generic[T]):
    """Items of an answer as they arrive. An async iterator and context manager; ``aclose`` hangs up."""

    def __init__(self, answer: async_transport.AsyncAnswer, items: AsyncGenerator[T, None]) -> None:
        self._answer = answer
        self._items = items

    @property
    def omitted(self) -> int:
        """Files that the daemon says are not in it."""
        return self._answer.omitted

    def feed(self, items: AsyncGenerator[T, None]) -> None:
        """Say where the items come from."""
        self._items = items

    async def continue_with(self, answer: async_transport.AsyncAnswer) -> None:
        """Go on with another answer, in the place of one that was cut."""
        before, self._answer = self._answer, answer
        with anyio.CancelScope(shield=True):
            await before.aclose()

    async def aclose(self) -> None:
        """Hang up. May be called twice."""
        with anyio.CancelScope(shield=True):
            await self._items.aclose()
            await self._answer.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await anext(self._items)
        except BaseException:
            await self.aclose()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncClient:
    """What ``Client`` is, for tasks: the same methods, arguments and errors.

    Cancelling a task inside ``run`` or ``stream`` closes its connection, and the daemon then cancels the
    call unless it has a key.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        connect_timeout: float = 5.0,
        timeout: float | None = 60.0,
        reconnect: float = RECONNECT,
    ) -> None:
        self._reconnect = reconnect
        self._paths = location.candidates(socket, os.environ)
        self._connect_timeout = connect_timeout
        self._timeout = timeout

    async def _open(
        self, exchange: wire.Exchange, chunks: AsyncIterable[bytes] | None = None
    ) -> async_transport.AsyncAnswer:
        return await async_transport.exchange(
            self._paths,
            exchange,
            connect_timeout=self._connect_timeout,
            timeout=self._timeout,
            chunks=chunks,
        )

    async def _do(self, call: calls.Call[T], chunks: AsyncIterable[bytes] | None = None) -> T:
        answer = await self._open(call.exchange, chunks)
        try:
            return call.decode(await answer.read())
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()

    async def run(
        self, argv: models.Request | Sequence[str | bytes], **fields: Unpack[calls.RequestFields]
    ) -> models.Invocation:
        """Run a command and wait for its outcome. Raises Refused if it is not accepted."""
        asked = calls.request(argv, fields)
        call = calls.run(asked)
        patience = Patience(self._reconnect)
        answer = await self._ask(call.exchange, asked.key, patience)
        try:
            return call.decode(await answer.read())
        except errors.Unavailable as error:
            id_ = calls.id_at(answer.location)
            if id_ is None or error.details.get("reason") != "lost":
                raise
            cut = error
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()
        return await self._outcome(id_, cut, patience)

    async def _ask(
        self, exchange: wire.Exchange, key: str | None, patience: Patience
    ) -> async_transport.AsyncAnswer:
        """The answer to a request; one with a key may be sent again when it is not known to have arrived."""
        try:
            return await self._open(exchange)
        except errors.Unavailable as error:
            if key is None or error.details.get("reason") != "lost":
                raise
            cut = error
        return await self._again(exchange, cut, patience)

    async def _again(
        self, exchange: wire.Exchange, error: errors.SandboxdError, patience: Patience
    ) -> async_transport.AsyncAnswer:
        """The answer of the next daemon to an exchange. Raises what is not going to pass."""
        while True:
            await anyio.sleep(patience.pause(error))
            try:
                return await self._open(exchange)
            except (errors.Unavailable, errors.Draining) as found:
                error = found

    async def _outcome(
        self,
        id: str,  # noqa: A002
        error: errors.SandboxdError,
        patience: Patience,
    ) -> models.Invocation:
        """The outcome of a call whose daemon went away."""
        call = calls.get(id)
        answer = await self._again(call.exchange, error, patience)
        try:
            found = call.decode(await answer.read())
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()
        return found if found.state == models.State.ENDED else await self.wait(id)

    async def start(
        self, argv: models.Request | Sequence[str | bytes], **fields: Unpack[calls.RequestFields]
    ) -> models.Invocation:
        """Return as soon as the call is accepted durably; it runs on when this caller goes away."""
        return await self._do(calls.start(calls.request(argv, fields)))

    async def stream(
        self, argv: models.Request | Sequence[str | bytes], **fields: Unpack[calls.RequestFields]
    ) -> AsyncStream[models.Event]:
        """Run a command and iterate over its events; the last one is ``ended``."""
        asked = calls.request(argv, fields)
        return await self._events(calls.stream(asked), key=asked.key)

    async def batch(
        self,
        requests: Iterable[models.Request | Sequence[str | bytes] | Mapping[str, Any]],
        *,
        parallel: int | None = None,
    ) -> AsyncStream[models.BatchResult]:
        """Run many requests, ``parallel`` at a time; see ``Client.batch``."""
        answer = await self._open(calls.batch(requests, parallel))
        return AsyncStream(answer, _results(answer))

    async def get(self, id: str) -> models.Invocation:  # noqa: A002 - the field's name, here and below
        """One invocation. Raises NotFound."""
        return await self._do(calls.get(id))

    async def callback(self, id: str) -> models.CallbackState:  # noqa: A002
        """What became of a call's callback. Raises NotFound, also where it has none."""
        return await self._do(calls.callback(id))

    async def list(
        self,
        *,
        policy: str | None = None,
        cause: str | None = None,
        state: str | None = None,
        label: str | None = None,
        before: str | None = None,
        limit: int | None = None,
    ) -> models.InvocationList:
        """A page of invocations, newest first; ``before`` is the ``next`` of the page before."""
        call = calls.page(policy=policy, cause=cause, state=state, label=label, before=before, limit=limit)
        return await self._do(call)

    async def wait(self, id: str, timeout: float | None = None) -> models.Invocation:  # noqa: A002, ASYNC109 - as Client's
        """The invocation once it has ended.

        Raises TimeoutError after ``timeout`` seconds, and it runs on; HostFailed when it has ended and the
        host cannot record how yet: wait again.
        """
        with anyio.fail_after(timeout):
            invocation = await self.get(id)
            if invocation.state == models.State.ENDED:
                return invocation
            async with await self.events(id) as events:
                async for event in events:
                    if (done := calls.ended(event, id)) is not None:
                        return done
        raise wire.lost("before the call did")

    async def events(self, id: str, *, after: int = 0, follow: bool = True) -> AsyncStream[models.Event]:  # noqa: A002
        """The events numbered above ``after``; with ``follow`` until ``ended``, else those so far."""
        exchange = calls.events(id, after, follow=follow)
        if follow:
            return await self._events(exchange, id, after)
        answer = await self._open(exchange)
        return AsyncStream(answer, _decoded(answer, calls.Events(complete=False)))

    async def _events(
        self,
        exchange: wire.Exchange,
        id: str | None = None,  # noqa: A002
        after: int = 0,
        *,
        key: str | None = None,
    ) -> AsyncStream[models.Event]:
        """Events up to ``ended``, from however many daemons."""
        patience = Patience(self._reconnect)
        answer = await self._ask(exchange, key, patience)
        stream = AsyncStream(answer, _decoded(answer, calls.Events(complete=True)))
        stream.feed(self._resumed(stream, answer, id or calls.id_at(answer.location), after, patience))
        return stream

    async def _resumed(
        self,
        stream: AsyncStream[models.Event],
        answer: async_transport.AsyncAnswer,
        id: str | None,  # noqa: A002
        after: int,
        patience: Patience,
    ) -> AsyncGenerator[models.Event, None]:
        while True:
            events = calls.Events(complete=True)
            events.after = after
            try:
                async for event in _decoded(answer, events):
                    after = event.seq
                    patience.renew()
                    yield event
            except errors.Unavailable as error:
                if id is None or error.details.get("reason") != "lost":
                    raise
                cut = error
            else:
                return
            answer = await self._again(calls.events(id, after, follow=True), cut, patience)
            await stream.continue_with(answer)

    async def stdout(self, id: str, *, offset: int = 0, follow: bool = False) -> AsyncStream[bytes]:  # noqa: A002
        """The stored standard output from a byte offset on."""
        return await self._raw(calls.raw(id, "stdout", offset, follow=follow))

    async def stderr(self, id: str, *, offset: int = 0, follow: bool = False) -> AsyncStream[bytes]:  # noqa: A002
        """The stored standard error from a byte offset on."""
        return await self._raw(calls.raw(id, "stderr", offset, follow=follow))

    async def _raw(self, exchange: wire.Exchange) -> AsyncStream[bytes]:
        answer = await self._open(exchange)
        return AsyncStream(answer, answer.chunks())

    async def write_stdin(
        self,
        id: str,  # noqa: A002
        data: bytes | AsyncIterable[bytes],
        *,
        offset: int = 0,
        eof: bool = True,
    ) -> int:
        """Send standard input from a byte offset on; returns the offset after it."""
        chunks = _single(data) if isinstance(data, bytes) else data
        return await self._do(calls.stdin(id, offset, eof=eof), chunks)

    async def signal(self, id: str, signal: int | str | signals.Signals) -> None:  # noqa: A002
        """Send a signal (``15``, ``"SIGTERM"``) to the tool. Raises StateConflict if it does not run."""
        await self._do(calls.signal(id, signal))

    async def cancel(self, id: str) -> models.Invocation:  # noqa: A002
        """End a call in whatever state it is; one that has ended keeps its outcome."""
        return await self._do(calls.cancel(id))

    async def ports(self, id: str) -> Sequence[int]:  # noqa: A002
        """The ports of a running call's container that this caller may reach, by its policy."""
        return await self._do(calls.ports(id))

    async def connect(self, id: str, port: int) -> SocketStream:  # noqa: A002
        """A stream to a server inside a running call's container (see ``Client.connect``), to be closed."""
        return await self._switch(calls.connect(id, port))

    async def session_ports(self, session: str) -> Sequence[int]:
        """The same of the container of what runs in a session now. Raises NotFound, SessionIdle."""
        return await self._do(calls.session_ports(session))

    async def connect_session(self, session: str, port: int) -> SocketStream:
        """The same as ``connect`` for what runs in a session now. Raises SessionIdle where nothing does."""
        return await self._switch(calls.connect_session(session, port))

    async def _switch(self, exchange: wire.Exchange) -> SocketStream:
        return await async_transport.switch(
            self._paths, exchange, connect_timeout=self._connect_timeout, timeout=self._timeout
        )

    async def artifacts(self, id: str) -> Sequence[models.Artifact]:  # noqa: A002
        """The files that were released from a call."""
        return (await self.get(id)).artifacts

    async def artifact(self, id: str, path: str) -> AsyncStream[bytes]:  # noqa: A002
        """The bytes of one artifact. Raises NotFound."""
        return await self._raw(calls.artifact(id, path))

    async def save_artifacts(
        self,
        id: str,  # noqa: A002
        directory: str | os.PathLike[str],
    ) -> Sequence[models.Artifact]:
        """Save all artifacts below a directory, each verified; see ``Destination`` for what is refused."""
        artifacts = await self.artifacts(id)
        with await run_sync(Destination, directory) as destination:
            for one in artifacts:
                into = partial(
                    destination.incoming, one.path, one.size, one.digest, executable=one.executable
                )
                with await run_sync(into) as incoming:
                    async with await self.artifact(id, one.path) as chunks:
                        async for chunk in chunks:
                            await run_sync(incoming.write, chunk)
                    await run_sync(incoming.commit)
        return artifacts

    async def policies(self) -> Sequence[models.PolicyInfo]:
        """The policies that this caller may use."""
        return await self._do(calls.policies())

    async def policy(self, name: str) -> models.PolicyInfo:
        """One policy, with its resolved form. Raises NotFound."""
        return await self._do(calls.policy(name))

    async def check_policy(self, text: str, name: str | None = None) -> Sequence[models.PolicyProblem]:
        """All problems of the text of a policy file; none means that it is good."""
        return await self._do(calls.check_policy(text, name))

    async def plan(
        self, argv: models.Request | Sequence[str | bytes], **fields: Unpack[calls.RequestFields]
    ) -> models.PlanDocument:
        """What would run, exactly, and where each value came from; nothing runs."""
        return await self._do(calls.plan(calls.request(argv, fields)))

    async def images(self) -> Sequence[models.ImageInfo]:
        """The images in the daemon's store."""
        return await self._do(calls.images())

    async def slots(self) -> Sequence[models.SlotInfo]:
        """The containers that the daemon holds. Raises NotPermitted for who is no operator."""
        return await self._do(calls.slots())

    async def secrets(self) -> Sequence[models.SecretInfo]:
        """The stored secrets, without their values. Raises NotPermitted for who is no operator."""
        return await self._do(calls.secrets())

    async def secret(self, name: str) -> models.SecretInfo:
        """What is known of one secret; its value is never given back. Raises NotFound, NotPermitted."""
        return await self._do(calls.secret(name))

    async def set_secret(self, name: str, value: bytes) -> models.SecretInfo:
        """Store a secret. Raises StateConflict if it is there, SecretsUnavailable without a key."""
        return await self._do(calls.set_secret(name, value))

    async def rotate_secret(self, name: str, value: bytes) -> models.SecretInfo:
        """Give a secret a new value. Raises NotFound, SecretsUnavailable."""
        return await self._do(calls.rotate_secret(name, value))

    async def remove_secret(self, name: str) -> None:
        """Forget a secret. Raises NotFound."""
        await self._do(calls.remove_secret(name))

    async def create_session(
        self,
        name: str | None = None,
        *,
        policy: str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl: int | str | None = None,
        idle: int | str | None = None,
        size: int | str | None = None,
        inodes: int | str | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> models.SessionInfo:
        """Make a session: calls with ``session=`` its name or id find the files that those before left.

        ``policy`` is the only one of its calls; after ``ttl``, or ``idle`` after its last use, it is removed;
        ``size`` and ``inodes`` are its quota. ``directory`` is lent to it, not copied: its files are there
        from the start, and what calls change of them is the session's alone. Raises SessionExists,
        QuotaExceeded, NotPermitted, InvalidRequest for a directory that cannot be lent, OSError for one that
        you cannot open.
        """
        async with self._lent(directory) as handle:
            call = calls.create_session(
                name,
                policy=policy,
                labels=labels,
                ttl=ttl,
                idle=idle,
                size=size,
                inodes=inodes,
                checkout=handle,
            )
            return await self._do(call)

    @asynccontextmanager
    async def _lent(self, directory: str | os.PathLike[str] | None) -> AsyncIterator[str | None]:
        if directory is None:
            yield None
            return
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
            return await self._do(files.lend(session, handle or ""))

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
        self,
        session: str,
        path: str = "",
        *,
        checkpoint: str | None = None,
        recursive: bool = False,
        digest: bool = False,
        after: str | None = None,
        limit: int = 1000,
    ) -> models.FileList:
        """What a directory of a session has, or all beneath it, with digests if asked.

        ``after`` is the ``next`` of the page before.
        """
        return await self._do(
            files.listing(
                session, path, checkpoint, recursive=recursive, digest=digest, after=after, limit=limit
            )
        )

    async def read_file(
        self, session: str, path: str, *, checkpoint: str | None = None
    ) -> AsyncStream[bytes]:
        """The bytes of a file of a session, in chunks. Raises NotFound, StateConflict."""
        return await self._raw(files.read(session, path, checkpoint))

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
        chunks = _single(data) if isinstance(data, bytes) else data
        return await self._do(files.bring(session, match=match, own=own), chunks)

    async def fork_session(
        self,
        session: str,
        name: str | None = None,
        *,
        checkpoint: str | None = None,
        policy: str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl: int | str | None = None,
        idle: int | str | None = None,
        size: int | str | None = None,
        inodes: int | str | None = None,
    ) -> models.SessionInfo:
        """Make a session that begins with a checkpoint of another, else with where that stands.

        Raises NotFound, SessionExists, QuotaExceeded, NotPermitted.
        """
        call = calls.fork_session(
            session,
            name,
            checkpoint,
            policy=policy,
            labels=labels,
            ttl=ttl,
            idle=idle,
            size=size,
            inodes=inodes,
        )
        return await self._do(call)

    async def sessions(self, *, before: str | None = None, limit: int | None = None) -> models.SessionList:
        """A page of sessions, newest first; ``before`` is the ``next`` of the page before."""
        return await self._do(calls.sessions(before, limit))

    async def session(self, named: str) -> models.SessionInfo:
        """One session, by its name or id. Raises NotFound."""
        return await self._do(calls.session(named))

    async def delete_session(self, named: str) -> None:
        """Remove a session and its files. Raises NotFound, SessionBusy while calls are in it."""
        await self._do(calls.delete_session(named))

    async def checkpoints(
        self, named: str, *, before: str | None = None, limit: int | None = None
    ) -> models.CheckpointList:
        """A page of the checkpoints of a session, newest first. Raises NotFound."""
        return await self._do(calls.checkpoints(named, before, limit))

    async def rollback_session(self, named: str, checkpoint: str) -> models.SessionInfo:
        """Let a session stand on one of its checkpoints, by id or digest. Raises NotFound, SessionBusy."""
        return await self._do(calls.rollback_session(named, checkpoint))

    async def checkpoint_session(self, named: str) -> models.CheckpointInfo:
        """Make a checkpoint of the files in the container that a session keeps (``isolation: session``).

        Waits for the calls before. Where nothing has changed, the one that there is. Raises NotFound,
        StateConflict where it keeps none, QuotaExceeded, WorkspaceUnfit.
        """
        return await self._do(calls.checkpoint_session(named))

    async def end_session(self, named: str, *, discard: bool = False) -> models.SessionInfo:
        """End the container that a session keeps, after a checkpoint of its files, unless ``discard``.

        Raises NotFound, SessionBusy, StateConflict where it keeps none, QuotaExceeded, WorkspaceUnfit.
        """
        return await self._do(calls.end_session(named, discard=discard))

    async def discard_session(self, named: str) -> models.SessionInfo:
        """Forget the checkpoints that a session does not stand on. Raises NotFound, SessionBusy."""
        return await self._do(calls.discard_session(named))

    async def search(
        self,
        q: str = "",
        *,
        policy: str | None = None,
        uid: int | None = None,
        cause: str | None = None,
        image: str | None = None,
        since: int | None = None,
        until: int | None = None,
        before: int | None = None,
        limit: int | None = None,
    ) -> models.SearchResults:
        """A page of ended calls whose command or output fits; times are µs. Raises InvalidRequest."""
        call = calls.search(
            q, policy=policy, uid=uid, cause=cause, image=image, since=since, until=until, before=before,
            limit=limit,
        )  # fmt: skip
        return await self._do(call)

    async def lineage(self, digest: str) -> models.Lineage:
        """Which calls released a file of this digest, and what they were made of. Raises NotFound."""
        return await self._do(calls.lineage(digest))

    async def replay(self, id: str, *, policy: str | None = None) -> models.Replay:  # noqa: A002
        """Run an ended call again and compare; under the policy of its record, or another one."""
        return await self._do(calls.replay(id, policy))

    async def replay_session(
        self, session: str, *, policy: str | None = None, keep: bool = False
    ) -> AsyncStream[models.ReplayEvent]:
        """Run the calls of a session again in a fresh one, and compare each as it ends.

        The last event has ``ended``. With ``keep`` the fresh session stays. Raises NotFound, StateConflict,
        Pruned.
        """
        answer = await self._open(calls.replay_session(session, policy, keep=keep))
        return AsyncStream(answer, _replayed(answer))

    async def prune(self, *, age: int | None = None, size: int | None = None) -> models.Pruning:
        """Remove bodies, output and artifacts older than ``age`` (µs) or beyond ``size`` bytes, now."""
        return await self._do(calls.prune(age, size))

    async def health(self) -> models.Health:
        """Whether the daemon takes calls, and with what."""
        return await self._do(calls.health())


async def _single(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _results(answer: async_transport.AsyncAnswer) -> AsyncGenerator[models.BatchResult, None]:
    async for line in answer.lines():
        yield calls.batch_result(line)


async def _replayed(answer: async_transport.AsyncAnswer) -> AsyncGenerator[models.ReplayEvent, None]:
    async for line in answer.lines():
        yield calls.replay_event(line)


async def _decoded(
    answer: async_transport.AsyncAnswer, events: calls.Events
) -> AsyncGenerator[models.Event, None]:
    try:
        async for line in answer.lines():
            yield events.accept(line)
    except errors.Unavailable as error:
        error.details.setdefault("after", events.after)
        raise
    events.finish()
