"""The part of ``AsyncClient`` that is about invocations: running commands, and what comes of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio.to_thread import run_sync

from sandboxd import errors, models
from sandboxd.client import wire
from sandboxd.client.aio.exchanges import Exchanges, single
from sandboxd.client.aio.stream import AsyncStream
from sandboxd.client.calls import invocations
from sandboxd.client.calls.invocations import Events
from sandboxd.client.calls.request import request
from sandboxd.client.destination import Destination
from sandboxd.client.patience import Patience

if TYPE_CHECKING:
    import os
    import signal as signals
    from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
    from typing import Any, Unpack

    from sandboxd.client.async_transport import AsyncAnswer
    from sandboxd.client.calls.invocations import PageFields
    from sandboxd.client.calls.request import Argv, RequestFields
    from sandboxd.client.unanswered import Unanswered

__all__ = ["Invocations"]


class Invocations(Exchanges):
    """Running commands, and what comes of them."""

    async def run(self, argv: Argv, **fields: Unpack[RequestFields]) -> models.Invocation:
        """Run a command and wait for its outcome. Raises Refused if it is not accepted."""
        asked = request(argv, fields)
        call = invocations.run(asked)
        patience = Patience(self._reconnect)
        answer = await self._ask(call.exchange, patience, keyed=asked.key is not None)
        try:
            return call.decode(await answer.read())
        except errors.Unavailable as error:
            id_ = invocations.id_at(answer.location)
            if id_ is None or error.details.get("reason") != "lost":
                raise
            cut = error
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()
        return await self._outcome(id_, cut, patience)

    async def _ask(self, exchange: wire.Exchange, patience: Patience, *, keyed: bool) -> AsyncAnswer:
        """The answer to a request; one with a key may be sent again when it is not known to have arrived."""
        try:
            return await self._open(exchange)
        except errors.Unavailable as error:
            if not keyed or error.details.get("reason") != "lost":
                raise
            cut = error
        return await self._again(exchange, cut, patience)

    async def _again(
        self,
        exchange: wire.Exchange,
        error: errors.SandboxdError,
        patience: Patience,
        *,
        at_once: bool = False,
    ) -> AsyncAnswer:
        """The answer of the next daemon to an exchange. Raises what is not going to pass.

        ``at_once``: the daemon is there, and is asked without a pause.
        """
        while True:
            if not at_once:
                await anyio.sleep(patience.pause(error))
            at_once = False
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
        call = invocations.get(id)
        answer = await self._again(call.exchange, error, patience)
        try:
            found = call.decode(await answer.read())
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()
        return found if found.state == models.State.ENDED else await self.wait(id)

    async def start(self, argv: Argv, **fields: Unpack[RequestFields]) -> models.Invocation:
        """Return as soon as the call is accepted durably; it runs on when this caller goes away."""
        return await self._do(invocations.start(request(argv, fields)))

    async def stream(self, argv: Argv, **fields: Unpack[RequestFields]) -> AsyncStream[models.Event]:
        """Run a command and iterate over its events; the last one is ``ended``."""
        asked = request(argv, fields)
        return await self._events(invocations.stream(asked), key=asked.key)

    async def batch(
        self,
        requests: Iterable[Argv | Mapping[str, Any]],
        *,
        parallel: int | None = None,
    ) -> AsyncStream[models.BatchResult]:
        """Run many requests, ``parallel`` at a time; what came of each comes as it ends, with its index.

        A request is a ``Request``, an argv, or the JSON of a request; one that is refused has a ``problem``.
        Those without a key get one, by which the next daemon is asked where one goes away.
        """
        left = invocations.batch(requests, parallel)
        patience = Patience(self._reconnect)
        answer = await self._ask(left.exchange(), patience, keyed=True)
        stream: AsyncStream[models.BatchResult] = AsyncStream(answer)
        stream.feed(self._results(stream, answer, left, patience))
        return stream

    async def _results(
        self,
        stream: AsyncStream[models.BatchResult],
        answer: AsyncAnswer,
        left: Unanswered,
        patience: Patience,
    ) -> AsyncGenerator[models.BatchResult, None]:
        """What came of each request, from however many daemons."""
        while True:
            try:
                async for line in answer.lines():
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
            answer = await self._again(left.exchange(), cut, patience)
            await stream.continue_with(answer)

    async def get(self, id: str) -> models.Invocation:  # noqa: A002 - the field's name, here and below
        """One invocation. Raises NotFound."""
        return await self._do(invocations.get(id))

    async def callback(self, id: str) -> models.CallbackState:  # noqa: A002
        """What became of a call's callback. Raises NotFound, also where it has none."""
        return await self._do(invocations.callback(id))

    async def list(self, **fields: Unpack[PageFields]) -> models.InvocationList:
        """A page of invocations, newest first."""
        return await self._do(invocations.page(**fields))

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
                    if (done := invocations.ended(event, id)) is not None:
                        return done
        raise wire.lost("before the call did")

    async def events(self, id: str, *, after: int = 0, follow: bool = True) -> AsyncStream[models.Event]:  # noqa: A002
        """The events numbered above ``after``; with ``follow`` until ``ended``, else those so far.

        There are none when ``ended`` has no number above ``after``: whoever has read all gets nothing.
        """
        exchange = invocations.events(id, after, follow=follow)
        if follow:
            return await self._events(exchange, id, after)
        answer = await self._open(exchange)
        return AsyncStream(answer, _decoded(answer, Events(complete=False)))

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
        answer = await self._ask(exchange, patience, keyed=key is not None)
        stream: AsyncStream[models.Event] = AsyncStream(answer)
        stream.feed(self._resumed(stream, answer, id or invocations.id_at(answer.location), after, patience))
        return stream

    async def _resumed(
        self,
        stream: AsyncStream[models.Event],
        answer: AsyncAnswer,
        id: str | None,  # noqa: A002
        after: int,
        patience: Patience,
    ) -> AsyncGenerator[models.Event, None]:
        begun, over = after, False
        while True:
            events = Events(complete=True, after=after)
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
            at_once = False
            if events.is_empty and after == begun:
                if over:  # it had ended before this was asked, and still nothing came: there is nothing
                    return
                over = at_once = await self._is_over(id)
            try:
                exchange = invocations.events(id, after, follow=True)
                answer = await self._again(exchange, cut, patience, at_once=at_once)
            except errors.Pruned:
                yield invocations.last(await self.get(id), after)
                return
            await stream.continue_with(answer)

    async def _is_over(self, id: str) -> bool:  # noqa: A002
        """Whether a call is known to have ended."""
        try:
            return (await self.get(id)).state == models.State.ENDED
        except (errors.Unavailable, errors.Draining):
            return False

    async def stdout(self, id: str, *, offset: int = 0, follow: bool = False) -> AsyncStream[bytes]:  # noqa: A002
        """The stored standard output from a byte offset on."""
        return await self._raw(invocations.raw(id, "stdout", offset, follow=follow))

    async def stderr(self, id: str, *, offset: int = 0, follow: bool = False) -> AsyncStream[bytes]:  # noqa: A002
        """The stored standard error from a byte offset on."""
        return await self._raw(invocations.raw(id, "stderr", offset, follow=follow))

    async def write_stdin(
        self,
        id: str,  # noqa: A002
        data: bytes | AsyncIterable[bytes],
        *,
        offset: int = 0,
        eof: bool = True,
    ) -> int:
        """Send standard input from a byte offset on; returns the offset after it."""
        chunks = single(data) if isinstance(data, bytes) else data
        return await self._do(invocations.stdin(id, offset, eof=eof), chunks)

    async def signal(self, id: str, signal: int | str | signals.Signals) -> None:  # noqa: A002
        """Send a signal (``15``, ``"SIGTERM"``) to the tool. Raises StateConflict if it does not run."""
        await self._do(invocations.signal(id, signal))

    async def cancel(self, id: str) -> models.Invocation:  # noqa: A002
        """End a call in whatever state it is; one that has ended keeps its outcome."""
        return await self._do(invocations.cancel(id))

    async def artifacts(self, id: str) -> Sequence[models.Artifact]:  # noqa: A002
        """The files that were released from a call."""
        return (await self.get(id)).artifacts

    async def artifact(self, id: str, path: str) -> AsyncStream[bytes]:  # noqa: A002
        """The bytes of one artifact. Raises NotFound."""
        return await self._raw(invocations.artifact(id, path))

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


async def _decoded(answer: AsyncAnswer, events: Events) -> AsyncGenerator[models.Event, None]:
    try:
        async for line in answer.lines():
            yield events.accept(line)
    except errors.Unavailable as error:
        error.details.setdefault("after", events.after)
        raise
    events.finish()
