"""One call's part in a session: its turn, the files that it begins with, and what is kept of its own."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import anyio.to_thread
from uuid6 import uuid7

from sandboxd import errors
from sandboxd.engine.stacked import attach_stack
from sandboxd.failpoint import failpoint
from sandboxd.models import Cause
from sandboxd.workspace import layer, tables
from sandboxd.workspace.shares import refuse
from sandboxd.workspace.view import Lent

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import ExitStack
    from pathlib import Path

    from sandboxd.config import SessionShare
    from sandboxd.engine.base import Slot
    from sandboxd.journal import Journal
    from sandboxd.models import Outcome
    from sandboxd.workspace.checkout import Checkout
    from sandboxd.workspace.shares import Shares
    from sandboxd.workspace.store import LayerStore
    from sandboxd.workspace.tables import Checkpoint, Row, Stack
    from sandboxd.workspace.turns import Turns
    from sandboxd.workspace.unwritten import Unwritten

__all__ = ["LONG", "MOST_LAYERS", "OWNER", "CallSession", "Commit", "lowest"]

LONG = 3 * tables.FAN
"""Layers of a stack whose merges were missed."""
MOST_LAYERS = 200
"""Layers of a stack on which nothing more is kept: overlayfs takes 500, and each is a descriptor for us."""

OWNER = (1000, 1000)
"""Who has what is made from outside where nothing says whose it is: the tool of a policy that names none."""

Commit = Literal["exited", "success", "always", "never"]

RAN = {
    Cause.EXITED, Cause.SIGNALLED, Cause.WALL_TIME, Cause.CPU_TIME, Cause.MEMORY, Cause.OUTPUT,
    Cause.CANCELLED,
}  # fmt: skip
"""The causes of a command that ran, and did what it did."""


def _keeps(commit: Commit, outcome: Outcome) -> bool:
    match commit:
        case "always":
            return outcome.cause in RAN
        case "exited":
            return outcome.cause is Cause.EXITED
        case "success":
            return outcome.cause is Cause.EXITED and outcome.exit_code == 0
        case "never":
            return False


@contextmanager
def lowest(checkout: Checkout | None) -> Iterator[tuple[Lent, ...]]:
    """The caller's directory, if there is one, as the lowest layer of a view. Blocks."""
    if checkout is None:
        yield ()
        return
    mount = checkout.mapped(*OWNER, slot=0)
    try:
        yield (Lent(mount, checkout.rights(*OWNER, slot=0)),)
    finally:
        os.close(mount)


@dataclass(frozen=True)
class _Start:
    """Where the session stood when the call had its turn."""

    row: Row
    head: Checkpoint
    stack: Stack


class CallSession:
    """Entered when it is made; ``leave`` ends it, whatever happened."""

    def __init__(
        self,
        row: Row,
        share: SessionShare,
        *,
        journal: Journal,
        store: LayerStore,
        turns: Turns,
        held: Shares,
        unwritten: Unwritten,
        kept: Callable[[Checkpoint, int], None],
        checkout: Checkout | None = None,
    ) -> None:
        """``share`` and ``held``: what all the caller's sessions may hold and do."""
        self.row = row
        self._share = share
        self._journal = journal
        self._store = store
        self._turns = turns
        self._held = held
        self._unwritten = unwritten
        self._on_kept = kept
        self._checkout = checkout
        self.call = ""
        """The call's id, and when its policy has its files kept."""
        self.policy: Commit = "never"
        self._start: _Start | None = None
        self._made: Checkpoint | None = None
        self._pack: bytes | None = None
        self._counted = False
        self._turn = False
        self._inside = True

    async def begin(self) -> None:
        """Wait for the call's turn and see where the session stands. Raises JournalCorrupt, HostFailed."""
        if not self._turn:  # else it is tried again
            await self._turns.take(self.row.id)
            self._turn = True

        def read(connection: sqlite3.Connection) -> _Start | None:
            row = tables.find(connection, self.row.id, None)
            head = None if row is None else tables.checkpoint(connection, row.head)
            if row is None or head is None:
                return None
            return _Start(row, head, tables.stack_of(connection, head.id))

        self._start = await self._journal.read(read)
        if self._start is None:
            raise errors.HostFailed(f"session {self.row.id} is gone")
        await self._unwritten.settle(self._start.stack.layers)
        layers = len(self._start.stack.layers)
        if layers > LONG:  # also where nothing can be kept until they are merged
            self._on_kept(self._start.head, layers)

    def leave(self) -> None:
        """Let the next call have its turn. Safe to call twice."""
        if self._turn:
            self._turn = False
            self._turns.give(self.row.id)
        if self._inside:
            self._inside = False
            self._turns.leave(self.row.id)

    @property
    def before(self) -> str | None:
        """The digest of the checkpoint that the call began with."""
        return None if self._start is None else self._start.head.digest

    @property
    def after(self) -> str | None:
        """The digest of the checkpoint that it left: the same where nothing was changed, or kept."""
        return self.before if self._made is None else self._made.digest

    @property
    def checkpoints(self) -> dict[str, str | None]:
        """Both, as the fields of an invocation."""
        return {"checkpoint_before": self.before, "checkpoint_after": self.after}

    def attach(self, slot: Slot, stack: ExitStack) -> None:
        """Put the session's files into a slot. Blocks. Raises OSError, HostFailed."""
        assert self._start is not None  # noqa: S101  (it has its turn)
        attach_stack(
            slot,
            self._start.stack.layers,
            store=self._store.layers,
            places=self._store.mounts,
            empty=self._store.empty.name,
            checkout=self._checkout,
            stack=stack,
        )

    def keeps(self, outcome: Outcome) -> bool:
        """Whether the files of a call that ended so are kept."""
        return _keeps(self.policy, outcome)

    def keep(self, slot: Slot) -> None:
        """Keep what the call changed, where nothing refers to it yet: packed, or on disk. Blocks.

        Raises QuotaExceeded, WorkspaceUnfit, HostFailed; then nothing of it is left.
        """
        assert self._start is not None  # noqa: S101
        assert slot.stacked is not None  # noqa: S101
        upper = slot.stacked.upper_fd
        if self._is_unchanged(upper, slot.id_base):
            return
        self._check_depth(self._start)
        packed = self._store.pack(upper, slot.id_base)
        if packed is None:
            self._kept(*self._store.take(upper, slot.id_base))
        else:
            name, self._pack, figures = packed
            self._kept(name, figures)

    def _kept(self, name: str, figures: layer.Figures) -> Checkpoint:
        assert self._start is not None  # noqa: S101
        start = self._start
        try:
            self._check_quota(start, figures)
            self._held.take(start.row.uid, figures.size, figures.inodes + 1, self._share)
            self._counted = True
        except BaseException:
            self._store.remove(name)
            raise
        self._made = tables.make_checkpoint(
            str(uuid7()),
            start.row.id,
            start.row.uid,
            start.head,
            layer=name,
            content=figures.digest,
            size=figures.size,
            inodes=figures.inodes,
            created=time.time_ns() // 1000,
            call=self.call or None,
        )
        return self._made

    def make(self, fill: Callable[[Sequence[Path | Lent], int], None]) -> Checkpoint:
        """The same of a layer that ``fill`` makes over the session's, in an empty directory."""
        assert self._start is not None  # noqa: S101
        self._check_depth(self._start)
        below = tuple(self._store.path(name) for name in self._start.stack.layers)

        def filled(into: int, _: int) -> layer.Figures:
            with lowest(self._checkout) as bottom:
                fill((*below, *bottom), into)
            return layer.measure(into)

        name, figures = self._store.add(filled)
        return self._kept(name, figures)

    def _is_unchanged(self, upper: int, base: int) -> bool:
        assert self._start is not None  # noqa: S101
        layers = self._start.stack.layers
        if not layers:
            return not os.listdir(upper)
        newest = os.open(self._store.path(layers[0]), layer.DIRECTORY)
        try:
            return layer.is_same(upper, newest, base)
        finally:
            os.close(newest)

    @staticmethod
    def _check_depth(start: _Start) -> None:
        layers = len(start.stack.layers) + 1
        if layers > MOST_LAYERS:
            raise errors.QuotaExceeded(
                f"the call's files are not kept: the session would have {layers} layers, more than the "
                f"{MOST_LAYERS} that one may have; they are merged in the background: try again",
                quota="session.layers",
                asked=layers,
                allowed=MOST_LAYERS,
            )

    @staticmethod
    def _check_quota(start: _Start, figures: layer.Figures) -> None:
        row, stack = start.row, start.stack
        for quota, allowed, asked in (
            ("session.size", row.quota_size, stack.size + figures.size),
            ("session.inodes", row.quota_inodes, stack.inodes + figures.inodes),
        ):
            if allowed is not None and asked > allowed:
                refuse(quota, asked, allowed)

    def commit(self, connection: sqlite3.Connection) -> None:
        """What comes about with the outcome, in its transaction. Raises StateConflict; then nothing does."""
        start = self._start
        if start is None:
            return
        tables.touch(connection, start.row, at=time.time_ns() // 1000, called=bool(self.call))
        if self._made is None:
            return
        failpoint("session.commit")
        tables.insert_checkpoint(connection, self._made)
        if self._pack is not None and self._made.layer is not None:
            tables.insert_pack(connection, self._made.layer, self._pack)
        if not tables.move(connection, start.row.id, since=start.head.id, to=self._made.id):
            raise errors.StateConflict(f"session {start.row.id} was changed while a call ran in it")

    def committed(self) -> None:
        """The transaction is on disk."""
        failpoint("session.committed")
        if self._made is not None and self._start is not None:
            if self._pack is not None and self._made.layer is not None:
                self._unwritten.add(self._made.layer, self._pack)
            self._on_kept(self._made, len(self._start.stack.layers) + 1)

    def undo(self) -> Callable[[sqlite3.Connection], None]:
        """What takes ``commit`` back, where whoever asked is told that nothing has changed.

        The layer is removed at the next start.
        """
        start, made = self._start, self._made

        def take_back(connection: sqlite3.Connection) -> None:
            if start is not None and made is not None:
                tables.move(connection, start.row.id, since=made.id, to=start.head.id)
                tables.remove_checkpoint(connection, made.id)
                self._give_back(made)

        return take_back

    def _give_back(self, made: Checkpoint) -> None:
        """Its caller has the room again, if that was not done."""
        if self._counted:
            self._counted = False
            self._held.give(made.uid, made.size, made.inodes + 1)

    async def abandon(self) -> None:
        """The outcome could not be written with what was kept: it goes, unless it was written after all."""
        made, self._made, self._pack = self._made, None, None
        if made is None or made.layer is None:
            return
        try:
            found = await self._journal.read(lambda connection: tables.checkpoint(connection, made.id))
        except errors.SandboxdError:
            return  # it is removed at the next start, if nothing refers to it
        if found is None:
            self._give_back(made)
            await anyio.to_thread.run_sync(self._store.remove, made.layer)
