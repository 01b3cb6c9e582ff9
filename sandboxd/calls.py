"""Accepted calls, from acceptance to outcome: the middle of the daemon.

Theory of operation.  ``submit`` decides everything that can be decided before anything runs (may this
caller use that policy, does the request fit it, is the image there) and writes the acceptance; from
then on the call belongs to a task of the daemon and not to whoever asked. That task queues, runs one
attempt, writes the outcome durably, and only then says ``ended``. A call in flight is here, a finished
one in the journal and its spool; both are read through the same methods, and each caller sees its own.
"""

# ruff: noqa: A002  -- `id` is the field's name on the wire

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import anyio
import anyio.to_thread
import structlog

from sandboxd import canonical, errors, plan, units
from sandboxd.journal import records
from sandboxd.journal.spool import Spool
from sandboxd.models import (
    Bytes,
    Cause,
    Content,
    DigestRef,
    Event,
    Failure,
    Invocation,
    InvocationList,
    Outcome,
    State,
    Times,
)
from sandboxd.room import Held
from sandboxd.supervisor.attempt import Attempt, Payload, Result
from sandboxd.supervisor.streams import Stdin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from anyio.abc import TaskGroup

    from sandboxd.api.identity import Caller
    from sandboxd.blobs import BlobStore
    from sandboxd.engine.base import Engine
    from sandboxd.images import ImageStore
    from sandboxd.journal import Journal
    from sandboxd.models import Artifact, Request
    from sandboxd.policy import Policy
    from sandboxd.reload import PolicyStore
    from sandboxd.room import Room
    from sandboxd.scheduler import Scheduler

__all__ = ["Calls"]

log = structlog.get_logger("sandboxd.calls")
LIST_LIMIT = 500
CHUNK = 256 * 1024  # bytes of an artifact that are read at once
LARGE = 256 * 1024  # characters of inputs that are not hashed and decoded on the event loop
RECORD_AGAIN = 5.0  # seconds between attempts to write an outcome that could not be written

P = ParamSpec("P")
T = TypeVar("T")


def _now() -> int:
    return time.time_ns() // 1000


@dataclass(eq=False)
class Call:
    """One call in flight."""

    invocation: Invocation
    caller: Caller
    plan: plan.Plan
    payload: Payload
    spool: Spool
    deadline: float | None
    held: Held
    cancelled: bool = False
    attempt: Attempt | None = None
    stdin: Stdin = field(default_factory=Stdin)
    queue_scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)

    def cancel(self) -> None:
        """Ask for the outcome ``cancelled``, in whatever state the call is."""
        self.cancelled = True
        if self.attempt is not None:
            self.attempt.cancel()
        else:
            self.queue_scope.cancel()


class Calls:
    """Submits, runs and shows calls. ``tasks`` is the daemon's task group."""

    def __init__(
        self,
        *,
        state: Path,
        policies: PolicyStore,
        images: ImageStore,
        engine: Engine,
        journal: Journal,
        scheduler: Scheduler,
        blobs: BlobStore,
        tasks: TaskGroup,
        inputs: Room,
    ) -> None:
        self._spools = state / "calls"
        self._spools.mkdir(mode=0o700, exist_ok=True)
        self._policies = policies
        self._images = images
        self._engine = engine
        self._journal = journal
        self._scheduler = scheduler
        self._blobs = blobs
        self._tasks = tasks
        self._inputs = inputs
        self._flying: dict[str, Call] = {}
        self._unrecorded: dict[str, Invocation] = {}
        self._accepting = 0
        self.draining = False

    def policy_for(self, caller: Caller, name: str) -> Policy:
        """A policy that this caller may use. Raises NotFound, NotPermitted."""
        if not caller.may_use(name):
            raise errors.NotPermitted(
                f"policy {name!r} is not yours to use; you may use {', '.join(sorted(caller.policies))}",
                policies=sorted(caller.policies),
            )
        return self._policies.current.get(name)

    def plan_for(self, caller: Caller, request: Request) -> tuple[Policy, plan.Plan]:
        """What the request would run. Raises every refusal that does not depend on the daemon's load."""
        policy = self.policy_for(caller, request.policy)
        image = self._images.resolve(policy.image)
        shape = plan.make_shape(policy, plan.ImageRef(image.name, image.digest))
        made = plan.make_plan(policy, shape, request)
        if made.limits.memory > self._scheduler.memory:
            raise errors.RequestTooWide(
                f"limits.memory is {made.limits.memory} bytes, more than the daemon's budget of "
                f"{self._scheduler.memory}",
                field="limits.memory",
                asked=made.limits.memory,
                allowed=self._scheduler.memory,
            )
        return policy, made

    async def submit(self, caller: Caller, request: Request, *, tied: bool) -> Invocation:
        """Accept a call durably, or return the one that its key stands for.

        ``tied``: whoever asked waits for the answer, and its going away cancels the call. Raises Refused.
        """
        digest = await _off_the_loop(request, _request_digest, request)
        if request.key is not None:
            # before all else: what the key stands for is the answer, whatever has changed since
            existing = await self._journal.find_key(caller.uid, request.key)
            if existing is not None and existing.request_digest == digest:
                return await self.get(caller, existing.id)
        if self.draining:
            raise errors.Draining("the daemon finishes what runs and takes nothing new")
        self._accepting += 1
        try:
            accepted = await self._submit(caller, request, digest)
        finally:
            self._accepting -= 1
        log.info("accepted", id=accepted.id, uid=caller.uid, policy=request.policy, tied=tied)
        return accepted

    async def _submit(self, caller: Caller, request: Request, digest: str) -> Invocation:
        _, made = await _off_the_loop(request, self.plan_for, caller, request)
        self._scheduler.check_room(caller.uid)
        payload = await _off_the_loop(request, _payload, request)
        held = Held(self._inputs, caller.uid)
        held.grow(payload.size)
        try:
            return await self._accept(caller, request, made, digest=digest, payload=payload, held=held)
        except BaseException:
            held.release()
            raise

    async def _accept(
        self, caller: Caller, request: Request, made: plan.Plan, *, digest: str, payload: Payload, held: Held
    ) -> Invocation:
        accepted = _now()
        invocation = Invocation(
            id=records.new_id(),
            state=State.ACCEPTED,
            caller=caller.info(),
            policy=DigestRef(name=made.shape.policy, digest=made.shape.policy_digest),
            image=DigestRef(name=made.shape.image.name, digest=made.shape.image.digest),
            plan=made.digest,
            argv=list(request.argv),
            labels=request.labels,
            key=request.key,
            times=Times(accepted=accepted),
        )
        existing = await self._journal.accept(records.Accepted(invocation, digest))
        if existing is not None:
            held.release()
            return await self.get(caller, existing.id)
        deadline = None if request.deadline is None else time.monotonic() + request.deadline / 1e6
        limits = made.limits
        try:
            spool = Spool.create(
                self._spools / invocation.id, {"stdout": limits.stdout, "stderr": limits.stderr}
            )
            spool.add(Event(seq=0, at=accepted, type="accepted", id=invocation.id))
        except errors.HostFailed as error:  # it was accepted, so it has an outcome
            held.release()
            return await self._stillborn(invocation, _ours(error.code, str(error)))
        call = Call(invocation, caller, made, payload, spool, deadline, held)
        self._flying[invocation.id] = call
        self._tasks.start_soon(self._run, call)
        return invocation

    async def _stillborn(self, invocation: Invocation, outcome: Outcome, **streams: Content) -> Invocation:
        """Record the outcome of a call that no task of this daemon runs."""
        done = invocation.model_copy(
            update={
                "state": State.ENDED,
                "outcome": outcome,
                **streams,
                "times": invocation.times.model_copy(update={"ended": _now()}),
            }
        )
        await self._journal.ended(done, records.outcome_header(done))
        return done

    async def _run(self, call: Call) -> None:
        invocation = call.invocation
        result: Result | None = None
        try:
            result = await self._queue_and_attempt(call)
        except errors.SandboxdError as error:
            result = Result(_ours(error.code, str(error)))
        except Exception as error:  # a bug of ours must still leave an outcome
            log.exception("internal error", id=invocation.id)
            result = Result(_ours("internal", f"internal error: {type(error).__name__}"))
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(call, result or Result(_ours("interrupted", "the daemon stopped")))

    async def _queue_and_attempt(self, call: Call) -> Result:
        invocation, caller = call.invocation, call.caller
        invocation.state = State.QUEUED
        if call.deadline is not None:
            call.queue_scope.deadline = anyio.current_time() + call.deadline - time.monotonic()
        result: Result | None = None
        with call.queue_scope:
            turn = self._scheduler.admitted(
                caller.uid, call.plan.limits.memory, concurrent=caller.concurrent, weight=caller.weight
            )
            async with turn:
                call.queue_scope.deadline = float("inf")
                if not call.cancelled:
                    result = await self._attempt(call)
        if result is None:
            return Result(_cancelled() if call.cancelled else _too_late())
        return result

    async def _attempt(self, call: Call) -> Result:
        invocation = call.invocation
        invocation.state = State.STARTING
        invocation.attempts += 1
        self._journal.attempt_started(invocation)

        def on_state(state: Literal["running", "collecting"]) -> None:
            invocation.state = State(state)
            if state == "running":
                invocation.times.started = _now()
                call.spool.add(Event(seq=0, at=invocation.times.started, type="started"))

        call.attempt = Attempt(
            call.plan,
            call.payload,
            stdin=call.stdin,
            engine=self._engine,
            spool=call.spool,
            blobs=self._blobs,
            deadline=call.deadline,
            on_state=on_state,
        )
        return await call.attempt.run()

    async def _end(self, call: Call, result: Result) -> None:
        """Give a call its outcome. Raises nothing: whatever cannot be written, the call ends."""
        invocation = call.invocation
        done = invocation.model_copy(
            update={
                "state": State.ENDED,
                "outcome": result.outcome,
                "receipt": result.receipt,
                "usage": result.usage,
                "denials": result.denials,
                "limits_reached": result.limits_reached,
                "artifacts": result.artifacts,
                "withheld": result.withheld,
                **_streams(call.spool, invocation.id),
                "times": invocation.times.model_copy(update={"ended": _now()}),
            }
        )
        header = records.outcome_header(
            done, inputs=[item.digest for item in call.plan.inputs], tar=call.plan.tar
        )
        try:
            await self._journal.ended(done, header)
        except errors.SandboxdError as error:
            log.exception("the outcome could not be written", id=done.id)
            done.outcome = _ours("host", f"the outcome could not be recorded: {error}")
            self._unrecorded[done.id] = done
            self._tasks.start_soon(self._record_later, done)
        call.invocation = done
        try:
            try:
                call.spool.add(Event(seq=0, at=done.times.ended or 0, type="ended", invocation=done))
            finally:
                call.spool.close(durable=False)
        except errors.HostFailed:
            log.exception("the end of the events could not be written", id=done.id)
        call.stdin.close()
        call.held.release()
        self._flying.pop(done.id, None)
        call.ended.set()
        log.info("ended", id=done.id, cause=done.outcome.cause if done.outcome else None)

    async def _record_later(self, done: Invocation) -> None:
        """Try again until the outcome that was told is written too, before a later daemon gives another."""
        while done.id in self._unrecorded:
            await anyio.sleep(RECORD_AGAIN)
            try:
                await self._journal.ended(done, records.outcome_header(done))
            except errors.HostFailed:
                continue
            except errors.SandboxdError:
                log.exception("the outcome cannot be written", id=done.id)
            self._unrecorded.pop(done.id, None)

    async def close_interrupted(self) -> int:
        """Give every call that an earlier daemon left in flight its outcome; returns how many."""
        found = await self._journal.in_flight()
        for invocation in found:
            streams: dict[str, Content] = {}
            if (self._spools / invocation.id).is_dir():
                spool = Spool.recover(
                    self._spools / invocation.id, {"stdout": units.MAX, "stderr": units.MAX}
                )
                streams = {"stdout": spool.content("stdout"), "stderr": spool.content("stderr")}
            outcome = _ours(
                "interrupted", "the daemon ended while the call was in flight; what it did is unknown"
            )
            await self._stillborn(invocation, outcome, **streams)
        return len(found)

    async def _find(self, caller: Caller, id: str) -> Call | Invocation:
        call = self._flying.get(id)
        found: Call | Invocation | None = call or self._unrecorded.get(id) or await self._journal.get(id)
        shown = found.invocation if isinstance(found, Call) else found
        if found is None or shown is None or not (caller.sees_all or shown.caller.uid == caller.uid):
            raise errors.NotFound(f"no call {id!r} of yours")
        return found

    async def _spool(self, caller: Caller, id: str) -> Spool:
        found = await self._find(caller, id)
        return found.spool if isinstance(found, Call) else Spool.open(self._spools / found.id)

    async def get(self, caller: Caller, id: str) -> Invocation:
        """One call, its streams' heads included. Raises NotFound."""
        found = await self._find(caller, id)
        if isinstance(found, Call):
            return found.invocation.model_copy(
                update={"stdout": found.spool.content("stdout"), "stderr": found.spool.content("stderr")}
            )
        directory = self._spools / found.id
        if directory.is_dir():
            spool = Spool.open(directory)
            found.stdout, found.stderr = spool.content("stdout"), spool.content("stderr")
        return found

    async def wait(self, caller: Caller, id: str) -> Invocation:
        """The call once it has ended. Raises NotFound."""
        found = await self._find(caller, id)
        if not isinstance(found, Call):
            return await self.get(caller, id)
        await found.ended.wait()
        return found.invocation

    async def list(
        self,
        caller: Caller,
        *,
        policy: str | None,
        cause: Cause | None,
        state: State | None,
        label: Mapping[str, str],
        before: str | None,
        limit: int,
    ) -> InvocationList:
        """A page of calls, newest first, without their output."""
        fitting = partial(
            self._journal.list,
            uid=None if caller.sees_all else caller.uid,
            policy=policy,
            cause=cause,
            state=state,
            labels=label,
        )
        found = await fitting(before=before, limit=min(limit, LIST_LIMIT))
        # A page may be short because its calls are large, so its length does not say whether it is the last.
        more = bool(found) and bool(await fitting(before=found[-1].id, limit=1))
        shown = [
            self._flying[item.id].invocation
            if item.id in self._flying
            else self._unrecorded.get(item.id, item)
            for item in found
        ]
        return InvocationList(invocations=shown, next=found[-1].id if more else None)

    async def events(self, caller: Caller, id: str, *, after: int, follow: bool) -> AsyncIterator[Event]:
        """Events from number ``after`` on, with or without waiting for those to come. Raises NotFound."""
        spool = await self._spool(caller, id)
        async for event in spool.follow(after, wait=follow):
            yield event

    async def stream(
        self, caller: Caller, id: str, name: Literal["stdout", "stderr"], *, offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        """The raw bytes of a stream. Raises NotFound."""
        spool = await self._spool(caller, id)
        async for chunk in spool.follow_bytes(name, offset, wait=follow):
            yield chunk

    async def _live(self, caller: Caller, id: str) -> Call:
        found = await self._find(caller, id)
        if not isinstance(found, Call):
            raise errors.StateConflict(f"call {id!r} has ended")
        return found

    async def write_stdin(
        self, caller: Caller, id: str, *, offset: int, chunks: AsyncIterator[bytes], eof: bool
    ) -> int:
        """Write to a call that was asked for with ``stdin: stream``; returns the new offset.

        Raises NotFound, StateConflict.
        """
        call = await self._live(caller, id)
        if call.plan.command.stdin != "stream":
            raise errors.StateConflict("the request did not ask for `stdin: stream`")
        async for chunk in chunks:
            offset = await call.stdin.write(offset, chunk)
        if eof:
            await call.stdin.finish()
        return call.stdin.offset

    async def signal(self, caller: Caller, id: str, signal: int) -> None:
        """Send a signal to a running command. Raises NotFound, StateConflict."""
        call = await self._live(caller, id)
        if call.attempt is None:
            raise errors.StateConflict("the call has not started")
        await call.attempt.signal(signal)

    async def cancel(self, caller: Caller, id: str) -> Invocation:
        """End a call in whatever state; a call that has ended stays as it is. Raises NotFound."""
        found = await self._find(caller, id)
        if isinstance(found, Call):
            found.cancel()
        return await self.wait(caller, id)

    async def artifact(self, caller: Caller, id: str, path: str) -> tuple[Artifact, AsyncIterator[bytes]]:
        """A released file by its path as listed, and its bytes. Raises NotFound."""
        found = await self._find(caller, id)
        invocation = found.invocation if isinstance(found, Call) else found
        for artifact in invocation.artifacts:
            if artifact.path == path:
                return artifact, _chunks(self._blobs.path(artifact.digest))
        raise errors.NotFound(f"call {id!r} released no file {path!r}")

    @property
    def in_flight(self) -> tuple[str, ...]:
        """Ids of the calls that have no outcome yet."""
        return tuple(self._flying)

    async def all_ended(self) -> None:
        """Wait until every call in flight has its outcome, those included that are being accepted now."""
        while self._flying or self._accepting:
            if self._flying:
                await next(iter(self._flying.values())).ended.wait()
            else:
                await anyio.sleep(0.001)

    def cancel_all(self) -> None:
        """Cancel every call in flight."""
        for call in self._flying.values():
            call.cancel()


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        while data := await file.read(CHUNK):
            yield data


async def _off_the_loop(request: Request, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function whose time grows with the request's bytes: in a thread where they are many."""
    contents = [item.content for item in request.inputs]
    contents += [item for item in (request.tar, request.stdin) if isinstance(item, Bytes)]
    if sum(len(item.text or item.base64 or "") for item in contents) < LARGE:
        return function(*args, **kwargs)
    return await anyio.to_thread.run_sync(partial(function, *args, **kwargs))


def _streams(spool: Spool, id: str) -> dict[str, Content]:
    try:
        return {"stdout": spool.content("stdout"), "stderr": spool.content("stderr")}
    except errors.SandboxdError:
        log.exception("the output cannot be read", id=id)
        return {}


def _payload(request: Request) -> Payload:
    def data(content: Bytes | None) -> bytes | None:
        return None if content is None else content.decode()

    stdin = None if isinstance(request.stdin, str) else request.stdin.decode()
    inputs = tuple((item.path, item.content.decode(), item.mode) for item in request.inputs)
    return Payload(inputs, data(request.tar), stdin)


def _request_digest(request: Request) -> str:
    content = {"inputs": {"__all__": {"content"}}, "tar": True, "stdin": isinstance(request.stdin, Bytes)}
    asked = request.model_dump(mode="json", exclude={"key": True, **content}, exclude_none=True)
    payload = _payload(request)  # by digest: as JSON it is tens of MiB that the event loop would wait for
    asked["contents"] = [canonical.digest_bytes(data) for _, data, _ in payload.inputs]
    asked["given"] = [None if d is None else canonical.digest_bytes(d) for d in (payload.tar, payload.stdin)]
    if "cpus" in (limits := asked.get("limits", {})):
        limits["cpus"] = str(limits["cpus"])  # canonical JSON of a float depends on how it was written
    return canonical.digest(asked)


def _ours(code: str, message: str) -> Outcome:
    return Outcome(cause=Cause.FAILED, message=message, error=Failure(code=code, message=message))


def _cancelled() -> Outcome:
    return Outcome(cause=Cause.CANCELLED, message="The call was cancelled before it started.")


def _too_late() -> Outcome:
    return Outcome(cause=Cause.WALL_TIME, message="The call's deadline passed while it waited in the queue.")
