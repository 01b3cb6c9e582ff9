"""The layers of all sessions: which are made into one, which go, and what their callers hold."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.session import LONG
from sandboxd.workspace import pruning, soundness, stacks, tables
from sandboxd.workspace.layer import Figures, measure
from sandboxd.workspace.merge import Merged, merge
from sandboxd.workspace.shares import Shares
from sandboxd.workspace.unwritten import Unwritten

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from sandboxd.journal import Journal
    from sandboxd.workspace.effort import Effort
    from sandboxd.workspace.stacks import Stack
    from sandboxd.workspace.store import LayerStore
    from sandboxd.workspace.tables import Checkpoint

__all__ = ["Layers"]

log = structlog.get_logger("sandboxd.sessions")


class Layers:
    """For one event loop. ``wake`` is called when there is something to do in ``look_after``."""

    def __init__(self, journal: Journal, store: LayerStore, wake: Callable[[], None]) -> None:
        self._journal = journal
        self._store = store
        self._wake = wake
        self.held = Shares()
        self.unwritten = Unwritten(journal, store)
        self.to_merge: deque[tuple[str, bool]] = deque()
        """Checkpoints, and whether their line stands on a directory."""
        self.to_prune: deque[str | None] = deque()
        """Sessions, and None for what is nobody's."""

    async def open(self) -> None:
        """Remove the layers that nothing refers to, and go on with what an earlier daemon began.

        Raises JournalCorrupt, HostFailed.
        """
        referenced, held, going = await self._journal.read(
            lambda connection: (
                tables.referenced(connection),
                tables.held(connection),
                tables.going(connection),
            )
        )
        removed = await anyio.to_thread.run_sync(self._store.clean, referenced)
        if removed:
            log.warning("files of calls without an outcome were removed", layers=removed)
        await self.unwritten.restore()
        self.held.start(held)
        self.to_prune += [*going, None]

    async def look_after(self) -> None:
        """Do all that there is to do. Raises JournalCorrupt, HostFailed."""
        while self.to_prune:
            await self.prune(self.to_prune.popleft())
        while self.to_merge:
            checkpoint, lent = self.to_merge.popleft()
            await self.merge(checkpoint, lent=lent)

    def kept(self, checkpoint: Checkpoint, layers: int, *, lent: bool) -> None:
        """A call was kept: where there are enough layers, they are made into one."""
        wanted = checkpoint.depth % stacks.FAN == 0 or layers > LONG
        if wanted and (checkpoint.id, lent) not in self.to_merge:
            self.to_merge.append((checkpoint.id, lent))
            self._wake()

    def paths(self, names: tuple[str, ...]) -> Iterator[Path]:
        yield from map(self._store.path, names)

    def present(self, session: str, stack: Stack) -> None:
        """Raise Corrupt where a layer of a session's is gone."""
        soundness.present(self._store.layers, session, stack.kept)

    async def sample(self, session: str, stack: Stack) -> None:
        """Raise Corrupt where a layer is gone, or where one of the newest that are small was changed.

        What is no file yet is in the journal.
        """
        kept = [one for one in stack.kept if one.layer not in self.unwritten]
        soundness.present(self._store.layers, session, kept)
        await anyio.to_thread.run_sync(soundness.check, self._store.layers, session, soundness.small(kept))

    def check(self, session: str, stack: Stack, effort: Effort, without: Collection[Path] = ()) -> None:
        """Raise Corrupt where a layer is gone or was changed; all but those ``without`` are read. Blocks."""
        kept = [one for one in stack.kept if self._store.path(one.layer) not in without]
        soundness.check(self._store.layers, session, kept, effort)

    def check_small(self, session: str, stack: Stack, effort: Effort, layer: Path) -> None:
        """Raise Corrupt where one of the layers was changed, if it is small; else it is not read. Blocks."""
        kept = [one for one in stack.kept if self._store.path(one.layer) == layer]
        soundness.check(self._store.layers, session, soundness.small(kept), effort)

    async def prune(self, session: str | None) -> None:
        """Forget what nothing stands on, in steps; then its layers go."""
        complete, steps = False, 0
        while not complete:
            found = await self._forgotten(session)
            for freed in found.freed:
                self.held.give(*freed)
            await self.unwritten.forget(found.layers)
            for name in found.layers:
                await anyio.to_thread.run_sync(self._store.remove, name)
            complete, steps = found.complete, steps + 1
        if session is not None and steps > 1:  # what is nobody's may have been left between them
            await self.prune(None)

    async def _forgotten(self, session: str | None) -> pruning.Pruned:
        """One step of that. Raises HostFailed; then it was not made, or is taken back."""
        steps: list[pruning.Pruned] = []

        def prune(connection: sqlite3.Connection) -> pruning.Pruned:
            steps.append(pruning.prune(connection, session))
            return steps[0]

        def undo(connection: sqlite3.Connection) -> None:
            steps[0].take_back(connection)

        return await self._journal.write(prune, undo=undo)

    async def merge(self, checkpoint: str, *, lent: bool) -> None:
        """Make layers below a checkpoint into fewer; what goes wrong is tried again with a later call."""
        wanted = await self._journal.read(lambda connection: stacks.due(connection, checkpoint))
        for end, span, below in wanted:
            try:
                await self._merge_one(end, span, below, lent=lent)
            except errors.SandboxdError:  # the others may go
                log.exception("layers of a session could not be merged", checkpoint=end.id, span=span)

    async def _merge_one(self, end: Checkpoint, span: int, below: str, *, lent: bool) -> None:
        def read(connection: sqlite3.Connection) -> tuple[Stack, Stack]:
            floor = end.depth - span
            return stacks.stack_of(connection, end.id, floor=floor), stacks.stack_of(connection, below)

        upper, lower = await self._journal.read(read)
        if len(upper.layers) < 2:
            return
        await self.unwritten.settle((*upper.layers, *lower.layers))

        found: list[Merged] = []

        def fill(into: int, scratch: int) -> Figures:
            paths = tuple(self.paths(upper.layers))
            beneath = tuple(self.paths(lower.layers))
            found.append(merge(paths, into, below=beneath, scratch=scratch, lent=lent))
            return Figures(measure(into).digest, found[0].size, found[0].inodes)

        name, figures = await anyio.to_thread.run_sync(self._store.add, fill)
        made = stacks.Merge(end.id, span, below, name, *found[0], figures.digest)
        written = False
        try:
            written = await self._journal.write(lambda connection: stacks.insert_merge(connection, made))
        except errors.HostFailed:  # it may be there all the same
            written = name in await self._journal.read(tables.referenced)
            raise
        finally:
            if written:
                self.held.charge(end.uid, made.own_size, made.own_inodes + 1)
            else:
                await anyio.to_thread.run_sync(self._store.remove, name)
