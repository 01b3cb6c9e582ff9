"""A daemon's start with a long queue, and what a step of the queue costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import sandboxes

from sandboxd import models
from sandboxd.journal import Accepted, Journal
from sandboxd.journal.requests import Open, describe
from sandboxd.scheduler import Scheduler, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["queue"]

MEMORY = 64 * 2**20
AT_ONCE = 500  # acceptances that share syncs


def queue(images: Path, calls: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Seconds to the first answer without and with so many calls that wait, and microseconds of a step."""
    found: dict[str, Any] = {"calls": calls, "step_us": _steps(calls)}
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        with sandboxes.start(images, directory=directory) as daemon:
            found["empty_s"] = round(daemon.ready, 2)
        began = time.perf_counter()
        anyio.run(_accept, directory / "state", calls)
        found["accepted_per_s"] = round(calls / (time.perf_counter() - began))
        with sandboxes.start(images, "budget: {slots: 1}\n", directory=directory) as daemon:
            found["start_s"] = round(daemon.ready, 2)
    tell(f"{found}\n")
    return found


def _steps(calls: int) -> dict[str, float]:
    """Microseconds to join a queue of so many, and to have one's turn in it."""
    scheduler = Scheduler(memory=1 << 50, slots=1, queue=calls)
    tickets = [Ticket(number % 10, MEMORY, priority=number % 3) for number in range(calls)]
    began = time.perf_counter()
    for ticket in tickets:
        scheduler.enqueue(ticket)
    joined = time.perf_counter()
    for ticket in tickets:
        scheduler.leave(ticket)
    left = time.perf_counter()
    return {
        "join": round((joined - began) / calls * 1e6, 2),
        "turn": round((left - joined) / calls * 1e6, 2),
    }


async def _accept(state: Path, calls: int) -> None:
    """What a daemon that died left: calls that were accepted and had not started."""
    asked = describe(models.Request(argv=["true"]))
    digest = models.DigestRef(name="default", digest=asked.digest)
    async with Journal.open(state) as journal:

        async def accept() -> None:
            invocation = models.Invocation(
                id=journal.new_id(),
                state=models.State.ACCEPTED,
                caller=models.CallerInfo(uid=0, gid=0, role="operator"),
                policy=digest,
                image=digest,
                plan=asked.digest,
                argv=["true"],
                times=models.Times(accepted=time.time_ns() // 1000),
            )
            waits = Open(invocation.id, 0, tied=0, memory=MEMORY, cpus=1000)
            await journal.accept(Accepted(invocation, asked.digest, asked, waits))

        for _ in range(0, calls, AT_ONCE):
            async with anyio.create_task_group() as tasks:
                for _ in range(AT_ONCE):
                    tasks.start_soon(accept)
