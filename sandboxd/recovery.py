"""What an earlier daemon left: each of its calls gets its outcome, or waits in the queue again.

Theory of operation.  A call that had its container ended with that daemon, and what it did is unknown: it
is ``failed: interrupted``, or tried again where its policy says so. One that had not started and has a key or
was asked for asynchronously waits in the queue again, in order of acceptance and with its deadline counting
on; one that was tied to a connection is ``cancelled``, since that connection is gone. Of a long queue only
what the scheduler needs is read. Such calls are *dormant*: they become calls in flight, with their requests,
when they have their turn or somebody asks for them. They run under the policy that is in force then, or are
``denied`` where it refuses them.
"""

# ruff: noqa: A002  -- `id` is the field's name on the wire

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.call import Call, off_the_loop, payload_of
from sandboxd.failpoint import failpoint
from sandboxd.journal import records
from sandboxd.journal.spool import Spool, Stream
from sandboxd.ledger import finish, recovered, retried_events, streams_of
from sandboxd.models import Cause, DigestRef, Event, Failure, Outcome, State
from sandboxd.outcomes import cancelled_with_its_caller, followed, ours
from sandboxd.planner import Planner
from sandboxd.retries import Retries
from sandboxd.room import Held
from sandboxd.runner import RECORD_AGAIN, Runner, now
from sandboxd.scheduler import Ticket
from sandboxd.supervisor.ending import Deadline
from sandboxd.supervisor.result import Result
from sandboxd.supervisor.secrets import CallSecrets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sandboxd.api.identity import Caller
    from sandboxd.images import ImageStore
    from sandboxd.journal.requests import Open
    from sandboxd.models import Invocation, Request
    from sandboxd.plan import Plan
    from sandboxd.pool import Pool
    from sandboxd.reload import PolicyStore
    from sandboxd.room import Room
    from sandboxd.scheduler import Scheduler
    from sandboxd.secrets import SecretStore
    from sandboxd.session import CallSession
    from sandboxd.sessions import Sessions

__all__ = ["Recovery"]

log = structlog.get_logger("sandboxd.calls")
INTERRUPTED = "the daemon ended while the call was in flight; what it did is unknown"


class Recovery(Runner):
    """Takes up the calls of an earlier daemon. ``identify`` says what a uid, gid and groups may do now."""

    def __init__(
        self,
        *,
        state: Path,
        policies: PolicyStore,
        images: ImageStore,
        pool: Pool,
        scheduler: Scheduler,
        inputs: Room,
        secrets: SecretStore,
        sessions: Sessions,
        identify: Callable[[int, int, frozenset[int]], Caller],
        **parts: Any,
    ) -> None:
        """``parts`` are the others of ``Runner``."""
        super().__init__(spools=state / "calls", pool=pool, scheduler=scheduler, **parts)
        self._planner = Planner(policies, images, pool, scheduler, secrets)
        self._inputs = inputs
        self._secrets = secrets
        self.sessions = sessions
        self._identify = identify
        self._rows: dict[str, Open] = {}
        self._waking = anyio.Lock()

    async def recover(self) -> None:
        """Take up what an earlier daemon left.

        Nothing starts before the scheduler is no longer paused.
        """
        await self._behind.restore()
        self._tasks.start_soon(self._behind.run)
        ended = 0
        await self.callbacks.recover()
        callers: dict[tuple[int, int, str], Caller] = {}
        for row in await self._journal.open_calls():
            had_container = row.started and not row.resting
            try:
                if (row.tied or not row.known or had_container) and not await self._interrupted(row):
                    ended += 1
                    continue
            except errors.JournalCorrupt:  # one that cannot be read is no reason to serve nobody
                log.exception("a call of an earlier daemon cannot be read", id=row.id)
                continue
            who = (row.uid, row.gid, row.groups)
            if who not in callers:
                callers[who] = self._caller(row)
            self._lay_down(row, callers[who])
        if ended or self._dormant:
            log.warning("an earlier daemon's calls", ended=ended, queued=len(self._dormant))

    def _caller(self, row: Open) -> Caller:
        return self._identify(row.uid, row.gid, frozenset(json.loads(row.groups)))

    def _lay_down(self, row: Open, caller: Caller) -> None:
        ticket = Ticket(
            row.uid,
            row.memory,
            cpus=row.cpus,
            priority=row.priority,
            serial=row.serial,
            concurrent=caller.concurrent,
            weight=caller.weight,
            on_grant=partial(self._wake_soon, row.id),
        )
        self._rows[row.id] = row
        self._dormant[row.id] = ticket
        if row.serial is not None:
            self.sessions.holds.wait(row.serial)
        self._scheduler.enqueue(ticket)
        if row.deadline is not None:  # whoever is awake by then sees to it itself
            left = (row.deadline - now()) / 1e6
            asyncio.get_running_loop().call_later(max(0.0, left), self._wake_soon, row.id)

    def _wake_soon(self, id: str) -> None:
        if id in self._dormant:
            self._tasks.start_soon(self._wake, id)

    async def _enter(
        self, caller: Caller, request: Request, named: str, policy: str | None = None
    ) -> tuple[CallSession, Request]:
        """A request's session, and the request with the policy of it; ``policy`` is what was asked for.

        Raises NotFound, NotPermitted.
        """
        session = await self.sessions.holds.enter(caller, named, policy)
        if session.row.policy is not None:
            request = request.model_copy(update={"policy": session.row.policy})
        return session, request

    async def _interrupted(self, row: Open) -> bool:
        """Give a call its outcome, or see whether its policy has it tried again."""
        invocation = await self._journal.get(row.id)
        if invocation is None:
            raise errors.JournalCorrupt(f"invocation {row.id} in the journal cannot be read", id=row.id)
        if row.known and not row.started:
            await self._close(invocation, cancelled_with_its_caller())
            return False
        if row.known and not row.tied and await self._try_again(row, invocation):
            return True
        await self._close(invocation, ours("interrupted", INTERRUPTED))
        return False

    async def _try_again(self, row: Open, invocation: Invocation) -> bool:
        """Record that an attempt was interrupted, if another follows it."""
        outcome = ours("interrupted", INTERRUPTED)
        try:
            request = await self._journal.request(row.id)
            caller = self._caller(row)
            if row.serial is not None:
                session, request = await self._enter(caller, request, row.serial)
                session.leave()
            policy, made = await off_the_loop(request, self._planner.plan_for, caller, request)
        except errors.SandboxdError:
            return False
        if len(invocation.retried) >= row.started:
            return False  # it says so itself; this cannot be
        if made.shape.kept:  # what it began with went with the container
            return False
        retries = Retries(policy.spec.retry)
        made = retries.resumed(made, invocation.retried)
        again = retries.after(outcome, made, invocation.retried, handed_over=True)
        if again is None or (row.deadline is not None and now() + again.pause >= row.deadline):
            return False
        again = replace(again, pause=0)  # the daemon's start was one
        spool = await anyio.to_thread.run_sync(self._spool_of, invocation, made)
        invocation.attempts = row.started
        followed(invocation, spool, Result(outcome), again, ended=now())
        spool.leave()
        failpoint("recovery.again")
        self._journal.follow(invocation, memory=again.plan.holds)
        return True

    def _spool_of(self, invocation: Invocation, made: Plan) -> Spool:
        """The spool of a call that goes on, with the events that were told of it. Blocks."""
        directory, limits = self._spools / invocation.id, made.limits
        caps: dict[Stream, int] = {"stdout": limits.stdout, "stderr": limits.stderr}
        if directory.is_dir():
            spool = Spool.recover(directory, caps)
            spool.allow(caps)
            return spool
        spool = Spool.create(directory, caps)
        spool.add(Event(seq=0, at=invocation.times.accepted, type="accepted", id=invocation.id))
        for event in retried_events(invocation):
            spool.add(event)
        if invocation.times.started is not None:
            spool.add(Event(seq=0, at=invocation.times.started, type="started"))
        return spool

    async def _close(self, invocation: Invocation, outcome: Outcome, *, later: bool = False) -> None:
        """Record the outcome of a call that no task of this daemon has.

        Raises HostFailed where it cannot be; or with ``later`` goes on trying, and nobody is told before.
        """
        spool = await anyio.to_thread.run_sync(recovered, self._spools / invocation.id)
        done = invocation.model_copy(
            update={
                "state": State.ENDED,
                "outcome": outcome,
                **streams_of(spool),
                "times": invocation.times.model_copy(update={"ended": now()}),
            }
        )
        if spool.stored:
            await anyio.to_thread.run_sync(spool.sync)
        failpoint("recovery.close")
        try:
            await self._journal.ended(done, records.outcome_header(done, events=spool.told()))
        except errors.HostFailed as error:
            if not later:
                raise
            self._unrecorded[done.id] = str(error)
            self._tasks.start_soon(self._close_later, spool, done, outcome)
        else:
            self._closed(spool, done, outcome)

    async def _close_later(self, spool: Spool, done: Invocation, outcome: Outcome) -> None:
        while done.id in self._unrecorded:
            await anyio.sleep(RECORD_AGAIN)
            try:
                await self._journal.ended(done, records.outcome_header(done, events=spool.told()))
            except errors.HostFailed as error:
                self._unrecorded[done.id] = str(error)
            else:
                del self._unrecorded[done.id]
        self._closed(spool, done, outcome)

    def _closed(self, spool: Spool, done: Invocation, outcome: Outcome) -> None:
        finish(spool, done, durable=True)
        self.ended[outcome.cause] += 1
        self.callbacks.ended(done)

    async def _wake(self, id: str) -> None:
        """Make a dormant call one in flight, or give it the outcome that keeps it from that."""
        async with self._waking:
            ticket = self._dormant.get(id)
            if ticket is None or self.draining:
                return
            try:
                await self._wake_up(self._rows[id], ticket)
            except errors.Refused as error:
                await self._refuse(id, ticket, error)
            except errors.SandboxdError as error:
                log.exception("a call that waited cannot be run", id=id)
                await self._refuse(id, ticket, error)
            except Exception as error:  # a bug of ours must still leave an outcome, and the daemon
                log.exception("internal error", id=id)
                fault = f"internal error: {type(error).__name__}"
                await self._refuse(id, ticket, errors.SandboxdError(fault))

    async def _wake_up(self, row: Open, ticket: Ticket) -> None:
        invocation = await self._journal.get(row.id)
        if invocation is None:
            raise errors.JournalCorrupt(f"invocation {row.id} in the journal cannot be read", id=row.id)
        request = await self._journal.request(row.id)
        caller = self._caller(row)
        if row.serial is None:
            await self._wake_in(row, ticket, invocation, request, caller, session=None)
            return
        session, request = await self._enter(caller, request, row.serial)
        try:
            await self._wake_in(row, ticket, invocation, request, caller, session=session)
        except BaseException:
            session.leave()
            raise
        self.sessions.holds.let_go(row.serial)

    async def _wake_in(
        self,
        row: Open,
        ticket: Ticket,
        invocation: Invocation,
        request: Request,
        caller: Caller,
        *,
        session: CallSession | None,
    ) -> None:
        await self._planner.know_image(caller, request)
        policy, made = await off_the_loop(request, self._planner.plan_for, caller, request)
        retries = Retries(policy.spec.retry)
        made = retries.resumed(made, invocation.retried)
        payload = await off_the_loop(request, payload_of, request)
        spool = await anyio.to_thread.run_sync(self._spool_of, invocation, made)
        shape = made.shape
        invocation.policy = DigestRef(name=shape.policy, digest=shape.policy_digest)
        invocation.image = DigestRef(name=shape.image.name, digest=shape.image.digest)
        invocation.plan = made.digest
        invocation.attempts = row.started
        held = Held(self._inputs, caller.uid)
        try:
            held.grow(payload.size)
        except errors.QueueFull:  # it was accepted: what it brings is held all the same
            log.debug("over the room for inputs", id=row.id)
        deadline = None
        if row.deadline is not None and request.deadline is not None:
            deadline = Deadline(time.monotonic() + (row.deadline - now()) / 1e6, request.deadline)
        call = Call(
            invocation,
            caller,
            made,
            payload,
            spool,
            deadline,
            held,
            CallSecrets(self._secrets, shape),
            ticket,
            retries,
            tied=False,
        )
        if session is not None:
            call.join(session)
        call.marked = row.started
        call.decided.set()
        more = made.holds > ticket.memory or made.limits.cpus > ticket.cpus
        ticket.on_grant = call.granted
        if more and ticket.granted:  # its policy has changed: it waits for that much
            self._scheduler.rest(ticket)
            ticket.memory, ticket.cpus = made.holds, made.limits.cpus
            self._scheduler.enqueue(ticket)
        elif not ticket.granted:
            ticket.memory, ticket.cpus = made.holds, made.limits.cpus
        if ticket.granted:
            call.granted()
        self._flying[row.id] = call
        del self._dormant[row.id], self._rows[row.id]
        self._tasks.start_soon(self._run, call)

    async def _refuse(self, id: str, ticket: Ticket, error: errors.SandboxdError) -> None:
        """End a call that what is in force now does not let run."""
        self._scheduler.leave(ticket)
        if isinstance(error, errors.Refused):
            message = f"The call waited while the daemon was restarted, and is refused now: {error}"
            failure = Failure(code=error.code, message=str(error), details=error.details)
            outcome = Outcome(cause=Cause.DENIED, message=message, error=failure)
        else:
            outcome = ours(error.code, str(error))
        if (serial := self._rows[id].serial) is not None:
            self.sessions.holds.let_go(serial)
        try:
            invocation = await self._journal.get(id)
            if invocation is not None:
                await self._close(invocation, outcome, later=True)
        except errors.SandboxdError:  # it stays in the journal, for the next daemon
            log.exception("the outcome could not be written", id=id)
        finally:
            self._dormant.pop(id, None)
            self._rows.pop(id, None)
