"""One call's part in a session: its turn, the files that it begins with, and what is kept of its own."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import anyio.to_thread

from sandboxd import errors
from sandboxd.engine.stacked import attach_stack
from sandboxd.failpoint import failpoint
from sandboxd.keeping import Seat
from sandboxd.models import Cause, NetworkUse
from sandboxd.workspace import allowance, containers, layer, soundness, stacks, tables
from sandboxd.workspace.shares import refuse
from sandboxd.workspace.view import Lent

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import ExitStack
    from pathlib import Path

    from sandboxd.config import SessionShare
    from sandboxd.engine.base import Slot
    from sandboxd.journal import Journal
    from sandboxd.keeping import Keeping, Live
    from sandboxd.models import ContainerLost, Outcome
    from sandboxd.plan import Plan, Shape
    from sandboxd.scheduler import Scheduler, Ticket
    from sandboxd.workspace.allowance import Hold
    from sandboxd.workspace.checkout import Checkout
    from sandboxd.workspace.shares import Shares
    from sandboxd.workspace.stacks import Stack
    from sandboxd.workspace.store import LayerStore
    from sandboxd.workspace.tables import Checkpoint, Row
    from sandboxd.workspace.turns import Turns
    from sandboxd.workspace.unwritten import Unwritten

__all__ = ["LONG", "MOST_LAYERS", "OWNER", "CallSession", "Commit", "Start", "lowest"]

LONG = 3 * stacks.FAN
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
class Start:
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
        keeping: Keeping,
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
        self.maker = ""
        """The call that a checkpoint is said to be of, where it is made for none."""
        self.call = ""
        """The call's id, and when its policy has its files kept."""
        self.policy: Commit = "never"
        self._start: Start | None = None
        self._since: Checkpoint | None = None
        self._made: Checkpoint | None = None
        self._pack: bytes | None = None
        self._counted = False
        self._network: dict[str, int] = {}
        """What the call's attempts used of the network."""
        self._hold: Hold | None = None
        self._counting = False
        """An attempt may use of what is held, and has not said how much."""
        self._keeping = keeping
        self.seat: Seat | None = None
        """The call's place in the container that the session keeps."""
        self._lost: ContainerLost | None = None
        self._turn = False
        self._inside = True

    async def begin(self) -> None:
        """Wait for the call's turn and see where the session stands. Raises JournalCorrupt, HostFailed.

        Where the container that it keeps has died, what that has is kept first.
        """
        await self.take_turn()
        await self._keeping.bury(self.row.id)
        await self.stand()

    async def take_turn(self, *, first: bool = False) -> None:
        """Wait for the turn; ``first``: before all who wait already."""
        if not self._turn:  # else it is tried again
            await self._turns.take(self.row.id, first=first)
            self._turn = True

    async def stand(self) -> None:
        """See where the session stands, in its turn. Raises JournalCorrupt, HostFailed."""

        def read(connection: sqlite3.Connection) -> Start | None:
            row = tables.find(connection, self.row.id, None)
            head = None if row is None else tables.checkpoint(connection, row.head)
            if row is None or head is None:
                return None
            self._lost = containers.find(connection, row.id)
            return Start(row, head, stacks.stack_of(connection, head.id))

        self._start = await self._journal.read(read)
        if self._start is None:
            raise errors.HostFailed(f"session {self.row.id} is gone")
        await self._unwritten.settle(self._start.stack.layers)
        self._since = self._start.head
        layers = len(self._start.stack.layers)
        if layers > LONG:  # also where nothing can be kept until they are merged
            self._on_kept(self._start.head, layers)

    def leave(self) -> None:
        """Let the next call have its turn. Safe to call twice."""
        if self.seat is not None:
            self.seat.leave()
        if self._turn:
            self._turn = False
            self._turns.give(self.row.id)
        if self._inside:
            self._inside = False
            self._turns.leave(self.row.id)

    async def hold_network(self, limits: Mapping[str, int]) -> dict[str, int]:
        """Hold on disk what an attempt may use of the session's budget; returns what that has left, by name.

        ``limits`` are those of ``network.budget``. Without one of sessions among them, nothing is written.
        Raises HostFailed, JournalCorrupt.
        """
        if not any(name.startswith("session.") for name in limits):
            return {}
        self._hold = await self._journal.write(
            lambda connection: allowance.hold(connection, self.row.id, self.call, limits, self._network)
        )
        self._counting = True
        return self._hold.left

    def used_network(self, use: NetworkUse) -> None:
        """Count what an attempt used, for the outcome; all that was held where that is not known."""
        used = {
            "bytes": use.bytes_in + use.bytes_out,
            "bytes_in": use.bytes_in,
            "bytes_out": use.bytes_out,
            "connections": use.connections,
            "requests": use.requests,
        }
        self._counting = False
        most = {} if use.whole or self._hold is None else self._hold.most
        for name, count in used.items():
            self._network[name] = self._network.get(name, 0) + max(count, most.get(name, 0))

    def check(self, shape: Shape | None) -> None:
        """Raise ContainerLive where the session keeps a container that this does not go with.

        None: a change of its files from outside.
        """
        self._keeping.refuse(self.row.id, self.row.name or self.row.id, shape)

    def take_seat(self, plan: Plan, ticket: Ticket, scheduler: Scheduler) -> Seat | None:
        """The call's place in the session's container, under a policy that has one kept; None under others.

        Raises ContainerLive.
        """
        assert self._start is not None  # noqa: S101  (it has its turn)
        self.check(plan.shape)
        if not plan.shape.kept:
            return None
        self.seat = Seat(
            self._keeping,
            session=self.row.id,
            named=self.row.name or self.row.id,
            call=self.call,
            plan=plan,
            share=self._share,
            base=self._start,
            scheduler=scheduler,
            ticket=ticket,
            lost=self._lost,
        )
        return self.seat

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

    @property
    def written(self) -> str | None:
        """The layer that was made, if it is on disk."""
        return None if self._made is None or self._pack is not None else self._made.layer

    def attach(self, slot: Slot, stack: ExitStack) -> None:
        """Put the session's files into a slot. Blocks. Raises OSError, HostFailed, Corrupt."""
        assert self._start is not None  # noqa: S101  (it has its turn)
        with self._explained():
            attach_stack(
                slot,
                self._start.stack.layers,
                store=self._store.layers,
                places=self._store.mounts,
                empty=self._store.empty.name,
                checkout=self._checkout,
                stack=stack,
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What fails since a layer is gone says so: Corrupt. Nothing is looked at where nothing fails."""
        try:
            yield
        except (OSError, errors.HostFailed):
            assert self._start is not None  # noqa: S101
            soundness.present(self._store.layers, self.row.id, self._start.stack.kept)
            raise

    def keeps(self, outcome: Outcome) -> bool:
        """Whether the files of a call that ended so are kept."""
        return _keeps(self.policy, outcome)

    def keep(self, slot: Slot, earlier: str | None = None) -> None:
        """Keep what the call changed, where nothing refers to it yet: packed, or on disk. Blocks.

        On disk, what is the same in an ``earlier`` layer is shared with it. Raises QuotaExceeded,
        WorkspaceUnfit, HostFailed; then nothing of it is left.
        """
        assert self._start is not None  # noqa: S101
        assert slot.stacked is not None  # noqa: S101
        upper = slot.stacked.upper_fd
        with self._explained():
            unchanged = self._is_unchanged(upper, slot.id_base)
        if unchanged:
            return
        self._check_depth(self._start)
        packed = self._store.pack(upper, slot.id_base)
        if packed is None:
            self._kept(*self._store.take(upper, slot.id_base, earlier))
        else:
            name, self._pack, figures = packed
            self._kept(name, figures)

    def keep_of(self, live: Live) -> str:
        """The same of what the session's container holds, which nothing changes meanwhile.

        It becomes a checkpoint on the one that the container began with. Returns where the session is to
        stand. Raises also ControlNotEnforced.
        """
        assert self._start is not None  # noqa: S101
        now = self._start
        self._start = replace(live.base, row=now.row)
        self.maker = live.kept.last
        with live.kept.still():
            self.keep(live.kept.slot, live.layer)
        made = self._made
        if made is not None and made.digest == now.head.digest and made.layer is not None:
            self._made = self._pack = None  # nothing has changed since the last
            self._give_back(made)
            self._store.remove(made.layer)
            self._start = now
        return self._start.head.id if self._made is None else self._made.id

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
            self._journal.new_id(),
            start.row.id,
            start.row.uid,
            start.head,
            layer=name,
            content=figures.digest,
            size=figures.size,
            inodes=figures.inodes,
            created=time.time_ns() // 1000,
            call=self.call or self.maker or None,
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

        with self._explained():
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
    def _check_depth(start: Start) -> None:
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
    def _check_quota(start: Start, figures: layer.Figures) -> None:
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
        if self._counting:  # nobody has said what it used
            self.used_network(NetworkUse(whole=False))
        if self._hold is not None or any(self._network.values()):
            allowance.settle(connection, start.row.id, self.call, self._network)
        if self.seat is not None:
            self.seat.note(connection)
        since, to = self._since or start.head, self._made or start.head
        if self._made is not None:
            failpoint("session.commit")
            tables.insert_checkpoint(connection, self._made)
            if self._pack is not None and self._made.layer is not None:
                tables.insert_pack(connection, self._made.layer, self._pack)
                self._unwritten.add(self._made.layer, self._pack)  # whoever sees the checkpoint needs it
        if since.id != to.id and not tables.move(connection, start.row.id, since=since.id, to=to.id):
            raise errors.StateConflict(f"session {start.row.id} was changed while a call ran in it")

    def committed(self) -> None:
        """The transaction is on disk."""
        failpoint("session.committed")
        if self._made is not None and self._start is not None:
            self._on_kept(self._made, len(self._start.stack.layers) + 1)

    def undo(self) -> Callable[[sqlite3.Connection], None]:
        """What takes ``commit`` back, where whoever asked is told that nothing has changed.

        The layer is removed at the next start.
        """
        start, made, since = self._start, self._made, self._since

        def take_back(connection: sqlite3.Connection) -> None:
            if start is None or since is None:
                return
            tables.move(connection, start.row.id, since=(made or start.head).id, to=since.id)
            if made is not None:
                tables.remove_checkpoint(connection, made.id)
                tables.remove_packs(connection, [made.layer or ""])
                self._give_back(made)

        return take_back

    async def spoil(self, why: str) -> None:
        """The call failed by a fault of ours: the container that it was in is of no more use."""
        if self.seat is not None:
            await self.seat.end(why)

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
            await self._unwritten.forget([made.layer])
            self._give_back(made)
            await anyio.to_thread.run_sync(self._store.remove, made.layer)
