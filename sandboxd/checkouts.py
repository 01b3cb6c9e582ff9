"""Directories of callers on which sessions stand: lent by a descriptor, and held for as long as that lasts.

Whoever passed one has it in hand, and its file system may answer as late as he likes: so it is looked at and
let go of in lanes of his own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import anyio

from sandboxd import errors
from sandboxd.init import LAUNCH
from sandboxd.session import OWNER
from sandboxd.workspace.checkout import Checkout

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anyio.abc import TaskGroup

    from sandboxd.api.identity import Caller
    from sandboxd.lanes import Lanes
    from sandboxd.workspace.handles import Handles
    from sandboxd.workspace.tables import Row

__all__ = ["Checkouts"]

WAIT = 1.0  # seconds for one that is let go of
LETTING_GO = 5.0  # seconds, of all that is lent, at the end of the daemon


class Checkouts:
    """For one event loop; by the ids of sessions."""

    def __init__(self, handles: Handles, lanes: Lanes, *, mounts: Path, kept: Sequence[Path]) -> None:
        """``handles`` are of directories that callers have passed; none is, or has, what is ``kept``.

        ``mounts`` is where mounts are attached for a moment.
        """
        self._handles = handles
        self._lanes = lanes
        self._mounts = mounts
        self._kept = kept
        self._lent: dict[str, Checkout] = {}
        self.tasks: TaskGroup | None = None
        """Where what is let go of is waited for; None: by whoever lets go."""

    def __contains__(self, id_: str) -> bool:
        """Whether a session's directory is here."""
        return id_ in self._lent

    async def take(self, id_: str, handle: str, caller: Caller, *, expected: str | None = None) -> str:
        """Let a session stand on the directory of a handle; returns which one it is, as its row says it.

        Raises NotFound, InvalidRequest, StateConflict where it is not the ``expected`` one.
        """
        handed = self._handles.take(handle, caller.uid)

        def lend() -> Checkout:
            with handed as directory:
                checkout = Checkout.of(
                    directory, handed.owner, place=self._place(id_), launcher=LAUNCH, kept=self._kept
                )
                try:
                    os.close(checkout.mapped(*OWNER, slot=0))  # a file system that cannot is refused now
                except BaseException:
                    checkout.close()
                    raise
                return checkout

        checkout = await self._lanes.run(caller.uid, lend, undo=Checkout.close, always=True)
        device, inode = checkout.identity
        identity = f"{device:x}:{inode}"
        if expected not in {None, identity}:
            await self._lanes.run(caller.uid, checkout.close, always=True)
            raise errors.StateConflict("the session stands on another directory than the one passed")
        self._lent[id_] = checkout
        return identity

    def _place(self, id_: str) -> Path:
        return self._mounts / f"checkout-{id_}"

    async def take_too(self, source: Row, id_: str) -> None:
        """Let another session stand on the directory of one; where the daemon has not got it, on none yet."""
        checkout = self._lent.get(source.id)
        if checkout is None:
            return
        self._lent[id_] = await self._lanes.run(
            source.uid, lambda: checkout.again(self._place(id_)), undo=Checkout.close, always=True
        )

    async def let_go(self, id_: str) -> None:
        """Done when this returns, or, where its caller has it last, later: nobody waits for him."""
        checkout = self._lent.pop(id_, None)
        if checkout is None:
            return
        gone = anyio.Event()

        async def close() -> None:
            await self._lanes.run(checkout.owner.uid, checkout.close, always=True)
            gone.set()

        if self.tasks is None:
            await close()
            return
        self.tasks.start_soon(close)
        with anyio.move_on_after(WAIT):
            await gone.wait()

    async def close(self) -> None:
        """Let go of every one; what does not let go in time goes with the daemon."""
        with anyio.move_on_after(LETTING_GO, shield=True):
            async with anyio.create_task_group() as tasks:
                for id_ in list(self._lent):
                    tasks.start_soon(self.let_go, id_)

    def of(self, row: Row) -> Checkout | None:
        """What a session stands on. Raises StateConflict where the daemon has to be given it again."""
        found = self._lent.get(row.id)
        if row.checkout is not None and found is None:
            raise errors.StateConflict(
                f"session {row.name or row.id!r} stands on a directory of its caller's, which the daemon "
                "has no more since it was restarted; pass it again: `sandboxd session lend "
                f"{row.name or row.id} DIRECTORY`",
                session=row.id,
            )
        return found

    def state(self, row: Row) -> Literal["lent", "missing"] | None:
        """Whether it is here; None for a session that stands on none."""
        if row.checkout is None:
            return None
        return "lent" if row.id in self._lent else "missing"
