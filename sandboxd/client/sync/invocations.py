"""The part of ``Client`` that is about invocations: running commands, and what comes of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sandboxd import errors, models
from sandboxd.client import wire
from sandboxd.client.calls import invocations
from sandboxd.client.calls.invocations import Events
from sandboxd.client.calls.request import request
from sandboxd.client.destination import Destination
from sandboxd.client.patience import Patience
from sandboxd.client.sync.exchanges import Exchanges
from sandboxd.client.sync.stream import Stream

if TYPE_CHECKING:
    import os
    import signal as signals
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any, Unpack

    from sandboxd.client.calls.invocations import PageFields
    from sandboxd.client.calls.request import Argv, RequestFields
    from sandboxd.client.transport import Body
    from sandboxd.client.unanswered import Unanswered

__all__ = ["Invocations"]


class Invocations(Exchanges):
    """Running commands, and what comes of them."""

    def run(self, argv: Argv, **fields: Unpack[RequestFields]) -> models.Invocation:
        """Run a command and wait for its outcome. Raises Refused if it is not accepted."""
        asked = request(argv, fields)
        call = invocations.run(asked)
        patience = Patience(self._reconnect)
        with self._ask(call.exchange, patience, keyed=asked.key is not None) as answer:
            try:
                return call.decode(answer.read())
            except errors.Unavailable as error:
                id_ = invocations.id_at(answer.location)
                if id_ is None or error.details.get("reason") != "lost":
                    raise
                cut = error
        return self._outcome(id_, cut, patience)

    def _ask(self, exchange: wire.Exchange, patience: Patience, *, keyed: bool) -> Body:
        """The answer to a request; one with a key may be sent again when it is not known to have arrived."""
        try:
            return self._open(exchange)
        except errors.Unavailable as error:
            if not keyed or error.details.get("reason") != "lost":
                raise
            return self._again(exchange, error, patience)

    def _again(
        self,
        exchange: wire.Exchange,
        error: errors.SandboxdError,
        patience: Patience,
        limit: float | None = None,
        *,
        at_once: bool = False,
    ) -> Body:
        """The answer of the next daemon to an exchange. Raises what is not going to pass.

        ``at_once``: the daemon is there, and is asked without a pause.
        """
        until = None if limit is None else time.monotonic() + limit
        while True:
            if not at_once:
                time.sleep(patience.pause(error))
            at_once = False
            if until is not None and time.monotonic() >= until:
                raise wire.timed_out(limit)
            try:
                return self._open(exchange)
            except (errors.Unavailable, errors.Draining) as found:
                error = found

    def _outcome(self, id: str, error: errors.SandboxdError, patience: Patience) -> models.Invocation:  # noqa: A002
        """The outcome of a call whose daemon went away."""
        call = invocations.get(id)
        with self._again(call.exchange, error, patience) as answer:
            found = call.decode(answer.read())
        return found if found.state == models.State.ENDED else self.wait(id)

    def start(self, argv: Argv, **fields: Unpack[RequestFields]) -> models.Invocation:
        """Return as soon as the call is accepted durably; it runs on when this caller goes away."""
        return self._do(invocations.start(request(argv, fields)))

    def stream(self, argv: Argv, **fields: Unpack[RequestFields]) -> Stream[models.Event]:
        """Run a command and iterate over its events; the last one is ``ended``."""
        asked = request(argv, fields)
        return self._events(invocations.stream(asked), key=asked.key)

    def batch(
        self,
        requests: Iterable[Argv | Mapping[str, Any]],
        *,
        parallel: int | None = None,
    ) -> Stream[models.BatchResult]:
        """Run many requests, ``parallel`` at a time; what came of each comes as it ends, with its index.

        A request is a ``Request``, an argv, or the JSON of a request; one that is refused has a ``problem``.
        Those without a key get one, by which the next daemon is asked where one goes away.
        """
        left = invocations.batch(requests, parallel)
        patience = Patience(self._reconnect)
        answer = self._ask(left.exchange(), patience, keyed=True)
        stream: Stream[models.BatchResult] = Stream(answer)
        stream.feed(self._results(stream, answer, left, patience))
        return stream

    def _results(
        self, stream: Stream[models.BatchResult], answer: Body, left: Unanswered, patience: Patience
    ) -> Iterator[models.BatchResult]:
        """What came of each request, from however many daemons."""
        while True:
            try:
                for line in answer.lines():
                    found = invocations.batch_result(line, left)
                    if found is not None:
                        patience.renew()
                        yield found
                cut = left.cut()
            except errors.Unavailable as error:
                if error.details.get("reason") != "lost":
                    raise
                cut = error
            if not left:
                return
            answer = self._again(left.exchange(), cut, patience, stream.limit)
            stream.continue_with(answer)

    def get(self, id: str) -> models.Invocation:  # noqa: A002 - the field's name, here and below
        """One invocation. Raises NotFound."""
        return self._do(invocations.get(id))

    def callback(self, id: str) -> models.CallbackState:  # noqa: A002
        """What became of a call's callback. Raises NotFound, also where it has none."""
        return self._do(invocations.callback(id))

    def list(self, **fields: Unpack[PageFields]) -> models.InvocationList:
        """A page of invocations, newest first."""
        return self._do(invocations.page(**fields))

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
                if (done := invocations.ended(event, id)) is not None:
                    return done

    def events(self, id: str, *, after: int = 0, follow: bool = True) -> Stream[models.Event]:  # noqa: A002
        """The events numbered above ``after``; with ``follow`` until ``ended``, else those so far.

        There are none when ``ended`` has no number above ``after``: whoever has read all gets nothing.
        """
        exchange = invocations.events(id, after, follow=follow)
        if follow:
            return self._events(exchange, id, after)
        answer = self._open(exchange)
        return Stream(answer, Events(complete=False).decode(answer.lines()))

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
        answer = self._ask(exchange, patience, keyed=key is not None)
        stream: Stream[models.Event] = Stream(answer)
        stream.feed(self._resumed(stream, answer, id or invocations.id_at(answer.location), after, patience))
        return stream

    def _resumed(
        self,
        stream: Stream[models.Event],
        answer: Body,
        id: str | None,  # noqa: A002
        after: int,
        patience: Patience,
    ) -> Iterator[models.Event]:
        begun, over = after, False
        while True:
            events = Events(complete=True, after=after)
            try:
                for event in events.decode(answer.lines()):
                    after = event.seq
                    patience.renew()
                    yield event
            except errors.Unavailable as error:
                if id is None or error.details.get("reason") != "lost":
                    raise
                at_once = False
                if events.is_empty and after == begun:
                    if over:  # it had ended before this was asked, and still nothing came: there is nothing
                        return
                    over = at_once = self._is_over(id)
                exchange = invocations.events(id, after, follow=True)
                try:
                    answer = self._again(exchange, error, patience, stream.limit, at_once=at_once)
                except errors.Pruned:
                    yield invocations.last(self.get(id), after)
                    return
                stream.continue_with(answer)
            else:
                return

    def _is_over(self, id: str) -> bool:  # noqa: A002
        """Whether a call is known to have ended."""
        try:
            return self.get(id).state == models.State.ENDED
        except (errors.Unavailable, errors.Draining):
            return False

    def stdout(self, id: str, *, offset: int = 0, follow: bool = False) -> Stream[bytes]:  # noqa: A002
        """The stored standard output from a byte offset on."""
        return self._raw(invocations.raw(id, "stdout", offset, follow=follow))

    def stderr(self, id: str, *, offset: int = 0, follow: bool = False) -> Stream[bytes]:  # noqa: A002
        """The stored standard error from a byte offset on."""
        return self._raw(invocations.raw(id, "stderr", offset, follow=follow))

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
        return self._do(invocations.stdin(id, offset, eof=eof), chunks)

    def signal(self, id: str, signal: int | str | signals.Signals) -> None:  # noqa: A002
        """Send a signal (``15``, ``"SIGTERM"``) to the tool. Raises StateConflict if it does not run."""
        self._do(invocations.signal(id, signal))

    def cancel(self, id: str) -> models.Invocation:  # noqa: A002
        """End a call in whatever state it is; one that has ended keeps its outcome."""
        return self._do(invocations.cancel(id))

    def artifacts(self, id: str) -> Sequence[models.Artifact]:  # noqa: A002
        """The files that were released from a call."""
        return self.get(id).artifacts

    def artifact(self, id: str, path: str) -> Stream[bytes]:  # noqa: A002
        """The bytes of one artifact. Raises NotFound."""
        return self._raw(invocations.artifact(id, path))

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
