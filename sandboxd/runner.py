"""The course of an accepted call: its turn in the queue, its attempt, its outcome on disk.

Theory of operation.  Each call has a task of the daemon, which does not end with whoever asked. It waits for
its turn, runs an attempt, writes the outcome durably, and only then says ``ended``. Whatever goes wrong, the
task leaves an outcome.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Literal

import anyio
import structlog

from sandboxd import errors
from sandboxd.ledger import Ledger, finish, streams_of
from sandboxd.models import Cause, Event, State
from sandboxd.network.entrance import Entrances
from sandboxd.outcomes import cancelled, header, ours, too_late
from sandboxd.supervisor.attempt import Attempt, Result
from sandboxd.supervisor.network import CallNetwork

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.abc import TaskGroup

    from sandboxd import plan
    from sandboxd.blobs import BlobStore
    from sandboxd.call import Call
    from sandboxd.journal import Journal
    from sandboxd.journal.spool import Spool
    from sandboxd.models import Content, Invocation, Outcome
    from sandboxd.network.gateway import Gateway
    from sandboxd.pool import Pool
    from sandboxd.scheduler import Scheduler

__all__ = ["Runner", "now"]

log = structlog.get_logger("sandboxd.calls")
ANSWERING = 0.002  # seconds that an answer has the CPU before the container's remains are cleared away
RECORD_AGAIN = 5.0  # seconds between attempts to write an outcome that could not be written


def now() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


class Runner(Ledger):
    """Runs calls that were accepted. ``tasks`` is the daemon's task group."""

    def __init__(
        self,
        *,
        spools: Path,
        pool: Pool,
        gateway: Gateway,
        journal: Journal,
        scheduler: Scheduler,
        blobs: BlobStore,
        tasks: TaskGroup,
    ) -> None:
        super().__init__(spools=spools, journal=journal, blobs=blobs)
        self._pool = pool
        self._gateway = gateway
        self._entrances = Entrances(gateway)
        self._scheduler = scheduler
        self._tasks = tasks
        self.ended: Counter[Cause] = Counter()

    async def _run(self, call: Call) -> None:
        try:
            await self._queue_and_attempt(call)
        except errors.SandboxdError as error:
            await self._after_fault(call, ours(error.code, str(error)))
        except Exception as error:  # a bug of ours must still leave an outcome
            log.exception("internal error", id=call.invocation.id)
            await self._after_fault(call, ours("internal", f"internal error: {type(error).__name__}"))
        finally:
            if not call.ended.is_set():
                with anyio.CancelScope(shield=True):
                    await self._end(call, Result(ours("interrupted", "the daemon stopped")))

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
            turn = self._scheduler.admitted(
                caller.uid, call.plan.holds, concurrent=caller.concurrent, weight=caller.weight
            )
            async with turn:
                call.queue_scope.deadline = float("inf")
                if not call.cancelled:
                    await self._attempt(call)
        if not call.ended.is_set():
            await self._end(call, Result(cancelled()) if call.cancelled else too_late(call.deadline))

    async def _attempt(self, call: Call) -> None:
        """Run the one attempt; the outcome is told while what is left of the container is cleared away."""
        invocation = call.invocation
        invocation.state = State.STARTING
        invocation.attempts += 1

        def on_state(state: Literal["running", "collecting"]) -> None:
            invocation.state = State(state)
            if state == "running":
                invocation.times.started = now()
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
            call.ended.set()
            return
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
                "secrets": list(call.secrets.uses),
                **_streams(call.spool, invocation.id),
                "times": invocation.times.model_copy(update={"ended": now()}),
            }
        )
        try:
            await self._journal.ended(done, header(done, call.plan))
        except errors.SandboxdError as error:
            log.exception("the outcome could not be written", id=done.id)
            done.outcome = ours("host", f"the outcome could not be recorded: {error}")
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
                await self._journal.ended(done, header(done, made))
            except errors.HostFailed:
                continue
            except errors.SandboxdError:
                log.exception("the outcome cannot be written", id=done.id)
            self._unrecorded.pop(done.id, None)


def _streams(spool: Spool, name: str) -> dict[str, Content]:
    try:
        return streams_of(spool)
    except errors.SandboxdError:
        log.exception("the output cannot be read", id=name)
        return {}
