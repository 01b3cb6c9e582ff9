"""Calls in a container that a session keeps, without one: a directory is all that there is of it.

``kept_call`` does what ``runner`` and ``supervisor`` do with such a call, in the same order.
"""

from __future__ import annotations

import os
import stat
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import anyio.to_thread
from invocations import DIGEST, call, ended
from sessioncalls import CALLER

from sandboxd.config import SessionShare
from sandboxd.journal import Accepted, outcome_header
from sandboxd.scheduler import Scheduler, Ticket
from sandboxd.supervisor.kept import Kept
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sessioncalls import Served

    from sandboxd import models
    from sandboxd.engine.base import Slot
    from sandboxd.keeping import Live
    from sandboxd.plan import Plan

__all__ = ["Bare", "kept_call", "live_of", "scheduler"]

KEEPER = replace(CALLER, sessions=SessionShare(containers=1000))
MEMORY = 1 << 20
PLAN = cast(
    "Plan",
    SimpleNamespace(
        shape=SimpleNamespace(kept=True, digest=DIGEST, policy="live"),
        commit="exited",
        holds=MEMORY,
        limits=SimpleNamespace(cpus=0),
    ),
)


def scheduler() -> Scheduler:
    """One with room for any number of them."""
    return Scheduler(memory=1 << 40, slots=10_000, queue=1000)


class Bare(Kept):
    """A container of which there is nothing but its files."""

    def __init__(self, path: Path, fd: int, since: str) -> None:
        slot = SimpleNamespace(
            stacked=SimpleNamespace(upper_fd=fd), id_base=0, cgroup=SimpleNamespace(frozen=nullcontext)
        )
        super().__init__(cast("Slot", slot), since)
        self.path = path
        self.is_dead = False

    @property
    def dead(self) -> bool:
        return self.is_dead

    def _admit(self) -> Slot:
        return self.slot

    def rest(self, call: str) -> None:
        self.last = call


def live_of(served: Served, session: str) -> Live:
    """What a session keeps."""
    found = served.sessions.containers._keeping.of(session)
    assert found is not None
    return found


async def kept_call(
    served: Served, scheduling: Scheduler, session: str, changes: Mapping[str, str | None]
) -> models.Invocation:
    """A call that changes files in the container of a session."""
    invocation = call(uid=CALLER.uid)
    hold = await served.sessions.holds.enter(KEEPER, session, None)
    try:
        invocation.session = hold.row.id
        hold.call, hold.policy = invocation.id, "exited"
        await served.journal.accept(Accepted(invocation, DIGEST))
        ticket = Ticket(CALLER.uid, MEMORY, serial=hold.row.id)
        async with scheduling.admitted(ticket):
            await hold.begin()
            seat = hold.take_seat(PLAN, ticket, scheduling)
            assert seat is not None
            kept = await seat.admit()
            async with AsyncExitStack() as stack:
                if kept is None:
                    path, fd = stack.enter_context(served._upper(hold))
                    kept = seat.kept = Bare(path, fd, invocation.id)
                await kept.admit()
                seat.keep(stack)
            assert isinstance(kept, Bare)
            await anyio.to_thread.run_sync(_change, served, live_of(served, session), kept.path, changes)
            done = ended(invocation).model_copy(update={**hold.checkpoints, "container": seat.use})
            await served.journal.ended(done, outcome_header(done), also=hold.commit)
            hold.committed()
    finally:
        hold.leave()
    return done


def _change(served: Served, live: Live, upper: Path, changes: Mapping[str, str | None]) -> None:
    """As overlayfs would on top of what the container began with."""
    with View([served.store.path(one) for one in live.base.stack.layers]) as view:
        for name, text in changes.items():
            with suppress(FileNotFoundError):
                (upper / name).unlink()
            if text is not None:
                (upper / name).write_text(text)
            elif view.find(os.fsencode(name)) is not None:
                os.mknod(upper / name, stat.S_IFCHR, os.makedev(0, 0))
