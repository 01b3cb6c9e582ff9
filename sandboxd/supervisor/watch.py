"""What watches a call at once: PID 1, the wall clock, the CPU clock, an output cap, and whoever cancels.

The first that speaks decides how the call ended; a fault of ours counts before that, whenever it comes, since
what is known of the call is then not whole.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import anyio

from sandboxd import errors
from sandboxd.init.protocol import Alone, ExecFailed, Exited, Gone, Started
from sandboxd.supervisor.ending import CommandFailed, Ended, Lost, Stopped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sandboxd.init.protocol import Report
    from sandboxd.supervisor.ending import Deadline, Ending
    from sandboxd.supervisor.meter import Meter

__all__ = ["Watch", "refused"]

CPU_POLL_MIN = 0.01  # seconds


def refused(error: OSError) -> errors.HostFailed:
    """What the host said, without the paths that are in it."""
    return errors.HostFailed(
        f"the host refused what the call needs: {error.strerror or type(error).__name__}"
    )


class Watch:
    """Of one attempt. For one event loop."""

    def __init__(self) -> None:
        self.ending: Ending | None = None
        """What decided."""
        self.fault: errors.AttemptFailed | None = None
        self.reaped = anyio.Event()
        """PID 1 has said that the command's process has ended."""
        self.alone = anyio.Event()
        """PID 1 has said that nothing is left of the command."""
        self._started = False
        self._over = anyio.Event()

    def end(self, ending: Ending) -> None:
        """End the call so, unless it has ended."""
        if self.ending is None:
            self.ending = ending
            self._over.set()

    def break_off(self, fault: errors.AttemptFailed) -> None:
        """End the call for a fault of ours, whatever else ended it."""
        if self.fault is None:
            self.fault = fault
            self._over.set()

    def hear(self, report: Report) -> None:
        """What PID 1 says."""
        match report:
            case Started():
                self._started = True
            case ExecFailed(number):
                self.end(CommandFailed(number))
            case Exited(status):
                self.reaped.set()
                if report.alone:
                    self.alone.set()
                self.end(Ended(status) if self._started else Lost("the parked process ended"))
            case Alone():
                self.alone.set()
            case Gone(reason):
                self.end(Lost(reason))

    def clock(self, begun: float, wall: int, deadline: Deadline | None) -> asyncio.TimerHandle:
        """End the call ``wall`` µs after it began; a timer and not a task, since every call has one."""
        at, why = begun + wall / 1e6, Stopped("wall")
        if deadline is not None and deadline.at < at:
            at, why = deadline.at, Stopped("deadline")
        left = max(0.0, at - time.monotonic())
        return asyncio.get_running_loop().call_later(left, self.end, why)

    async def cpu(self, meter: Meter, limit: int, cpus: int) -> None:
        """End the call once it has used ``limit`` µs of so many thousandths of a CPU."""
        fastest = min(cpus / 1000, os.cpu_count() or 1)  # CPU seconds that can be used in a second
        while (left := limit - meter.cpu()) > 0:  # noqa: ASYNC110  (no event tells)
            await anyio.sleep(max(CPU_POLL_MIN, left / 1e6 / fastest))
        self.end(Stopped("cpu_time"))

    async def over(self, *others: Callable[[], Awaitable[None]]) -> None:
        """Wait for the end of the call; ``others`` watch for it meanwhile."""
        if not others:
            await self._over.wait()
            return
        async with anyio.create_task_group() as watchers:
            for watch in others:
                watchers.start_soon(self._guarded, watch)
            await self._over.wait()
            watchers.cancel_scope.cancel()

    async def _guarded(self, watch: Callable[[], Awaitable[None]]) -> None:
        """A watcher whose fault ends the call, and not the daemon."""
        try:
            await watch()
        except errors.AttemptFailed as error:
            self.break_off(error)
        except OSError as error:
            self.break_off(refused(error))
