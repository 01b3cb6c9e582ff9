"""The course of an accepted call: its turn in the queue, its attempt, its outcome on disk.

Theory of operation.  Each call has a task of the daemon, which does not end with whoever asked. It waits for
its turn, has it written that it starts, runs an attempt, and writes the outcome durably before ``ended``; or,
where the policy says so, gives its slot back and waits for another turn. Whatever goes wrong, the task leaves
an outcome. Only a call that has not started can be put away without one, and is the next daemon's.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.journal.behind import Behind
from sandboxd.ledger import Ledger, finish, streams_of, unrecorded
from sandboxd.models import Cause, Event, Failure, State
from sandboxd.network.entrance import Entrances
from sandboxd.outcomes import cancelled, followed, header, ours, too_late
from sandboxd.supervisor.attempt import Attempt
from sandboxd.supervisor.network import CallNetwork
from sandboxd.supervisor.result import Result, denied
from sandboxd.supervisor.streams import Stdin

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anyio.abc import TaskGroup

    from sandboxd.blobs import BlobStore
    from sandboxd.call import Call
    from sandboxd.callbacks import Callbacks
    from sandboxd.journal import Journal
    from sandboxd.journal.spool import Part, Spool
    from sandboxd.models import Content, Invocation, Outcome
    from sandboxd.network.gateway import Gateway
    from sandboxd.pool import Pool
    from sandboxd.retries import Again
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
        callbacks: Callbacks,
    ) -> None:
        super().__init__(spools=spools, journal=journal, blobs=blobs)
        self._pool = pool
        self._gateway = gateway
        self._entrances = Entrances(gateway)
        self._scheduler = scheduler
        self._tasks = tasks
        self._behind = Behind(journal, spools)
        self.ended: Counter[Cause] = Counter()
        self.callbacks = callbacks

    async def _run(self, call: Call) -> None:
        try:
            await self._take_turns(call)
        except errors.SandboxdError as error:
            await self._after_fault(call, ours(error.code, str(error)))
        except Exception as error:  # a bug of ours must still leave an outcome
            log.exception("internal error", id=call.invocation.id)
            await self._after_fault(call, ours("internal", f"internal error: {type(error).__name__}"))
        finally:
            self._scheduler.leave(call.ticket)
            if not call.answered.is_set():
                with anyio.CancelScope(shield=True):
                    await self._end(call, Result(ours("interrupted", "the daemon stopped")))

    async def _after_fault(self, call: Call, outcome: Outcome) -> None:
        if call.answered.is_set():
            log.error("a container was not cleared away", id=call.invocation.id, reason=outcome.message)
            return
        if call.session is not None:
            await call.session.spoil("the call failed by a fault of the daemon's")
            await call.session.abandon()
        await self._end(call, Result(outcome))

    async def _take_turns(self, call: Call) -> None:
        """Attempts, each in its turn, until one decides the outcome."""
        while await self._turn(call):
            again = await self._attempt(call)
            if again is None:
                return
            if call.session is not None:
                await call.session.abandon()
            self._scheduler.rest(call.ticket)  # who waits for another attempt holds nothing
            if self.draining and not call.tied and not call.cancelled:
                call.shelve()
            with self._waiting(call):
                await anyio.sleep(again.pause / 1e6)
            if call.shelved:  # whoever stops the daemon does not wait for that: the next one tries again
                self._put_away(call)
                return
            call.plan = again.plan
            call.ticket.memory, call.ticket.cpus = again.plan.holds, again.plan.limits.cpus
            call.turn = anyio.Event()
            if not call.cancelled:
                self._scheduler.enqueue(call.ticket)
        if call.shelved:
            self._put_away(call)
        elif not call.answered.is_set():
            await self._end(call, Result(cancelled()) if call.cancelled else too_late(call.deadline))

    def _waiting(self, call: Call) -> anyio.CancelScope:
        """A scope for what a call waits for while it has no container; cancelled by whoever ends the call."""
        call.queue_scope = anyio.CancelScope()
        if call.deadline is not None:
            call.queue_scope.deadline = anyio.current_time() + call.deadline.at - time.monotonic()
        if call.cancelled or call.shelved:
            call.queue_scope.cancel()
        return call.queue_scope

    async def _turn(self, call: Call) -> bool:
        """Wait for a turn in the queue; False when the call ended, or was put away, meanwhile."""
        call.invocation.state = State.QUEUED
        with self._waiting(call):
            await call.turn.wait()
        if call.cancelled or not call.ticket.granted:
            return False
        if call.deadline is not None and time.monotonic() >= call.deadline.at:  # while no daemon was there
            return False
        number = call.invocation.attempts + 1
        if number > call.marked:
            # from here on a later daemon takes it for one that may have run
            await self._journal.started(call.invocation.id, number)
            call.marked = number
        call.shelved = False
        if call.session is not None:
            with self._waiting(call) as waited:
                await call.session.begin()
            if waited.cancelled_caught:
                return False
        return not call.cancelled

    async def _attempt(self, call: Call) -> Again | None:
        """Run one attempt; what follows it, or None when it decided the outcome.

        The outcome is told while what is left of the container is cleared away.
        """
        invocation = call.invocation
        invocation.state = State.STARTING
        invocation.attempts += 1

        def on_state(state: Literal["running", "collecting"]) -> None:
            invocation.state = State(state)
            if state == "running":
                invocation.times.started = now()
                invocation.secrets = call.secrets.uses
                call.spool.add(Event(seq=0, at=invocation.times.started, type="started"))
                self._journal.follow(invocation)

        seat = None
        if call.session is not None:
            try:
                seat = call.session.take_seat(call.plan, call.ticket, self._scheduler)
            except errors.ContainerLive as error:  # since it was accepted
                await self._end(call, Result(denied(error)))
                return None
        call.network = CallNetwork(
            self._gateway,
            self._entrances,
            invocation.id,
            call.caller.uid,
            call.spool,
            secrets=call.secrets,
            session=call.session,
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
            seat=seat,
            blobs=self._blobs,
            deadline=call.deadline,
            accepted=call.decided,
            on_state=on_state,
        ) as attempt:
            call.attempt = attempt
            if call.cancelled:  # when there was no attempt yet that could be told
                attempt.cancel()
            result = await attempt.run()
            again = self._again(call, result, attempt)
            if again is None:
                with anyio.CancelScope(shield=True):
                    await self._end(call, result)
                await anyio.sleep(ANSWERING)
            else:  # with nothing between: whoever writes to its stdin finds the next one
                call.attempt, call.network, call.stdin = None, None, Stdin()
                self._tell_again(call, result, again)
        return again

    def _again(self, call: Call, result: Result, attempt: Attempt) -> Again | None:
        """What follows an attempt, if not the outcome."""
        if call.cancelled or call.refused or not call.decided.is_set():
            return None
        if call.plan.shape.kept:  # what it began with is not there any more
            return None
        again = call.retries.after(
            result.outcome,
            call.plan,
            call.invocation.retried,
            handed_over=attempt.handed_over,
            signalled=attempt.signalled,
        )
        if again is None or (self.draining and call.tied):
            return None
        if call.deadline is not None and time.monotonic() + again.pause / 1e6 >= call.deadline.at:
            return None
        return again

    def _tell_again(self, call: Call, result: Result, again: Again) -> None:
        """Record an attempt that another follows."""
        invocation, limits = call.invocation, again.plan.limits
        call.spool.allow({"stdout": limits.stdout, "stderr": limits.stderr})
        failed = followed(invocation, call.spool, result, again, ended=now())
        self._journal.follow(invocation, memory=again.plan.holds)
        log.info("tried again", id=invocation.id, cause=failed.cause, number=failed.number)

    def _put_away(self, call: Call) -> None:
        """Let go of a call that waits for a later daemon."""
        call.spool.leave()
        self._later.add(call.invocation.id)
        self._let_go(call)

    def _let_go(self, call: Call) -> None:
        """Close what a call holds, and say that no task of this daemon has it any more."""
        call.stdin.close()
        call.held.release()
        call.secrets.close()
        if call.session is not None:
            call.session.leave()
        self._flying.pop(call.invocation.id, None)
        call.ended.set()
        call.answered.set()

    async def _end(self, call: Call, result: Result) -> None:
        """Give a call its outcome. Raises nothing: whatever cannot be written, the call ends."""
        await call.decided.wait()
        if call.refused:
            if call.session is not None:
                if call.session.seat is not None:
                    await call.session.seat.undo()
                await call.session.abandon()
                call.session.leave()
            call.ended.set()
            call.answered.set()
            return
        invocation, session = call.invocation, call.session
        outcome, output = await _kept(call.spool, result.outcome)
        if session is not None and outcome is not result.outcome:
            await session.spoil("the call's output could not be kept")
            await session.abandon()  # a failure of ours leaves nothing in it
        done = invocation.model_copy(
            update={
                "state": State.ENDED,
                "outcome": outcome,
                "receipt": result.receipt,
                "usage": result.usage,
                "denials": result.denials,
                "limits_reached": result.limits_reached,
                "artifacts": result.artifacts,
                "withheld": result.withheld,
                "secrets": list(call.secrets.uses),
                "container": result.container
                if session is None or session.seat is None
                else session.seat.use,
                **_streams(call.spool, invocation.id),
                "stdin_taken": call.stdin.offset if call.plan.command.stdin == "stream" else None,
                "times": invocation.times.model_copy(update={"ended": now()}),
                **({} if session is None else session.checkpoints),
            }
        )
        call.released = frozenset(artifact.digest for artifact in done.artifacts)
        call.unrecorded = await self._record(call, done, output)
        if call.unrecorded is None:
            self._finish(call, done, output)
        else:
            error = Failure(code=errors.HostFailed.code, message=unrecorded(call.unrecorded))
            call.spool.announce(Event(seq=0, at=now(), type="unrecorded", error=error))
            call.answered.set()
            self._tasks.start_soon(self._record_later, call, done, output)

    async def _record(self, call: Call, done: Invocation, output: _Output) -> str | None:
        """Write an outcome, and with it what its session keeps; says why where it is not on disk."""
        session = call.session
        also = None if session is None else session.commit
        try:
            await self._journal.ended(
                done, header(done, call.plan, output.events), also=also, output=output.copy
            )
        except errors.HostFailed as error:
            log.exception("the outcome could not be written", id=done.id)
            return str(error)
        except errors.SandboxdError as error:  # it never can
            log.exception("the outcome could not be written", id=done.id)
            if session is not None:
                with suppress(errors.SandboxdError, OSError):
                    await session.spoil("the call's outcome could not be recorded")
                await session.abandon()
                done.checkpoint_after = session.after
            done.outcome = ours("host", f"the outcome could not be recorded: {error}")
            try:
                await self._journal.ended(done, header(done, call.plan, output.events), output=output.copy)
            except errors.HostFailed as failed:
                return str(failed)
            except errors.SandboxdError:
                log.exception("nor could that", id=done.id)
            return None
        if session is not None:
            session.committed()
        return None

    async def _record_later(self, call: Call, done: Invocation, output: _Output) -> None:
        """Try again until the outcome is on disk: told before, a later daemon might give another."""
        while call.unrecorded is not None:
            await anyio.sleep(RECORD_AGAIN)
            call.unrecorded = await self._record(call, done, output)
        call.spool.announce(None)
        self._finish(call, done, output)

    def _finish(self, call: Call, done: Invocation, output: _Output) -> None:
        """Tell an outcome that is on disk."""
        call.invocation = done
        try:
            finish(call.spool, done, durable=False)
        except errors.HostFailed:
            log.exception("the end of the events could not be written", id=done.id)
        if output.copy is not None:
            self._behind.add(done.id)
        self._let_go(call)
        self.callbacks.ended(done)
        if done.outcome is not None:
            self.ended[done.outcome.cause] += 1
        log.info("ended", id=done.id, cause=done.outcome.cause if done.outcome else None)


class _Output(NamedTuple):
    """What is recorded of a call's output: a copy, where it is not on disk, and how far its events go."""

    copy: bytes | None = None
    events: Mapping[str, Part] | None = None


async def _kept(spool: Spool, outcome: Outcome) -> tuple[Outcome, _Output]:
    """The outcome once the output that it names is on disk, or with a copy that will be with it.

    Another one where that cannot be.
    """
    if not spool.stored:
        return outcome, _Output()
    try:
        output = _Output(spool.copy(), spool.told())  # both of the same moment: more may be told meanwhile
        if output.copy is None:
            await anyio.to_thread.run_sync(spool.sync)
    except errors.HostFailed as error:
        log.exception("the output could not be kept")
        return ours(error.code, str(error)), _Output()
    return outcome, output


def _streams(spool: Spool, name: str) -> dict[str, Content]:
    try:
        return streams_of(spool)
    except errors.SandboxdError:
        log.exception("the output cannot be read", id=name)
        return {}
