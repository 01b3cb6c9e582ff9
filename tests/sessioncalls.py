"""Calls in sessions without a container: their files are written as a tool would, all else is the daemon's.

``Served`` is a journal with the sessions in it, as the daemon has them. ``call`` does what ``runner`` and
``supervisor`` do with a call in a session, in the same order: accepted, entered, files kept, and the outcome
with the checkpoint in one transaction.
"""

# ruff: noqa: ASYNC110, ASYNC240  -- nothing tells when; and nothing else runs meanwhile

from __future__ import annotations

import os
import shutil
import stat
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import anyio
import anyio.to_thread
from invocations import DIGEST, call, ended

from sandboxd import models
from sandboxd.api.identity import Caller
from sandboxd.journal import Accepted, Journal, outcome_header
from sandboxd.lanes import Lanes
from sandboxd.sessions import Sessions
from sandboxd.workspace import layer, stacks, tables
from sandboxd.workspace.handles import Handles
from sandboxd.workspace.store import LayerStore
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from sandboxd.engine.base import Slot
    from sandboxd.session import CallSession

__all__ = ["CALLER", "Served", "files_of", "serving"]

CALLER = Caller(4242, 4242, frozenset(), "agent", ("*",))
Changes = "Mapping[str, str | None]"
"""Files by name, with what is in them from now on; None: it is removed."""


@dataclass
class Served:
    """A journal and its sessions. ``uppers`` is a directory for what calls write."""

    state: Path
    uppers: Path
    journal: Journal
    store: LayerStore
    sessions: Sessions

    async def call(
        self,
        session: str,
        changes: Mapping[str, str | None],
        *,
        key: str | None = None,
        linked: bool = False,
        cause: models.Cause = models.Cause.EXITED,
    ) -> models.Invocation:
        """A call that changes files; ``linked``: in a way that is made as files at once."""
        invocation = call(uid=CALLER.uid, key=key)
        hold = await self.sessions.holds.enter(CALLER, session, None)
        try:
            hold.check(None)
            invocation.session = hold.row.id
            hold.call, hold.policy = invocation.id, "exited"
            await self.journal.accept(Accepted(invocation, DIGEST))
            await hold.begin()
            outcome = models.Outcome(cause=cause, message="It ended.")
            try:
                if hold.keeps(outcome):
                    await anyio.to_thread.run_sync(self._keep, hold, changes, linked)
                done = ended(invocation, cause).model_copy(update=hold.checkpoints)
                with anyio.CancelScope(shield=True):
                    await self.journal.ended(done, outcome_header(done), also=hold.commit)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await hold.abandon()
                raise
            hold.committed()
        finally:
            hold.leave()
        return done

    def _keep(self, hold: CallSession, changes: Mapping[str, str | None], linked: bool) -> None:  # noqa: FBT001
        with self._upper(hold) as (path, fd):
            for name, text in changes.items():
                if text is not None:
                    (path / name).write_text(text)
                elif self._shows(hold, name):
                    os.mknod(path / name, stat.S_IFCHR, os.makedev(0, 0))
            if linked:
                (path / "one").write_text("a file with two names")
                os.link(path / "one", path / "other")
            slot = SimpleNamespace(stacked=SimpleNamespace(upper_fd=fd), id_base=0)
            hold.keep(cast("Slot", slot))

    def _shows(self, hold: CallSession, name: str) -> bool:
        assert hold._start is not None
        with View([self.store.path(one) for one in hold._start.stack.layers]) as view:
            return view.find(os.fsencode(name)) is not None

    @contextmanager
    def _upper(self, hold: CallSession) -> Iterator[tuple[Path, int]]:
        """An upper layer as an attempt begins with it."""
        assert hold._start is not None
        path = self.uppers / hold.call
        path.mkdir(parents=True)
        fd = os.open(path, layer.DIRECTORY)
        try:
            if layers := hold._start.stack.layers:
                newest = os.open(self.store.path(layers[0]), layer.DIRECTORY)
                try:
                    layer.dress(fd, newest, 0)
                finally:
                    os.close(newest)
            yield path, fd
        finally:
            os.close(fd)
            shutil.rmtree(path)

    async def rows(self) -> dict[str, tables.Row]:
        """The sessions that there are."""
        found = await self.journal.read(lambda it: tables.list_sessions(it, None, before=None, limit=1000))
        return {row.id: row for row in found}

    async def line(self, at: str | None) -> list[tables.Checkpoint]:
        """The checkpoints from the first to this one."""

        def read(connection: sqlite3.Connection) -> list[tables.Checkpoint]:
            found = []
            one = tables.checkpoint(connection, at)
            while one is not None:
                found.append(one)
                one = tables.checkpoint(connection, one.parent)
            return found[::-1]

        return await self.journal.read(read)

    async def files(self, at: str) -> dict[str, str]:
        """What a checkpoint shows."""
        stack = await self.journal.read(lambda connection: stacks.stack_of(connection, at))
        await self.sessions.layers.unwritten.settle(stack.layers)
        return files_of([self.store.path(one) for one in stack.layers])

    async def check(self) -> None:
        """What has to hold at any time: nothing in a workspace without its record, and none without it."""
        assert (report := await self.journal.verify()).ok, report.problem
        checkpoints: dict[str, tables.Checkpoint] = {}
        for row in (await self.rows()).values():
            line = await self.line(row.head)
            assert line
            assert line[0].depth == 0, "a line has a beginning"
            checkpoints |= {one.id: one for one in [*line, *await self.line(row.origin)]}
        for one in checkpoints.values():
            if one.call is not None:
                done = await self.journal.get(one.call)
                assert done is not None, "a change has its call"
                assert done.outcome is not None, "a change has its outcome"
                if done.container is None:  # else files are kept later, and said to be of the last call
                    assert done.checkpoint_after == one.digest
            if one.layer is not None:
                await self.sessions.layers.unwritten.settle([one.layer])
                fd = os.open(self.store.path(one.layer), layer.DIRECTORY)
                try:
                    assert layer.measure(fd).digest == one.content, one
                finally:
                    os.close(fd)
        for row in (await self.rows()).values():
            head = (await self.line(row.head))[-1]
            assert await self.files(head.id) == files_of(
                [self.store.path(one.layer) for one in reversed(await self.line(head.id)) if one.layer]
            ), "layers that were merged show the same"

    async def unreferenced(self) -> set[str]:
        """Layers on disk that nothing refers to."""
        known = await self.journal.read(tables.referenced)
        return {one.name for one in self.store.layers.iterdir()} - known - {self.store.empty.name}

    async def cleared(self) -> None:
        """Wait until nothing is on disk that nothing refers to."""
        with anyio.fail_after(20):
            while await self.unreferenced():
                await anyio.sleep(0.01)


def files_of(layers: list[Path]) -> dict[str, str]:
    """The regular files in the uppermost directory of a stack."""
    found: dict[str, str] = {}
    with View(layers) as view:
        for entry in view.walk():
            if entry.kind == "file":
                found[os.fsdecode(entry.path)] = b"".join(view.content(entry)).decode()
    return found


@asynccontextmanager
async def serving(state: Path, uppers: Path, *, attended: bool = True) -> AsyncIterator[Served]:
    """A journal and its sessions, looked after as the daemon does, or by nobody."""
    state.mkdir(exist_ok=True)
    async with Journal.open(state) as journal, anyio.create_task_group() as tasks:
        store = LayerStore(state / "sessions")
        lanes = Lanes("directories", most=32, each=2, waiting=0)
        sessions = Sessions(journal, store, handles=Handles(), lanes=lanes, policy_of=str)
        await sessions.open()
        if attended:
            tasks.start_soon(sessions.run)
        try:
            yield Served(state, uppers, journal, store, sessions)
        finally:
            tasks.cancel_scope.cancel()
            await sessions.close()
