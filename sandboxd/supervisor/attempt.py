"""One attempt of one call: from a parked slot to a result.

Theory of operation.  The slot is made or given, the inputs are put into its workspace, the request's
narrowing into its cgroup, and the receipt is read; only then is the command handed over. From there
it is watched (``Watch``), until the first that speaks has decided how the call ended. Then everything
that the tool made is killed, by PID 1 when the command has ended, else with PID 1; that ends the pipes, so
the streams can be read to their end; then the counters are read, the outcome classified, artifacts
collected, and the slot destroyed.

In a container that its session keeps, a command that has ended leaves what it likes: its pipes are read as
far as they were written by then. Where we end the command, all that descends from it is killed, and nothing
else. Whatever goes wrong beyond that ends the container, and the outcome says so.

A fault of ours is an ``AttemptFailed`` and becomes the outcome ``failed``; it never escapes ``run``.
"""

from __future__ import annotations

import base64
import os
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

import anyio
import anyio.to_thread

from sandboxd import artifacts, errors
from sandboxd import receipt as receipts
from sandboxd.engine.oci import cgroup_limits
from sandboxd.init.warm import serves
from sandboxd.models import Event, LimitReached
from sandboxd.supervisor import network
from sandboxd.supervisor.ending import CommandFailed, Ended, Evidence, Lost, Stopped, classify
from sandboxd.supervisor.ending import limits_reached as reached
from sandboxd.supervisor.kept import FAULT, told
from sandboxd.supervisor.meter import Meter
from sandboxd.supervisor.output import Output
from sandboxd.supervisor.result import Result, denied, failed, not_kept, withdrawn
from sandboxd.supervisor.watch import Watch, refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sandboxd.blobs import BlobStore
    from sandboxd.engine.base import Slot
    from sandboxd.journal.spool import Spool
    from sandboxd.keeping import Seat
    from sandboxd.models import NetworkUse, Receipt
    from sandboxd.plan import Plan
    from sandboxd.pool import Pool
    from sandboxd.session import CallSession
    from sandboxd.supervisor.ending import Deadline, Ending
    from sandboxd.supervisor.kept import Kept
    from sandboxd.supervisor.network import CallNetwork
    from sandboxd.supervisor.payload import Payload
    from sandboxd.supervisor.secrets import CallSecrets
    from sandboxd.supervisor.streams import Stdin

__all__ = ["Attempt"]

GRACE = 30_000_000  # microseconds after the wall limit until PID 1 ends by itself
UNFIT = (
    errors.TooLarge, errors.InvalidRequest,
    errors.SecretMissing, errors.SecretsUnavailable, errors.SecretUnfit,
)  # fmt: skip
"""What keeps a call from running, and says nothing of its container: its inputs or its secrets."""
SOON = 2.0  # seconds that PID 1 gets to end what the command left behind, before it is ended with it


class Attempt:
    """Runs once. ``cancel``, ``signal`` and its ``Stdin`` may be used from other tasks meanwhile."""

    def __init__(
        self,
        plan: Plan,
        payload: Payload,
        *,
        stdin: Stdin,
        pool: Pool,
        spool: Spool,
        network: CallNetwork,
        secrets: CallSecrets,
        session: CallSession | None,
        seat: Seat | None = None,
        blobs: BlobStore,
        deadline: Deadline | None,
        accepted: anyio.Event,
        on_state: Callable[[Literal["running", "collecting"]], None],
    ) -> None:
        """``deadline`` is that of the call as a whole. Nothing is handed over before ``accepted`` is set.

        ``session`` has its turn for the call, where the call has one; with a ``seat`` its container is kept.
        """
        self._plan = plan
        self._payload = payload
        self._pool = pool
        self._spool = spool
        self._network = network
        self._secrets = secrets
        self._session = session
        self._seat = seat
        self._kept: Kept | None = None
        self._blobs = blobs
        self._deadline = deadline
        self._accepted = accepted
        self._on_state = on_state
        self._watch = Watch()
        self._output = Output(spool, self._watch, kills=plan.limits.on_output == "kill")
        self._slot: Slot | None = None
        self._handed_over = 0.0
        self._running = False
        self.signalled = False
        """Whether somebody sent a signal to the command."""
        self._stdin = stdin
        self._stack = AsyncExitStack()
        self._container = AsyncExitStack()
        self._result = Result(failed(errors.Interrupted("the daemon stopped")))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Destroy the slot, whose processes but PID 1 are all dead when ``run`` has returned."""
        await self._stack.aclose()

    @property
    def handed_over(self) -> bool:
        """Whether the command was given to the container, and so may have done something."""
        return bool(self._handed_over)

    def cancel(self) -> None:
        """End the call with the outcome ``cancelled``, unless it has ended."""
        self._watch.end(Stopped("cancelled"))

    async def signal(self, number: int) -> None:
        """Send a signal to the tool's process group. Raises StateConflict when nothing runs."""
        if self._slot is None or not self._running or self._watch.ending is not None:
            raise errors.StateConflict("the call is not running; a signal needs a running command")
        self.signalled = True
        await self._slot.control.signal(number)

    async def run(self) -> Result:
        """Run to the end, when all that the tool made is dead; raises only if its task is cancelled."""
        result = self._result
        try:
            if not await self._try(waiting=True):
                await self._try(waiting=False)
        except errors.SecretMissing as error:
            result.outcome = withdrawn(error)
        except (errors.AttemptFailed, *UNFIT) as error:
            result.outcome = failed(error)
        except (errors.ContainerLive, errors.QuotaExceeded) as error:
            result.outcome = denied(error)
        except OSError as error:
            result.outcome = failed(refused(error))
        finally:
            self._stdin.close()
        if self._seat is not None:
            result.container = self._seat.use
            result.outcome = told(result.outcome, result.container)
        result.outcome = self._secrets.outcome(result.outcome)
        return result

    async def _try(self, *, waiting: bool) -> bool:
        """Run in one slot; False when it had waited and is no longer as it was: another may have the call."""
        plan, seat = self._plan, self._seat
        if seat is not None and (kept := await seat.admit()) is not None:
            await self._try_in(seat, kept)
            return True
        # one that is kept lives long: it is made for its first call, and takes no other's place
        waiting = waiting and seat is None
        slot = self._slot = await self._pool.create(plan.shape, waiting=waiting, memory=plan.limits.memory)
        await self._stack.enter_async_context(self._container)
        self._container.push_async_callback(self._pool.destroy, slot)
        if seat is not None:
            self._kept = seat.made(slot)
            await self._try_in(seat, self._kept)
            return True
        try:
            self._result.receipt = receipt = await self._prepare(slot)
            await self._use(slot, receipt)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._pool.kill(slot)
            untouched = isinstance(error, errors.ControlNotEnforced) and not self._handed_over
            if waiting and untouched and slot.reading is not None:
                await self._pool.destroy(slot)
                return False
            raise
        return True

    async def _try_in(self, seat: Seat, kept: Kept) -> None:
        """Run in a container that is kept afterwards, if nothing is wrong with it then."""
        self._kept = kept
        try:
            slot = self._slot = await kept.admit()
            self._result.receipt = receipt = await self._prepare(slot)
            await self._use(slot, receipt)
            if kept.ended is None:
                seat.keep(self._container)
            else:
                await seat.end(kept.ended)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._leave(seat, kept, error)
            raise

    async def _leave(self, seat: Seat, kept: Kept, error: BaseException) -> None:
        """The call failed: its container is of no more use, unless nothing but the call was at fault.

        One that had died before the call ran stays for its files, which are those of other calls.
        """
        untouched = not self._handed_over and not kept.fresh
        if untouched and isinstance(error, UNFIT) and await kept.withdraw():
            seat.keep(self._container)
            return
        if untouched and (kept.dead or (isinstance(error, errors.EngineFailed) and await kept.died())):
            seat.leave()
            return
        try:
            await self._pool.kill(kept.slot)
        finally:
            said = isinstance(error, errors.SandboxdError)
            await seat.end(f"the call failed: {error}" if said else FAULT)

    async def _prepare(self, slot: Slot) -> Receipt:
        if self._session is not None and not slot.shared:
            files_of = self._container.enter_context(ExitStack())
            await anyio.to_thread.run_sync(self._session.attach, slot, files_of)
        if self._payload.has_files:
            async with self._still():
                await anyio.to_thread.run_sync(self._payload.fill, slot)
        limits = self._plan.limits
        if limits != self._plan.shape.limits:
            # io is in force already, and cannot be narrowed
            slot.cgroup.set(cgroup_limits(replace(limits, io_read=None, io_write=None), None))
        receipt = None if slot.reading is None else slot.reading.again(limits)
        if receipt is None and (
            slot.warm or slot.shared
        ):  # the process may be anybody's, and take long to be read in full
            receipt = await anyio.to_thread.run_sync(receipts.read_receipt, slot, limits)
        elif receipt is None:
            receipt = receipts.read_receipt(slot, limits)
        receipts.check(receipt)
        return receipt

    async def _use(self, slot: Slot, receipt: Receipt) -> None:
        tmp = os.open(f"/proc/{slot.tool_pid}/root/tmp", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stack.callback(os.close, tmp)
        self._stack.push_async_callback(self._network.end)
        meter, ending, wall = await self._supervise(slot, receipt)
        self._on_state("collecting")
        await self._network.begin_end()
        try:
            evidence = meter.evidence(tmp, self._output.dropped)
            used = await self._network.end()
            if self._kept is not None and slot.doors is not None and slot.doors.closed:
                self._kept.ended = "its network is not served any more"
                await self._pool.kill(slot)
            if self._network.fault is not None:
                raise self._network.fault
            self._result.usage = meter.usage(wall=wall, network=used, **self._output.written)
        except errors.HostFailed as error:
            if isinstance(ending, Lost):  # an engine may have removed the cgroup with it
                raise errors.EngineFailed(f"the container's PID 1 was lost: {ending.reason}") from error
            raise
        self._result.denials = self._secrets.denials(meter.denials() + network.denials(used))
        self._report(slot, ending, evidence, used, self._result)
        if not isinstance(ending, CommandFailed) and self._plan.artifacts:
            async with self._still():
                await self._collect(slot, self._result)
        if self._seat is None and self._session is not None and self._session.keeps(self._result.outcome):
            await self._keep(slot, self._session, self._result)

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        """Nothing changes the files of the call's container within the block."""
        kept = self._kept
        if kept is None or kept.ended is not None or (kept.fresh and not self._handed_over):
            yield
            return
        async with kept.frozen():
            yield

    async def _keep(self, slot: Slot, session: CallSession, result: Result) -> None:
        """Keep what the command changed of its session's files; all that it began is dead."""
        try:
            await anyio.to_thread.run_sync(session.keep, slot)
        except (errors.QuotaExceeded, errors.WorkspaceUnfit) as error:
            result.outcome = not_kept(error, result.outcome)
            if isinstance(error, errors.QuotaExceeded):
                quota = error.details
                result.limits_reached.append(LimitReached(limit=quota["quota"], value=quota["allowed"]))

    async def _supervise(self, slot: Slot, receipt: Receipt) -> tuple[Meter, Ending, int]:
        owner = slot.shape.process
        ids = slot.id_base + owner.uid, slot.id_base + owner.gid
        output, watch, limits = self._output, self._watch, self._plan.limits
        self._stack.callback(output.close)
        output.open(*ids)
        meter = Meter(slot)
        stdin = self._open_stdin(ids)
        with slot.control.heard(watch.hear):
            try:
                await self._accepted.wait()
                if self._deadline is not None and time.monotonic() >= self._deadline.at:
                    watch.end(Stopped("deadline"))
                if watch.ending is None:
                    receipt = await self._give_secrets(slot, receipt)
                    await self._hand_over(slot, [stdin, *output.inner])
                    receipt.digest()  # its record needs it, and the command has only begun
            finally:
                os.close(stdin)
                output.handed_over()
            wall = watch.clock(self._handed_over, limits.wall, self._deadline)
            self._stack.callback(wall.cancel)
            others: list[Callable[[], Awaitable[None]]] = []
            if limits.cpu_time is not None:
                others.append(partial(watch.cpu, meter, limits.cpu_time, limits.cpus))
            if self._payload.stdin is not None:
                others.append(partial(self._feed, self._payload.stdin))
            await watch.over(*others)
            wall.cancel()
            ended = time.monotonic()
            await self._end_what_is_left(slot, meter)
        await output.finish(self._kept)
        if watch.fault is not None:
            raise watch.fault
        assert watch.ending is not None  # noqa: S101  (that is what over means)
        return meter, watch.ending, int((ended - self._handed_over) * 1e6) if self._handed_over else 0

    async def _give_secrets(self, slot: Slot, receipt: Receipt) -> Receipt:
        """Take the call's secrets and write those that are files; the receipt then speaks of them too."""
        await self._secrets.take()
        if self._secrets.redactor is None:
            return receipt
        self._output.redact(self._secrets.redactor)
        if more := self._secrets.put(slot):
            receipt = receipt.model_copy(update={"controls": [*receipt.controls, *more]})
            self._result.receipt = receipt
            receipts.check(receipt)
        return receipt

    async def _hand_over(self, slot: Slot, stdio: list[int]) -> None:
        command = self._plan.command
        argv = [_decode(item) for item in command.argv]
        waiting = slot.shape.warm if slot.warm else None
        env = [f"{key}={value}".encode() for key, value in command.env.items()]
        env += self._secrets.environment()
        named = {**command.env, **dict.fromkeys(slot.shape.granted("env"), "")}
        slot.listener.reset()  # what was denied before was not the command's
        await self._network.begin(slot, self._kept)
        self._handed_over = time.monotonic()
        await slot.control.execute(
            argv,
            env,
            command.cwd.encode(),
            self._plan.limits.wall + GRACE,
            stdio,
            warm=waiting is not None and serves(waiting, argv, named),
        )
        self._running = True  # not before: a signal's frame must not come amid the command's
        self._on_state("running")

    def _open_stdin(self, ids: tuple[int, int]) -> int:
        if self._plan.command.stdin == "none":
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return self._stdin.open(*ids)

    async def _feed(self, data: bytes) -> None:
        await self._stdin.write(0, data)
        await self._stdin.finish()

    async def _end_what_is_left(self, slot: Slot, meter: Meter) -> None:
        kept, watch = self._kept, self._watch
        if kept is not None:
            if watch.fault is not None:
                kept.ended = FAULT
            elif watch.ending is not None:
                await kept.settle(watch.ending, meter, watch.reaped)
            if kept.ended is not None:
                await self._pool.kill(slot)
        elif not watch.alone.is_set() and not await self._left_alone(slot):
            await self._pool.kill(slot)

    async def _left_alone(self, slot: Slot) -> bool:
        """Wait for PID 1's word that the rest is dead, where it kills it; False: that is for us to do."""
        watch = self._watch
        if watch.fault is not None or not isinstance(watch.ending, Ended):
            return False
        slot.cgroup.thaw_and_unthrottle()
        with anyio.move_on_after(SOON):
            await watch.alone.wait()
        return watch.alone.is_set()

    def _report(
        self, slot: Slot, ending: Ending, evidence: Evidence, used: NetworkUse, result: Result
    ) -> None:
        argv0 = _decode(self._plan.command.argv[0]).decode(errors="backslashreplace")
        outcome = classify(ending, evidence, self._plan.limits, argv0, self._deadline)
        result.limits_reached = reached(ending, evidence, self._plan.limits, self._deadline)
        result.limits_reached += network.limits(used, slot.shape.network)
        for denial in result.denials:
            self._spool.add(Event(seq=0, at=0, type="denied", denial=denial))
        for limit in result.limits_reached:
            self._spool.add(Event(seq=0, at=0, type="limit", limit=limit))
        if outcome is None:
            reason = ending.reason if isinstance(ending, Lost) else "no report"
            raise errors.EngineFailed(f"the container's PID 1 was lost: {reason}")
        result.outcome = outcome

    async def _collect(self, slot: Slot, result: Result) -> None:
        plan = self._plan
        result.artifacts, result.withheld = await anyio.to_thread.run_sync(
            # on disk before the outcome names them
            partial(artifacts.collect, durable=True, redactor=self._secrets.redactor),
            slot.workspace_fd,
            plan.artifacts,
            plan.narrowed_artifacts,
            self._blobs,
        )
        result.artifacts = self._secrets.artifacts(result.artifacts)
        result.withheld = self._secrets.withheld(result.withheld)


def _decode(item: dict[str, str]) -> bytes:
    if "base64" in item:
        return base64.b64decode(item["base64"])
    return item["text"].encode()
