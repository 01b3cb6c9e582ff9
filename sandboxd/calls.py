"""Accepted calls, from acceptance to outcome: the middle of the daemon.

Theory of operation.  ``submit`` decides everything that can be decided before anything runs (may this
caller use that policy, does the request fit it, is the image there) and writes the acceptance; from
then on the call belongs to a task of the daemon and not to whoever asked (``runner``).
"""

# ruff: noqa: A002  -- `id` is the field's name on the wire

from __future__ import annotations

import json
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.call import Call, off_the_loop, payload_of
from sandboxd.journal import records
from sandboxd.journal.requests import Open, Owed, describe
from sandboxd.journal.spool import Spool
from sandboxd.kernel.tar import Limits as TarLimits
from sandboxd.kernel.tar import check_tar
from sandboxd.models import DigestRef, Event, Invocation, State, Times
from sandboxd.network.entrance import Entrance, not_exposed
from sandboxd.recovery import Recovery
from sandboxd.retries import Retries
from sandboxd.room import Held
from sandboxd.runner import now
from sandboxd.scheduler import Ticket
from sandboxd.supervisor.ending import Deadline
from sandboxd.supervisor.secrets import CallSecrets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from sandboxd import plan
    from sandboxd.api.identity import Caller
    from sandboxd.journal.requests import Asked
    from sandboxd.models import Request
    from sandboxd.policy import Policy
    from sandboxd.session import CallSession
    from sandboxd.supervisor.payload import Payload

__all__ = ["Again", "Calls"]

log = structlog.get_logger("sandboxd.calls")


class Again(NamedTuple):
    """What a recorded call ran under: its policy, and its image by digest."""

    policy: Policy | None = None
    image: str | None = None


class Calls(Recovery):
    """Accepts calls, and acts on those that there are."""

    def __init__(self, **parts: Any) -> None:
        """``parts`` are those of ``Recovery``."""
        super().__init__(**parts)
        self._accepting = 0

    async def submit(
        self, caller: Caller, request: Request, *, tied: bool, again: Again | None = None
    ) -> Invocation:
        """Accept a call durably, or return the one that its key stands for.

        ``tied``: whoever asked waits for the answer, and its going away cancels the call. ``again``: what a
        recorded call ran under, to be run again. Raises Refused.
        """
        asked = await off_the_loop(request, describe, request)
        if request.key is not None:
            # before all else: what the key stands for is the answer, whatever has changed since
            existing = await self._journal.find_key(caller.uid, request.key)
            if existing is not None and existing.request_digest == asked.digest:
                found = await self.get(caller, existing.id)
                await self._check_session(caller, request, found)
                return found
            if existing is not None:
                raise await self._journal.conflict(existing, asked)
        if request.callback is not None:
            self.callbacks.check(caller, request.callback)
        if self.draining:
            raise errors.Draining("the daemon finishes what runs and takes nothing new")
        self._accepting += 1
        try:
            accepted = await self._submit(caller, request, asked, tied=tied, again=again)
        finally:
            self._accepting -= 1
        log.info("accepted", id=accepted.id, uid=caller.uid, policy=request.policy, tied=tied)
        return accepted

    async def _check_session(self, caller: Caller, request: Request, found: Invocation) -> None:
        """Raises KeyConflict where another session has got the name since that the request has."""
        if request.session is None or found.session is None:
            return
        with suppress(errors.NotFound):
            now = await self.sessions.id_of(caller, request.session)
            if now != found.session:
                raise errors.KeyConflict(
                    "this key was used before in another session, which had the name "
                    f"{request.session!r} then",
                    id=found.id,
                    differs=[{"field": "session", "before": found.session, "now": now}],
                )

    async def _submit(
        self, caller: Caller, request: Request, asked: Asked, *, tied: bool, again: Again | None
    ) -> Invocation:
        if request.session is None:
            return await self._submit_in(caller, request, asked, None, tied=tied, again=again)
        named = request.policy if "policy" in request.model_fields_set else None
        session, request = await self._enter(caller, request, request.session, named)
        try:
            return await self._submit_in(caller, request, asked, session, tied=tied, again=again)
        except BaseException:
            session.leave()
            raise

    async def _submit_in(
        self,
        caller: Caller,
        request: Request,
        asked: Asked,
        session: CallSession | None,
        *,
        tied: bool,
        again: Again | None,
    ) -> Invocation:
        if again is None:
            await self._planner.know_image(caller, request)
        plan_for = partial(self._planner.plan_for, **(again or Again())._asdict())
        policy, made = await off_the_loop(request, plan_for, caller, request)
        if session is not None:
            session.check(made.shape)
        elif made.shape.kept:
            raise errors.InvalidRequest(
                f"policy {made.shape.policy!r} keeps one container over the calls of a session "
                "(`isolation: session`), and the request names none: add `session`",
                field="session",
            )
        self._scheduler.check_room(caller.uid, caller.queued)
        payload = await off_the_loop(request, payload_of, request)
        held = Held(self._inputs, caller.uid)
        held.grow(payload.size)
        try:
            if payload.tar is not None:
                await anyio.to_thread.run_sync(check_tar, payload.tar, TarLimits(made.limits.workspace_size))
            if asked.large:  # before the acceptance names it
                await anyio.to_thread.run_sync(asked.store, self._blobs)
            prepared = self._prepare(
                caller, request, policy, made, payload=payload, held=held, tied=tied, session=session
            )
            return await self._accept(caller, prepared, asked)
        except BaseException:
            held.release()
            raise

    def _prepare(
        self,
        caller: Caller,
        request: Request,
        policy: Policy,
        made: plan.Plan,
        *,
        payload: Payload,
        held: Held,
        tied: bool,
        session: CallSession | None,
    ) -> Call:
        """A call that is about to be accepted."""
        accepted = now()
        invocation = Invocation(
            id=self._journal.new_id(),
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
        asked = request.deadline
        deadline = None if asked is None else Deadline(time.monotonic() + asked / 1e6, asked)
        limits = made.limits
        spool = Spool.create(self._spools / invocation.id, {"stdout": limits.stdout, "stderr": limits.stderr})
        spool.add(Event(seq=0, at=accepted, type="accepted", id=invocation.id))
        ticket = Ticket(
            caller.uid,
            made.holds,
            cpus=limits.cpus,
            priority=request.priority or 0,
            serial=None if session is None else session.row.id,
            concurrent=caller.concurrent,
            weight=caller.weight,
        )
        secrets = CallSecrets(self._secrets, made.shape)
        retries = Retries(policy.spec.retry)
        call = Call(
            invocation, caller, made, payload, spool, deadline, held, secrets, ticket, retries, tied=tied
        )
        if session is not None:
            call.join(session)
        ticket.on_grant = call.granted
        call.told = request.callback
        return call

    async def _accept(self, caller: Caller, call: Call, asked: Asked) -> Invocation:
        """Write the acceptance, while all is made ready.

        A call that has its turn at once is accepted as started: a later daemon takes it for one that may have
        run, and no second sync is needed to say so.
        """
        invocation, ticket, told = call.invocation, call.ticket, call.told
        self._scheduler.enqueue(ticket)
        call.marked = int(ticket.granted)
        accepted = records.Accepted(
            invocation,
            asked.digest,
            asked,
            Open(
                id=invocation.id,
                uid=caller.uid,
                gid=caller.gid,
                groups=json.dumps(sorted(caller.groups)),
                tied=call.tied,
                started=call.marked,
                memory=ticket.memory,
                cpus=ticket.cpus,
                priority=ticket.priority,
                serial=ticket.serial,
                deadline=None if call.deadline is None else invocation.times.accepted + call.deadline.asked,
            ),
            told,
        )
        self._tasks.start_soon(self._run, call)  # makes ready while the disk writes
        try:
            existing = await self._journal.accept(accepted)
        except BaseException:
            call.refuse()
            raise
        if existing is not None:
            call.refuse()
            call.held.release()
            return await self.get(caller, existing.id)
        self._flying[invocation.id] = call
        if told is not None:
            self.callbacks.owe(
                Owed(
                    invocation.id, caller.uid, caller.gid, tuple(sorted(caller.groups)), told.unix, told.exec
                )
            )
        call.decided.set()
        if self.draining and not call.tied and not ticket.granted:
            call.shelve()
        return invocation

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

    async def session_entrance(self, caller: Caller, named: str) -> Entrance:
        """The way to the servers in the container of a session: that of what runs in it now.

        Raises NotFound, SessionIdle, PortNotExposed.
        """
        session = await self.sessions.id_of(caller, named)
        if session not in self._entrances.sessions:
            raise errors.SessionIdle(
                f"no call runs in session {named!r} now; its ports are there while one does", session=session
            )
        entrance = self._entrances.sessions[session]
        if entrance is None:
            raise not_exposed(())
        return entrance

    async def write_stdin(
        self, caller: Caller, id: str, *, offset: int, chunks: AsyncIterator[bytes], eof: bool
    ) -> int:
        """Write to a call that was asked for with ``stdin: stream``; returns the new offset.

        Of one that has ended, the last offset where all that is sent was taken: its answer was lost.
        Raises NotFound, StateConflict.
        """
        call = await self._find(caller, id)
        if not isinstance(call, Call):
            return await _taken(call, offset, chunks)
        if call.plan.command.stdin != "stream":
            raise errors.StateConflict("the request did not ask for `stdin: stream`")
        async for chunk in chunks:
            await _write(call, offset, chunk)
            offset += len(chunk)  # not where the stream stands: what was sent before may be sent again
        if offset > call.stdin.offset:  # nothing came, and it is said to belong beyond what is missing
            await _write(call, offset, b"")
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
        """Wait until every call has ended, also those that are being accepted now, if it can be recorded."""
        while self._accepting or not all(call.answered.is_set() for call in self._flying.values()):
            if waiting := [call for call in self._flying.values() if not call.answered.is_set()]:
                await waiting[0].answered.wait()
            else:
                await anyio.sleep(0.001)

    def drain(self) -> None:
        """Take nothing new, and leave to the next daemon what has not started and nobody here waits for."""
        self.draining = True
        for ticket in self._dormant.values():
            self._scheduler.leave(ticket)
        for call in list(self._flying.values()):
            waits = call.attempt is None and not call.ticket.granted
            if waits and not call.tied and not call.cancelled:
                call.shelve()

    def cancel_all(self) -> None:
        """Cancel every call in flight."""
        for call in self._flying.values():
            call.cancel()


async def _taken(done: Invocation, offset: int, chunks: AsyncIterator[bytes]) -> int:
    """Where the input of an ended call stands, if it took all that is sent again. Raises CallEnded."""
    taken = done.stdin_taken
    if taken is None:
        raise errors.CallEnded(f"call {done.id!r} has ended")
    async for chunk in chunks:
        offset += len(chunk)
        if offset > taken:
            break
    if offset > taken:
        raise errors.CallEnded(f"call {done.id!r} has ended; it took {taken} bytes of input", offset=taken)
    return taken


async def _write(call: Call, offset: int, chunk: bytes) -> None:
    """Write to the standard input that the call has: one that nothing was written to may be replaced."""
    while True:
        stdin = call.stdin
        try:
            await stdin.write(offset, chunk)
        except errors.StateConflict:
            if call.stdin is stdin:
                raise
        else:
            return
