"""The end of every process of a slot, from any process that holds its descriptors."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from sandboxd import errors
from sandboxd.kernel.orphans import reap

if TYPE_CHECKING:
    from sandboxd.engine.base import Slot

__all__ = ["DEATH_TIMEOUT", "kill"]

DEATH_TIMEOUT = 30.0  # seconds until a killed container must be gone


async def kill(slot: Slot) -> None:
    """End every process of the slot; its files stay readable. Raises EngineFailed when it does not die."""
    if slot.spares_init:
        try:
            await anyio.to_thread.run_sync(slot.cgroup.kill, slot.init_pid)
        except errors.HostFailed as error:
            raise errors.EngineFailed(f"container {slot.id} did not die: {error}") from error
        return
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(slot.init_pidfd, signal.SIGKILL)
    slot.cgroup.kill_at_once()
    with anyio.move_on_after(DEATH_TIMEOUT) as scope:
        await anyio.wait_readable(slot.init_pidfd)
    if scope.cancelled_caught:
        raise errors.EngineFailed(f"container {slot.id} did not die within {DEATH_TIMEOUT:.0f} s")
    reap(slot.init_pidfd)
