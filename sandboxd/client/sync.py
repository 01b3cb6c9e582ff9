"""The blocking client."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from sandboxd import errors, models
from sandboxd.client import calls, files, lending, location, transport, wire
from sandboxd.client.destination import Destination
from sandboxd.client.patience import RECONNECT, Patience

if TYPE_CHECKING:
    import signal as signals
    import socket as sockets
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Unpack

__all__ = ["Client", "Stream"]

T = TypeVar("T")


class Stream(Generic[T]):
    """Items of an answer as they arrive. An iterator and a context manager; ``close`` hangs up.

    Closing the stream of ``Client.stream`` before its end makes the caller go away: the daemon cancels
    the call unless it has a key.
    """

    def __init__(self, answer: transport.Answer, items: Iterator[T] | None = None) -> None:
        self._answer = answer
        self._items: Iterator[T] = iter(()) if items is None else items
        self._limit: float | None = None

    def set_timeout(self, timeout: float | None) -> None:
        """Bound the wait for each further item to so many seconds."""
        self._limit = timeout
        self._answer.set_timeout(timeout)

    def continue_with(self, answer: transport.Answer) -> None:
        """Go on with another answer, in the place of one that was cut."""
        self._answer.close()
        self._answer = answer
        if self._limit is not None:
            answer.set_timeout(self._limit)

    @property
    def omitted(self) -> int:
        """Files that the daemon says are not in it."""
        return self._answer.omitted

    @property
    def limit(self) -> float | None:
        """Seconds that the next item may take."""
        return self._limit

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._answer.close()

    def feed(self, items: Iterator[T]) -> None:
        """Say where the items come from."""
        self._items = items

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except BaseException:
            self.close()  # the end, an error: either way nothing more comes
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A client of the daemon for threads.

    ``socket``: else ``SANDBOXD_SOCKET``, else ``/run/sandboxd/sandboxd.sock``, else
    ``$XDG_RUNTIME_DIR/sandboxd/sandboxd.sock``. ``connect_timeout`` and ``timeout`` are seconds; the
    latter bounds each read and write, except while waiting for a call to end, which takes as long as
    the policy and the request allow.

    Every method raises ``errors.Unavailable`` when no daemon answers or the connection is lost
    (``details["reason"]`` says which), and the class of ``errors`` that the daemon's answer names. How a
    tool ended is data in ``Invocation.outcome``, never an exception.

    When the daemon goes away while a call is waited for or its events are read, the client looks for it for
    ``reconnect`` seconds and goes on where it was: ``run``, ``stream``, ``wait`` and ``events`` lose nothing.
    A call without a key that the dead daemon ran then has the outcome that the next one gave it; one with a
    key is asked for again. 0: raise Unavailable at once.
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

    def _open(self, exchange: wire.Exchange, chunks: Iterable[bytes] | None = None) -> transport.Answer:
        return transport.exchange(
            self._paths,
            exchange,
            connect_timeout=self._connect_timeout,
            timeout=self._timeout,
            chunks=chunks,
        )

    def _do(self, call: calls.Call[T], chunks: Iterable[bytes] | None = None) -> T:
        with self._open(call.exchange, chunks) as answer:
            return call.decode(answer.read())

    def run(
        self, argv: models.Request | Sequence[str | bytes], **fields: Unpack[calls.RequestFields]
    ) -> models.Invocation:
        """Run a command and wait for its outcome. Raises Refused if it is not accepted."""
        asked = calls.request(argv, fields)
        call = calls.run(asked)
        patience = Patience(self._reconnect)
        with self._ask(call.exchange, asked.key, patience) as answer:
            try:
                return call.decode(answer.read())
            except errors.Unavailable as error:
                id_ = calls.id_at(answer.location)
                if id_ is None or error.details.get("reason") != "lost":
                    raise
                cut = error
        return self._outcome(id_, cut, patience)

    def _ask(self, exchange: wire.Exchange, key: str | None, patience: Patience) -> transport.Answer:
        """The answer to a request; one with a key may be sent again when it is not known to have arrived."""
        try:
            return self._open(exchange)
        except errors.Unavailable as error:
            if key is None or error.details.get("reason") != "lost":
                raise
            return self._again(exchange, error, patience)

    def _again(
        self,
        exchange: wire.Exchange,
        error: errors.SandboxdError,
        patience: Patience,
        limit: float | None = None,
    ) -> transport.Answer:
        """The answer of the next daemon to an exchange. Raises what is not going to pass."""
        until = None if limit is None else time.monotonic() + limit
        while True:
            time.sleep(patience.pause(error))
            if until is not None and time.monotonic() >= until:
                raise wire.timed_out(limit)
            try:
                return self._open(exchange)
            except (errors.Unavailable, errors.Draining) as found:
                error = found

    def _outcome(self, id: str, error: errors.SandboxdError, patience: Patience) -> models.Invocation:  # noqa: A002
        """The outcome of a call whose daemon went away."""
        call = calls.get(id)
        with self._again(call.exchange, error, patience) as answer:
            found = call.decode(answer.read())
        return found if found.state == models.State.ENDED else self.wait(id)

    def start(
        self, argv: models.Request | Sequence[str | bytes], **fields: Unpack[calls.RequestFields]
    ) -> models.Invocation:
        """Return as soon as the call is accepted durably; it runs on when this caller goes away."""
        return self._do(calls.start(calls.request(argv, fields)))

    def stream(
        self, argv: models.Request | Sequence[str | bytes], **fields: Unpack[calls.RequestFields]
    ) -> Stream[models.Event]:
        """Run a command and iterate over its events; the last one is ``ended``."""
        asked = calls.request(argv, fields)
        return self._events(calls.stream(asked), key=asked.key)

    def batch(
        self,
        requests: Iterable[models.Request | Sequence[str | bytes] | Mapping[str, Any]],
        *,
        parallel: int | None = None,
    ) -> Stream[models.BatchResult]:
        """Run many requests, ``parallel`` at a time; what came of each comes as it ends, with its index.

        A request is a ``Request``, an argv, or the JSON of a request; one that is refused has a ``problem``.
        """
        answer = self._open(calls.batch(requests, parallel))
        return Stream(answer, map(calls.batch_result, answer.lines()))

    def get(self, id: str) -> models.Invocation:  # noqa: A002 - the field's name, here and below
        """One invocation. Raises NotFound."""
        return self._do(calls.get(id))

    def callback(self, id: str) -> models.CallbackState:  # noqa: A002
        """What became of a call's callback. Raises NotFound, also where it has none."""
        return self._do(calls.callback(id))

    def list(
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
        return self._do(call)

    def wait(self, id: str, timeout: float | None = None) -> models.Invocation:  # noqa: A002
        """The invocation once it has ended.

        Raises TimeoutError after ``timeout`` seconds, and it runs on; HostFailed when it has ended and the
        host cannot record how yet: wait again.
        """
        invocation = self.get(id)
        if invocation.state == models.State.ENDED:
            return invocation
        limit = None if timeout is None else time.monotonic() + timeout
        with self.events(id) as events:
            while True:
                if limit is not None:
                    remaining = limit - time.monotonic()
                    if remaining <= 0:
                        raise TimeoutError(f"{id} did not end within {timeout:g} s")
                    events.set_timeout(remaining)
                try:
                    event = next(events)
                except errors.Unavailable as error:
                    if limit is not None and error.details.get("reason") == "timeout":
                        raise TimeoutError(f"{id} did not end within {timeout:g} s") from None
                    raise
                if (done := calls.ended(event, id)) is not None:
                    return done

    def events(self, id: str, *, after: int = 0, follow: bool = True) -> Stream[models.Event]:  # noqa: A002
        """The events numbered above ``after``; with ``follow`` until ``ended``, else those so far."""
        exchange = calls.events(id, after, follow=follow)
        if follow:
            return self._events(exchange, id, after)
        answer = self._open(exchange)
        return Stream(answer, calls.Events(complete=False).decode(answer.lines()))

    def _events(
        self,
        exchange: wire.Exchange,
        id: str | None = None,  # noqa: A002
        after: int = 0,
        *,
        key: str | None = None,
    ) -> Stream[models.Event]:
        """Events up to ``ended``, from however many daemons."""
        patience = Patience(self._reconnect)
        answer = self._ask(exchange, key, patience)
        stream: Stream[models.Event] = Stream(answer)
        stream.feed(self._resumed(stream, answer, id or calls.id_at(answer.location), after, patience))
        return stream

    def _resumed(
        self,
        stream: Stream[models.Event],
        answer: transport.Answer,
        id: str | None,  # noqa: A002
        after: int,
        patience: Patience,
    ) -> Iterator[models.Event]:
        while True:
            events = calls.Events(complete=True)
            events.after = after
            try:
                for event in events.decode(answer.lines()):
                    after = event.seq
                    patience.renew()
                    yield event
            except errors.Unavailable as error:
                if id is None or error.details.get("reason") != "lost":
                    raise
                exchange = calls.events(id, after, follow=True)
                answer = self._again(exchange, error, patience, stream.limit)
                stream.continue_with(answer)
            else:
                return

    def stdout(self, id: str, *, offset: int = 0, follow: bool = False) -> Stream[bytes]:  # noqa: A002
        """The stored standard output from a byte offset on."""
        return self._raw(calls.raw(id, "stdout", offset, follow=follow))

    def stderr(self, id: str, *, offset: int = 0, follow: bool = False) -> Stream[bytes]:  # noqa: A002
        """The stored standard error from a byte offset on."""
        return self._raw(calls.raw(id, "stderr", offset, follow=follow))

    def _raw(self, exchange: wire.Exchange) -> Stream[bytes]:
        answer = self._open(exchange)
        return Stream(answer, answer.chunks())

    def write_stdin(
        self,
        id: str,  # noqa: A002
        data: bytes | Iterable[bytes],
        *,
        offset: int = 0,
        eof: bool = True,
    ) -> int:
        """Send standard input from a byte offset on; returns the offset after it.

        Chunks are read only as fast as the tool takes them. Raises StateConflict if the call was not
        made with ``stdin="stream"`` or has ended.
        """
        chunks = (data,) if isinstance(data, bytes) else data
        return self._do(calls.stdin(id, offset, eof=eof), chunks)

    def signal(self, id: str, signal: int | str | signals.Signals) -> None:  # noqa: A002
        """Send a signal (``15``, ``"SIGTERM"``) to the tool. Raises StateConflict if it does not run."""
        self._do(calls.signal(id, signal))

    def cancel(self, id: str) -> models.Invocation:  # noqa: A002
        """End a call in whatever state it is; one that has ended keeps its outcome."""
        return self._do(calls.cancel(id))

    def ports(self, id: str) -> Sequence[int]:  # noqa: A002
        """The ports of a running call's container that this caller may reach, by its policy."""
        return self._do(calls.ports(id))

    def connect(self, id: str, port: int) -> sockets.socket:  # noqa: A002
        """A connected socket to a server inside a running call's container; the caller's to close.

        Raises NotFound, CallNotStarted, CallEnded, PortNotExposed, and PortNotAnswering while nobody
        listens there. It blocks without a timeout, and ends with the call.
        """
        return self._switch(calls.connect(id, port))

    def session_ports(self, session: str) -> Sequence[int]:
        """The same of the container of what runs in a session now. Raises NotFound, SessionIdle."""
        return self._do(calls.session_ports(session))

    def connect_session(self, session: str, port: int) -> sockets.socket:
        """The same as ``connect`` for what runs in a session now. Raises SessionIdle where nothing does."""
        return self._switch(calls.connect_session(session, port))

    def _switch(self, exchange: wire.Exchange) -> sockets.socket:
        return transport.switch(
            self._paths, exchange, connect_timeout=self._connect_timeout, timeout=self._timeout
        )

    def artifacts(self, id: str) -> Sequence[models.Artifact]:  # noqa: A002
        """The files that were released from a call."""
        return self.get(id).artifacts

    def artifact(self, id: str, path: str) -> Stream[bytes]:  # noqa: A002
        """The bytes of one artifact. Raises NotFound."""
        return self._raw(calls.artifact(id, path))

    def save_artifacts(self, id: str, directory: str | os.PathLike[str]) -> Sequence[models.Artifact]:  # noqa: A002
        """Save all artifacts below a directory, each verified; see ``Destination`` for what is refused."""
        artifacts = self.artifacts(id)
        with Destination(directory) as destination:
            for one in artifacts:
                with (
                    destination.incoming(
                        one.path, one.size, one.digest, executable=one.executable
                    ) as incoming,
                    self.artifact(id, one.path) as chunks,
                ):
                    for chunk in chunks:
                        incoming.write(chunk)
                    incoming.commit()
        return artifacts

    def policies(self) -> Sequence[models.PolicyInfo]:
        """The policies that this caller may use."""
        return self._do(calls.policies())

    def policy(self, name: str) -> models.PolicyInfo:
        """One policy, with its resolved form. Raises NotFound."""
        return self._do(calls.policy(name))

    def check_policy(self, text: str, name: str | None = None) -> Sequence[models.PolicyProblem]:
        """All problems of the text of a policy file; none means that it is good."""
        return self._do(calls.check_policy(text, name))

    def plan(
        self, argv: models.Request | Sequence[str | bytes], **fields: Unpack[calls.RequestFields]
    ) -> models.PlanDocument:
        """What would run, exactly, and where each value came from; nothing runs."""
        return self._do(calls.plan(calls.request(argv, fields)))

    def images(self) -> Sequence[models.ImageInfo]:
        """The images in the daemon's store."""
        return self._do(calls.images())

    def slots(self) -> Sequence[models.SlotInfo]:
        """The containers that the daemon holds. Raises NotPermitted for who is no operator."""
        return self._do(calls.slots())

    def secrets(self) -> Sequence[models.SecretInfo]:
        """The stored secrets, without their values. Raises NotPermitted for who is no operator."""
        return self._do(calls.secrets())

    def secret(self, name: str) -> models.SecretInfo:
        """What is known of one secret; its value is never given back. Raises NotFound, NotPermitted."""
        return self._do(calls.secret(name))

    def set_secret(self, name: str, value: bytes) -> models.SecretInfo:
        """Store a secret. Raises StateConflict if it is there, SecretsUnavailable without a key."""
        return self._do(calls.set_secret(name, value))

    def rotate_secret(self, name: str, value: bytes) -> models.SecretInfo:
        """Give a secret a new value. Raises NotFound, SecretsUnavailable."""
        return self._do(calls.rotate_secret(name, value))

    def remove_secret(self, name: str) -> None:
        """Forget a secret. Raises NotFound."""
        self._do(calls.remove_secret(name))

    def create_session(
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
        with ExitStack() as stack:
            handle = None
            if directory is not None:
                handle = stack.enter_context(lending.lent(self._paths, directory, self._connect_timeout))
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
            return self._do(call)

    def lend(self, session: str, directory: str | os.PathLike[str]) -> models.SessionInfo:
        """Give a session the directory that it stands on again, after a restart of the daemon.

        Raises StateConflict for another one.
        """
        with lending.lent(self._paths, directory, self._connect_timeout) as handle:
            return self._do(files.lend(session, handle))

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

    def session_files(
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
        return self._do(
            files.listing(
                session, path, checkpoint, recursive=recursive, digest=digest, after=after, limit=limit
            )
        )

    def read_file(self, session: str, path: str, *, checkpoint: str | None = None) -> Stream[bytes]:
        """The bytes of a file of a session, in chunks. Raises NotFound, StateConflict."""
        answer = self._open(files.read(session, path, checkpoint))
        return Stream(answer, answer.chunks())

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

    def fork_session(
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
        return self._do(call)

    def sessions(self, *, before: str | None = None, limit: int | None = None) -> models.SessionList:
        """A page of sessions, newest first; ``before`` is the ``next`` of the page before."""
        return self._do(calls.sessions(before, limit))

    def session(self, named: str) -> models.SessionInfo:
        """One session, by its name or id. Raises NotFound."""
        return self._do(calls.session(named))

    def delete_session(self, named: str) -> None:
        """Remove a session and its files. Raises NotFound, SessionBusy while calls are in it."""
        self._do(calls.delete_session(named))

    def checkpoints(
        self, named: str, *, before: str | None = None, limit: int | None = None
    ) -> models.CheckpointList:
        """A page of the checkpoints of a session, newest first. Raises NotFound."""
        return self._do(calls.checkpoints(named, before, limit))

    def rollback_session(self, named: str, checkpoint: str) -> models.SessionInfo:
        """Let a session stand on one of its checkpoints, by id or digest. Raises NotFound, SessionBusy."""
        return self._do(calls.rollback_session(named, checkpoint))

    def checkpoint_session(self, named: str) -> models.CheckpointInfo:
        """Make a checkpoint of the files in the container that a session keeps (``isolation: session``).

        Waits for the calls before. Where nothing has changed, the one that there is. Raises NotFound,
        StateConflict where it keeps none, QuotaExceeded, WorkspaceUnfit.
        """
        return self._do(calls.checkpoint_session(named))

    def end_session(self, named: str, *, discard: bool = False) -> models.SessionInfo:
        """End the container that a session keeps, after a checkpoint of its files, unless ``discard``.

        Raises NotFound, SessionBusy, StateConflict where it keeps none, QuotaExceeded, WorkspaceUnfit.
        """
        return self._do(calls.end_session(named, discard=discard))

    def discard_session(self, named: str) -> models.SessionInfo:
        """Forget the checkpoints that a session does not stand on. Raises NotFound, SessionBusy."""
        return self._do(calls.discard_session(named))

    def search(
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
        return self._do(call)

    def lineage(self, digest: str) -> models.Lineage:
        """Which calls released a file of this digest, and what they were made of. Raises NotFound."""
        return self._do(calls.lineage(digest))

    def replay(self, id: str, *, policy: str | None = None) -> models.Replay:  # noqa: A002
        """Run an ended call again and compare; under the policy of its record, or another one."""
        return self._do(calls.replay(id, policy))

    def replay_session(
        self, session: str, *, policy: str | None = None, keep: bool = False
    ) -> Stream[models.ReplayEvent]:
        """Run the calls of a session again in a fresh one, and compare each as it ends.

        The last event has ``ended``. With ``keep`` the fresh session stays. Raises NotFound, StateConflict,
        Pruned.
        """
        answer = self._open(calls.replay_session(session, policy, keep=keep))
        return Stream(answer, map(calls.replay_event, answer.lines()))

    def prune(self, *, age: int | None = None, size: int | None = None) -> models.Pruning:
        """Remove bodies, output and artifacts older than ``age`` (µs) or beyond ``size`` bytes, now."""
        return self._do(calls.prune(age, size))

    def health(self) -> models.Health:
        """Whether the daemon takes calls, and with what."""
        return self._do(calls.health())
