"""Has a slot's parked process become the shape's interpreter, whichever engine made the slot."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from sandboxd import errors
from sandboxd.engine.parking import parked_process
from sandboxd.init import warm as warming

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sandboxd.engine.base import Slot
    from sandboxd.engine.warming import Warming
    from sandboxd.plan import Warm

__all__ = ["with_interpreter"]

WARM_TIMEOUT = 20.0  # seconds for an interpreter and its modules


async def with_interpreter(
    slot: Slot,
    warming: Warming,
    *,
    destroy: Callable[[Slot], Awaitable[None]],
    again: Callable[[], Awaitable[Slot]],
) -> Slot:
    """The slot with its shape's interpreter ready, if it has one that is due; else, made ``again``, without.

    Raises what those two raise.
    """
    warm = slot.shape.warm
    if warm is None or not warming.due(slot.shape):
        return slot
    try:
        wrong = await _start_interpreter(slot, warm)
    except BaseException:
        await destroy(slot)
        raise
    if wrong is None:
        return replace(slot, warm=True)
    warming.failed(slot.shape, wrong)
    await destroy(slot)
    return await again()


async def _start_interpreter(slot: Slot, warm: Warm) -> str | None:
    """What is wrong with it, if anything. A thread waits for its word; cancelled, it ends with PID 1."""
    heard = anyio.Event()

    async def end_if_cancelled() -> None:
        try:
            await heard.wait()
        except anyio.get_cancelled_exc_class():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(slot.init_pidfd, signal.SIGKILL)
            raise

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end_if_cancelled)
        try:
            wrong = await anyio.to_thread.run_sync(_start, slot, warm)
        finally:
            heard.set()
    return wrong


def _start(slot: Slot, warm: Warm) -> str | None:
    try:
        said = warming.start(slot.control, warm, WARM_TIMEOUT)
        if said != warming.READY:
            return said
        if parked_process(slot.cgroup, slot.init_pid) != slot.tool_pid:
            return "the interpreter is another process than the one that was parked"
    except (errors.AttemptFailed, OSError) as error:
        return str(error)
    return None
