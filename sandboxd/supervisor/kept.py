"""A container that a session keeps over its calls, and what is left in it of those that have ended.

Theory of operation.  Each call has a process of its own that PID 1 parks for it, as it parked the first: with
the tool's ids, no capability, and a filter whose listener is the call's alone. It is put into a part of the
container's cgroup, so that its descendants can be told from everybody else's, and ended apart. What it leaves
running keeps its filter, which is answered until the last of it is gone; its output pipes are drained.

While files are put in, collected or checkpointed, the whole container is frozen: nobody in it can change what
is looked at.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from sandboxd import errors
from sandboxd.engine.oci import tool_setup
from sandboxd.init.protocol import Exited
from sandboxd.kernel import pidfd
from sandboxd.supervisor.drain import Drain
from sandboxd.supervisor.ending import Ended, Lost, Stopped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AsyncExitStack

    from sandboxd.engine.base import Slot
    from sandboxd.init.protocol import Report
    from sandboxd.kernel.cgroup_part import Part
    from sandboxd.kernel.notify import Listener
    from sandboxd.models import ContainerUse, Outcome
    from sandboxd.network.entrance import Entrance
    from sandboxd.supervisor.ending import Ending
    from sandboxd.supervisor.meter import Meter

__all__ = ["FAULT", "Kept", "told"]

FAULT = "the call failed by a fault of the daemon's"
SOON = 2.0  # seconds until PID 1 has said that a process has ended which did
PARK_TIMEOUT = 10.0  # seconds for PID 1 to park a process


@dataclass
class _Left:
    """Of a call: its processes, and who answers their filter; None where that is the slot's own."""

    part: Part
    listener: Listener | None
    told: int | None = None
    """How many denied system calls its call has told of; None while it runs."""


def told(outcome: Outcome, use: ContainerUse | None) -> Outcome:
    """An outcome that says where more has ended than the call, or where it found less than it may expect."""
    said = ""
    if use is not None and use.lost is not None:
        said += (
            f" The session had lost the container of call {use.lost.since} before ({use.lost.why}): this "
            "call began with the session's checkpoint."
        )
    if use is not None and use.ended is not None:
        said += f" The container that its session kept since call {use.since} ended with it: {use.ended}."
        if use.number > 1:
            said += (
                f" What its {use.number} calls had changed is gone but for what the session's checkpoint "
                "has; `sandboxd session checkpoint` between calls keeps what they did."
            )
        else:
            said += " What was changed in it is gone."
    return outcome.model_copy(update={"message": outcome.message + said}) if said else outcome


class Kept:
    """One such container. For one event loop; calls come one at a time. ``close`` takes it away."""

    def __init__(self, slot: Slot, since: str) -> None:
        """``since`` is the call that it was made for."""
        self.slot = slot
        self.since = since
        self.started = time.time_ns() // 1000
        self.born = time.monotonic()
        self.last = since
        """The call that ended in it last."""
        self.calls = 0
        self.ended: str | None = None
        """Why it is to be used no more."""
        self.way: Entrance | None = None
        """To the servers inside, for whoever has the session."""
        self._stack: AsyncExitStack | None = None
        self._left: list[_Left] = []
        self._gone = 0
        self._drain = Drain()

    @property
    def fresh(self) -> bool:
        """Whether no call was in it before the present one."""
        return self.calls <= 1

    def own(self, stack: AsyncExitStack) -> None:
        """Have what it is made of, which ``close`` takes away."""
        self._stack = stack

    @property
    def dead(self) -> bool:
        """Whether its PID 1 has ended, and so all that was in it has."""
        return pidfd.ended(self.slot.init_pidfd)

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        return self.ended is None and not self.dead

    async def died(self) -> bool:
        """Whether it is ``dead``, where that may show in a moment."""
        with anyio.move_on_after(SOON):
            await anyio.wait_readable(self.slot.init_pidfd)
        return self.dead

    async def admit(self) -> Slot:
        """The slot for a call: its process is parked, and in a part of its own.

        Raises EngineFailed, HostFailed, ControlNotEnforced.
        """
        self.calls += 1
        return await anyio.to_thread.run_sync(self._admit)

    def _admit(self) -> Slot:
        self._sweep()
        slot = self.slot
        if self.calls > 1:
            listener, process = slot.control.park(tool_setup(slot.shape), PARK_TIMEOUT)
            with ExitStack() as stack:
                stack.callback(os.close, process)
                served = slot.listener.another(listener)
                stack.callback(served.close)
                try:
                    pid = pidfd.number_of(process)
                except ProcessLookupError as error:
                    raise errors.EngineFailed(f"the parked process ended at once: {error}") from error
                # what the engine made and read of the first is not of this one
                slot = replace(slot, tool_pid=pid, listener=served, reading=None, warm=False, shared=True)
                part = self._part(pid)
                stack.pop_all()
                os.close(process)
            self._left.append(_Left(part, served))
            return slot
        self._left.append(_Left(self._part(slot.tool_pid), None))
        return slot

    def _part(self, pid: int) -> Part:
        part = self.slot.cgroup.part(f"call-{self.calls}")
        part.join(pid)
        return part

    def _sweep(self) -> None:
        """Let go of what is left of calls of which nobody is left."""
        for left in list(self._left):
            if not left.part.processes() and left.part.remove():
                self._left.remove(left)
                self._gone += 0 if left.told is None else self._denied(left) - left.told
                if left.listener is not None:
                    left.listener.close()

    async def stop(self) -> bool:
        """End every process of the present call, and no other; whether that could be done."""
        try:
            await anyio.to_thread.run_sync(self._left[-1].part.kill)
        except errors.AttemptFailed:
            return False
        return True

    async def settle(self, ending: Ending, meter: Meter, reaped: anyio.Event) -> None:
        """End what has to end with the call; ``ended`` says where that cannot be told from the rest.

        ``reaped`` is set once PID 1 has said that the call's process has ended.
        """
        if isinstance(ending, Lost):
            self.ended = f"its PID 1 was lost: {ending.reason}"
            return
        stopped = isinstance(ending, Stopped)
        stopped = stopped or (isinstance(ending, Ended) and ending.status != 0 and meter.oom_kills() > 0)
        if stopped and not await self.stop():
            self.ended = "the call's processes could not be ended apart from the others"
            return
        with anyio.move_on_after(SOON):
            await reaped.wait()
        if not reaped.is_set():
            self.ended = "PID 1 did not say that the call's process had ended"

    async def withdraw(self) -> bool:
        """The present call is not to run, and its process ends; whether all is well then."""
        reaped = anyio.Event()

        def hear(report: Report) -> None:
            if isinstance(report, Exited):
                reaped.set()

        with self.slot.control.heard(hear):
            if await self.stop():
                with anyio.move_on_after(SOON):
                    await reaped.wait()
        return reaped.is_set()

    def rest(self, call: str) -> None:
        """The present call has ended, and has told what it has to tell."""
        self.last = call
        self._left[-1].told = self._denied(self._left[-1])

    @property
    def denied(self) -> int:
        """System calls that were denied to what calls left, after they had ended."""
        ended = ((left, left.told) for left in self._left)
        return self._gone + sum(self._denied(left) - told for left, told in ended if told is not None)

    def _denied(self, left: _Left) -> int:
        listener = left.listener or self.slot.listener
        return sum(one.count for one in listener.counts())

    def drain(self, pipe: int | None) -> None:
        """Have the output pipe of a call that has ended, which others may still hold."""
        self._drain.take(pipe)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nobody in it changes its files within the block, which is in a thread. Raises HostFailed."""
        if self.dead:  # an engine may have removed its cgroup
            yield
            return
        with self.slot.cgroup.frozen():
            yield

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Nothing in it runs within the block. Raises HostFailed."""
        with ExitStack() as stack:
            await anyio.to_thread.run_sync(stack.enter_context, self.slot.cgroup.frozen())
            yield

    async def close(self) -> None:
        """End everything in it and take it away. Safe to call twice; raises what the engine raises."""
        stack, self._stack = self._stack, None
        self._drain.close()
        try:
            if self.way is not None:
                with anyio.CancelScope(shield=True):
                    await self.way.end()
            if stack is not None:
                with anyio.CancelScope(shield=True):
                    await stack.aclose()
        finally:
            for left in self._left:
                if left.listener is not None:
                    with suppress(OSError):
                        left.listener.close()
            self._left.clear()
