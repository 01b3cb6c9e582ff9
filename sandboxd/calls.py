"""Accepted calls, from acceptance to outcome: the middle of the daemon.

Theory of operation.  ``submit`` decides everything that can be decided before anything runs (may this
caller use that policy, does the request fit it, is the image there) and writes the acceptance; from
then on the call belongs to a task of the daemon and not to whoever asked (``runner``).
"""

# ruff: noqa: A002  -- `id` is the field's name on the wire

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.call import Call, off_the_loop, payload_of, request_digest
from sandboxd.journal import records
from sandboxd.journal.spool import Spool
from sandboxd.kernel.tar import Limits as TarLimits
from sandboxd.kernel.tar import check_tar
from sandboxd.ledger import finish, recovered, streams_of
from sandboxd.models import DigestRef, Event, Invocation, State, Times
from sandboxd.network.entrance import Entrance, not_exposed
from sandboxd.outcomes import ours
from sandboxd.planner import Planner
from sandboxd.room import Held
from sandboxd.runner import Runner, now
from sandboxd.supervisor.ending import Deadline
from sandboxd.supervisor.secrets import CallSecrets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import Any

    from sandboxd import plan
    from sandboxd.api.identity import Caller
    from sandboxd.images import ImageStore
    from sandboxd.models import Request
    from sandboxd.pool import Pool
    from sandboxd.reload import PolicyStore
    from sandboxd.room import Room
    from sandboxd.scheduler import Scheduler
    from sandboxd.secrets import SecretStore
    from sandboxd.supervisor.attempt import Payload

__all__ = ["Calls"]

log = structlog.get_logger("sandboxd.calls")


class Calls(Runner):
    """Accepts calls, and acts on those that there are."""

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
        **parts: Any,
    ) -> None:
        """``parts`` are the others of ``Runner``."""
        super().__init__(spools=state / "calls", pool=pool, scheduler=scheduler, **parts)
        self._planner = Planner(policies, images, pool, scheduler, secrets)
        self._inputs = inputs
        self._secrets = secrets
        self._accepting = 0
        self.draining = False

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
        await self._planner.know_image(caller, request)
        _, made = await off_the_loop(request, self._planner.plan_for, caller, request)
        self._scheduler.check_room(caller.uid)
        payload = await off_the_loop(request, payload_of, request)
        held = Held(self._inputs, caller.uid)
        held.grow(payload.size)
        try:
            if payload.tar is not None:
                await anyio.to_thread.run_sync(check_tar, payload.tar, TarLimits(made.limits.workspace_size))
            return await self._accept(caller, request, made, digest=digest, payload=payload, held=held)
        except BaseException:
            held.release()
            raise

    async def _accept(
        self, caller: Caller, request: Request, made: plan.Plan, *, digest: str, payload: Payload, held: Held
    ) -> Invocation:
        accepted = now()
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
        asked = request.deadline
        deadline = None if asked is None else Deadline(time.monotonic() + asked / 1e6, asked)
        limits = made.limits
        spool = Spool.create(self._spools / invocation.id, {"stdout": limits.stdout, "stderr": limits.stderr})
        spool.add(Event(seq=0, at=accepted, type="accepted", id=invocation.id))
        secrets = CallSecrets(self._secrets, made.shape)
        call = Call(invocation, caller, made, payload, spool, deadline, held, secrets)
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

    async def close_interrupted(self) -> int:
        """Give every call that an earlier daemon left in flight its outcome; returns how many."""
        found = await self._journal.in_flight()
        for invocation in found:
            directory = self._spools / invocation.id
            spool = await anyio.to_thread.run_sync(recovered, directory)
            outcome = ours(
                "interrupted", "the daemon ended while the call was in flight; what it did is unknown"
            )
            done = invocation.model_copy(
                update={
                    "state": State.ENDED,
                    "outcome": outcome,
                    **streams_of(spool),
                    "times": invocation.times.model_copy(update={"ended": now()}),
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
