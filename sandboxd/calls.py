"""Accepted calls, from acceptance to outcome: the middle of the daemon.

Theory of operation.  ``submit`` decides everything that can be decided before anything runs (may this
caller use that policy, does the request fit it, is the image there) and writes the acceptance; from
then on the call belongs to a task of the daemon and not to whoever asked. That task queues, runs one
attempt, writes the outcome durably, and only then says ``ended``.
"""

# ruff: noqa: A002  -- `id` is the field's name on the wire

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors, plan, units
from sandboxd.call import Call, off_the_loop, payload_of, request_digest
from sandboxd.journal import records
from sandboxd.journal.spool import Spool
from sandboxd.kernel.tar import Limits as TarLimits
from sandboxd.kernel.tar import check_tar
from sandboxd.ledger import Ledger, finish, recovered, streams_of
from sandboxd.models import (
    Cause,
    Content,
    DigestRef,
    Event,
    Failure,
    Invocation,
    LimitReached,
    Outcome,
    State,
    Times,
)
from sandboxd.network.entrance import Entrance, Entrances, not_exposed
from sandboxd.room import Held
from sandboxd.supervisor.attempt import Attempt, Payload, Result
from sandboxd.supervisor.ending import Deadline
from sandboxd.supervisor.network import CallNetwork
from sandboxd.supervisor.secrets import CallSecrets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from anyio.abc import TaskGroup

    from sandboxd.api.identity import Caller
    from sandboxd.blobs import BlobStore
    from sandboxd.images import ImageStore
    from sandboxd.journal import Journal
    from sandboxd.models import Request
    from sandboxd.network.gateway import Gateway
    from sandboxd.policy import Policy
    from sandboxd.pool import Pool
    from sandboxd.reload import PolicyStore
    from sandboxd.room import Room
    from sandboxd.scheduler import Scheduler
    from sandboxd.secrets import SecretStore
    from sandboxd.session import CallSession
    from sandboxd.sessions import Sessions

__all__ = ["Calls"]

log = structlog.get_logger("sandboxd.calls")
ANSWERING = 0.002  # seconds that an answer has the CPU before the container's remains are cleared away
RECORD_AGAIN = 5.0  # seconds between attempts to write an outcome that could not be written


def _now() -> int:
    return time.time_ns() // 1000


class Calls(Ledger):
    """Submits, runs and shows calls. ``tasks`` is the daemon's task group."""

    def __init__(
        self,
        *,
        state: Path,
        policies: PolicyStore,
        images: ImageStore,
        pool: Pool,
        gateway: Gateway,
        journal: Journal,
        scheduler: Scheduler,
        blobs: BlobStore,
        tasks: TaskGroup,
        inputs: Room,
        secrets: SecretStore,
        sessions: Sessions,
    ) -> None:
        super().__init__(spools=state / "calls", journal=journal, blobs=blobs)
        self._policies = policies
        self._images = images
        self._pool = pool
        self._gateway = gateway
        self._entrances = Entrances(gateway)
        self._scheduler = scheduler
        self._tasks = tasks
        self._inputs = inputs
        self._secrets = secrets
        self._sessions = sessions
        self._accepting = 0
        self.ended: Counter[Cause] = Counter()
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
        self._pool.lacks.refuse(shape)
        self._check_secrets(caller, shape)
        made = plan.make_plan(policy, shape, request)
        if made.holds > self._scheduler.memory:
            inputs = "" if made.holds == made.limits.memory else " and the inputs"
            raise errors.RequestTooWide(
                f"limits.memory{inputs} need {made.holds} bytes, more than the daemon's budget of "
                f"{self._scheduler.memory}",
                field="limits.memory",
                asked=made.holds,
                allowed=self._scheduler.memory,
            )
        return policy, made

    def _check_secrets(self, caller: Caller, shape: plan.Shape) -> None:
        """Raise what keeps a call from the secrets of its policy: first whether it may have them."""
        if not shape.secrets:
            return
        for grant in shape.secrets:
            if not caller.may_have(grant.name):
                raise errors.NotPermitted(
                    f"policy {shape.policy!r} grants the secret {grant.name}, which is not yours to have; an "
                    "operator grants it by `secrets:` of your entry in the configuration's `callers`",
                    secret=grant.name,
                )
        names = [grant.name for grant in shape.secrets]
        self._secrets.check(names, environment=shape.granted("env"))

    async def know_image(self, caller: Caller, request: Request) -> None:
        """Have an engine that keeps images by reference say what one stands for that is used first.

        Raises NotFound, NotPermitted, EngineFailed.
        """
        image = self.policy_for(caller, request.policy).image
        if self._images.needs_asking(image):
            await anyio.to_thread.run_sync(self._images.ask, image)

    async def submit(self, caller: Caller, request: Request, *, tied: bool) -> Invocation:
        """Accept a call durably, or return the one that its key stands for.

        ``tied``: whoever asked waits for the answer, and its going away cancels the call. Raises Refused.
        """
        digest = await off_the_loop(request, request_digest, request)
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
        if request.session is None:
            return await self._submit_in(caller, request, digest, None)
        named = request.policy if "policy" in request.model_fields_set else None
        session = await self._sessions.enter(caller, request.session, named)
        try:
            if session.row.policy is not None:
                request = request.model_copy(update={"policy": session.row.policy})
            return await self._submit_in(caller, request, digest, session)
        except BaseException:
            session.leave()
            raise

    async def _submit_in(
        self, caller: Caller, request: Request, digest: str, session: CallSession | None
    ) -> Invocation:
        await self.know_image(caller, request)
        _, made = await off_the_loop(request, self.plan_for, caller, request)
        self._scheduler.check_room(caller.uid)
        payload = await off_the_loop(request, payload_of, request)
        held = Held(self._inputs, caller.uid)
        held.grow(payload.size)
        try:
            if payload.tar is not None:
                await anyio.to_thread.run_sync(check_tar, payload.tar, TarLimits(made.limits.workspace_size))
            return await self._accept(
                caller, request, made, digest=digest, payload=payload, held=held, session=session
            )
        except BaseException:
            held.release()
            raise

    async def _accept(
        self,
        caller: Caller,
        request: Request,
        made: plan.Plan,
        *,
        digest: str,
        payload: Payload,
        held: Held,
        session: CallSession | None,
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
            session=None if session is None else session.row.id,
        )
        if session is not None and made.commit is not None:
            session.call, session.policy = invocation.id, made.commit
        asked = request.deadline
        deadline = None if asked is None else Deadline(time.monotonic() + asked / 1e6, asked)
        limits = made.limits
        spool = Spool.create(self._spools / invocation.id, {"stdout": limits.stdout, "stderr": limits.stderr})
        spool.add(Event(seq=0, at=accepted, type="accepted", id=invocation.id))
        secrets = CallSecrets(self._secrets, made.shape)
        call = Call(invocation, caller, made, payload, spool, deadline, held, secrets, session)
        self._tasks.start_soon(self._run, call)  # makes ready while the disk writes
        try:
            existing = await self._journal.accept(records.Accepted(invocation, digest))
        except BaseException:
            call.refuse()
            raise
        if existing is not None:
            call.refuse()
            held.release()
            return await self.get(caller, existing.id)
        self._flying[invocation.id] = call
        call.decided.set()
        return invocation

    async def _run(self, call: Call) -> None:
        try:
            await self._queue_and_attempt(call)
        except errors.SandboxdError as error:
            await self._after_fault(call, _ours(error.code, str(error)))
        except Exception as error:  # a bug of ours must still leave an outcome
            log.exception("internal error", id=call.invocation.id)
            await self._after_fault(call, _ours("internal", f"internal error: {type(error).__name__}"))
        finally:
            if not call.ended.is_set():
                with anyio.CancelScope(shield=True):
                    await self._end(call, Result(_ours("interrupted", "the daemon stopped")))

    async def _after_fault(self, call: Call, outcome: Outcome) -> None:
        if call.ended.is_set():
            log.error("a container was not cleared away", id=call.invocation.id, reason=outcome.message)
        else:
            await self._end(call, Result(outcome))

    async def _queue_and_attempt(self, call: Call) -> None:
        invocation, caller = call.invocation, call.caller
        invocation.state = State.QUEUED
        if call.deadline is not None:
            call.queue_scope.deadline = anyio.current_time() + call.deadline.at - time.monotonic()
        with call.queue_scope:
            if call.session is not None:
                await call.session.begin()
            turn = self._scheduler.admitted(
                caller.uid, call.plan.holds, concurrent=caller.concurrent, weight=caller.weight
            )
            async with turn:
                call.queue_scope.deadline = float("inf")
                if not call.cancelled:
                    await self._attempt(call)
        if not call.ended.is_set():
            await self._end(call, Result(_cancelled()) if call.cancelled else _too_late(call.deadline))

    async def _attempt(self, call: Call) -> None:
        """Run the one attempt; the outcome is told while what is left of the container is cleared away."""
        invocation = call.invocation
        invocation.state = State.STARTING
        invocation.attempts += 1

        def on_state(state: Literal["running", "collecting"]) -> None:
            invocation.state = State(state)
            if state == "running":
                invocation.times.started = _now()
                invocation.secrets = call.secrets.uses
                call.spool.add(Event(seq=0, at=invocation.times.started, type="started"))
                self._journal.attempt_started(invocation)

        call.network = CallNetwork(
            self._gateway,
            self._entrances,
            invocation.id,
            call.caller.uid,
            call.spool,
            secrets=call.secrets,
        )
        async with Attempt(
            call.plan,
            call.payload,
            stdin=call.stdin,
            pool=self._pool,
            spool=call.spool,
            network=call.network,
            secrets=call.secrets,
            session=call.session,
            blobs=self._blobs,
            deadline=call.deadline,
            accepted=call.decided,
            on_state=on_state,
        ) as call.attempt:
            result = await call.attempt.run()
            with anyio.CancelScope(shield=True):
                await self._end(call, result)
            await anyio.sleep(ANSWERING)

    async def _end(self, call: Call, result: Result) -> None:
        """Give a call its outcome. Raises nothing: whatever cannot be written, the call ends."""
        await call.decided.wait()
        if call.refused:
            if call.session is not None:
                call.session.leave()
            call.ended.set()
            return
        invocation, session = call.invocation, call.session
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
                "secrets": list(call.secrets.uses),
                **_streams(call.spool, invocation.id),
                "times": invocation.times.model_copy(update={"ended": _now()}),
                **(
                    {}
                    if session is None
                    else {"checkpoint_before": session.before, "checkpoint_after": session.after}
                ),
            }
        )
        try:
            also = None if session is None else session.commit
            await self._journal.ended(done, _header(done, call.plan), also=also)
            if session is not None:
                session.committed()
        except errors.SandboxdError as error:
            if session is not None:
                await session.abandon()
                done.checkpoint_after = session.after
            log.exception("the outcome could not be written", id=done.id)
            done.outcome = _ours("host", f"the outcome could not be recorded: {error}")
            self._unrecorded[done.id] = done
            self._tasks.start_soon(self._record_later, done, call.plan)
        call.invocation = done
        try:
            finish(call.spool, done, durable=False)
        except errors.HostFailed:
            log.exception("the end of the events could not be written", id=done.id)
        call.stdin.close()
        call.held.release()
        call.secrets.close()
        if session is not None:
            session.leave()
        self._flying.pop(done.id, None)
        call.ended.set()
        if done.outcome is not None:
            self.ended[done.outcome.cause] += 1
        log.info("ended", id=done.id, cause=done.outcome.cause if done.outcome else None)

    async def _record_later(self, done: Invocation, made: plan.Plan) -> None:
        """Try again until the outcome that was told is written too, before a later daemon gives another."""
        while done.id in self._unrecorded:
            await anyio.sleep(RECORD_AGAIN)
            try:
                await self._journal.ended(done, _header(done, made))
            except errors.HostFailed:
                continue
            except errors.SandboxdError:
                log.exception("the outcome cannot be written", id=done.id)
            self._unrecorded.pop(done.id, None)

    async def close_interrupted(self) -> int:
        """Give every call that an earlier daemon left in flight its outcome; returns how many."""
        found = await self._journal.in_flight()
        for invocation in found:
            directory = self._spools / invocation.id
            spool = await anyio.to_thread.run_sync(recovered, directory)
            outcome = _ours(
                "interrupted", "the daemon ended while the call was in flight; what it did is unknown"
            )
            done = invocation.model_copy(
                update={
                    "state": State.ENDED,
                    "outcome": outcome,
                    **streams_of(spool),
                    "times": invocation.times.model_copy(update={"ended": _now()}),
                }
            )
            await self._journal.ended(done, records.outcome_header(done))
            finish(spool, done, durable=True)
        return len(found)

    async def _live(self, caller: Caller, id: str) -> Call:
        found = await self._find(caller, id)
        if not isinstance(found, Call):
            raise errors.CallEnded(f"call {id!r} has ended")
        return found

    async def entrance(self, caller: Caller, id: str) -> Entrance:
        """The way to the servers of a running call, where its policy exposes ports.

        Raises NotFound, CallNotStarted, CallEnded, PortNotExposed.
        """
        call = await self._live(caller, id)
        if call.invocation.state in {State.COLLECTING, State.ENDED}:
            raise errors.CallEnded(f"call {id!r} has ended")
        if not call.plan.shape.expose:
            raise not_exposed(())
        if call.invocation.state is not State.RUNNING or call.network is None or not call.network.entrance:
            raise errors.CallNotStarted(f"call {id!r} does not run yet; it is {call.invocation.state}")
        return call.network.entrance

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
            await call.stdin.write(offset, chunk)
            offset += len(chunk)  # not where the stream stands: what was sent before may be sent again
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


def _streams(spool: Spool, id: str) -> dict[str, Content]:
    try:
        return streams_of(spool)
    except errors.SandboxdError:
        log.exception("the output cannot be read", id=id)
        return {}


def _header(done: Invocation, made: plan.Plan) -> dict[str, Any]:
    return records.outcome_header(done, inputs=[item.digest for item in made.inputs], tar=made.tar)


def _ours(code: str, message: str) -> Outcome:
    return Outcome(cause=Cause.FAILED, message=message, error=Failure(code=code, message=message))


def _cancelled() -> Outcome:
    return Outcome(cause=Cause.CANCELLED, message="The call was cancelled before it started.")


def _too_late(deadline: Deadline | None) -> Result:
    asked = 0 if deadline is None else deadline.asked
    message = f"The call's deadline of {units.format_duration(asked)} passed while it waited in the queue."
    return Result(
        Outcome(cause=Cause.WALL_TIME, message=message, evidence={"deadline": asked}),
        limits_reached=[LimitReached(limit="deadline", value=asked, ended=True)],
    )
