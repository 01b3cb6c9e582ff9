"""Sessions against a model of them: calls, rollbacks, forks, restarts and kills, in whatever order; and the
containers that they keep, their checkpoints and ends.

Layers are made by the daemon's own code of files that are written as a tool would write them. What the daemon
does beside calls is done one step at a time, so that the daemon may die between any two of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from keptcalls import Bare, kept_call, live_of, scheduler
from sessioncalls import CALLER, Served, serving

from sandboxd import errors, models
from sandboxd.workspace import stacks, tables

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

NAMES = st.sampled_from(["a", "b", "log"])
CHANGES = st.dictionaries(NAMES, st.one_of(st.none(), st.text("xyz", max_size=40)), max_size=3)
CAUSES = st.sampled_from([models.Cause.EXITED, models.Cause.EXITED, models.Cause.WALL_TIME])
FAN = 3  # layers that are merged into one: with the real number no example would come to it


@dataclass
class Container:
    """One that a session keeps: the call that it was made for, what it stands on, and what is in it."""

    since: str
    base: str
    files: dict[str, str]
    calls: int = 0


@dataclass
class Line:
    """What a session has to be."""

    origin: str
    head: str
    own: list[str] = field(default_factory=list)
    """Checkpoints that were made in it, and are not forgotten."""
    live: Container | None = None
    lost: Container | None = None
    """What it kept and no call has told of yet."""

    def lose(self) -> None:
        """What it keeps is gone, and only its checkpoints are left."""
        self.live, self.lost = None, self.live or self.lost


class SessionMachine(RuleBasedStateMachine):
    """Steps of callers and of the daemon; after each of them the sessions are compared with the model."""

    sessions: Bundle[str] = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="sandboxd-sessions-"))
        self.starts = 0
        self.lines: dict[str, Line] = {}
        self.files: dict[str, dict[str, str]] = {}
        """Of each checkpoint that ever was."""
        self.parents: dict[str, str] = {}
        self.calls: list[models.Invocation] = []
        self._fan, stacks.FAN = stacks.FAN, FAN

    @initialize()
    def open(self) -> None:
        self._portal = start_blocking_portal()
        self.portal = self._portal.__enter__()
        self.serve()

    def serve(self) -> None:
        state = self.directory / str(self.starts)
        self._serving: AbstractContextManager[Served] = self.portal.wrap_async_context_manager(
            serving(state, self.directory / "uppers", attended=False)
        )
        self.served = self._serving.__enter__()
        self.scheduler = scheduler()

    def down(self, at: str) -> list[str]:
        """A checkpoint, and those that it stands on."""
        found = []
        while at:
            found.append(at)
            at = self.parents.get(at, "")
        return found

    def known(self, session: str) -> list[str]:
        """Checkpoints that a session may be rolled back to."""
        line = self.lines[session]
        return [*line.own, *(one for one in self.down(line.origin) if one not in line.own)]

    @rule(target=sessions)
    def create(self) -> str:
        made = self.portal.call(self.served.sessions.create, CALLER, models.SessionRequest())
        self.lines[made.id] = Line(made.head.id, made.head.id, [made.head.id])
        self.files[made.head.id] = {}
        return made.id

    @rule(session=sessions, changes=CHANGES, cause=CAUSES, linked=st.booleans())
    def call(
        self, session: str, changes: dict[str, str | None], cause: models.Cause, *, linked: bool
    ) -> None:
        line = self.lines[session]
        if line.live is not None:
            with pytest.raises(errors.ContainerLive):
                self.portal.call(self._call, session, changes, cause, linked)
            return
        done = self.portal.call(self._call, session, changes, cause, linked)
        self.calls.append(done)
        row = self.portal.call(self.served.rows)[session]
        if cause is not models.Cause.EXITED:
            assert row.head == line.head
            assert done.checkpoint_before == done.checkpoint_after
            return
        if row.head == line.head:
            assert not linked
            assert all(text is None and name not in self.files[line.head] for name, text in changes.items())
            return
        files = self.files[line.head] | changes
        self.files[row.head] = {name: text for name, text in files.items() if text is not None}
        if linked:
            self.files[row.head] |= dict.fromkeys(("one", "other"), "a file with two names")
        self.parents[row.head] = line.head
        line.head = row.head
        line.own.append(row.head)

    async def _call(
        self,
        session: str,
        changes: dict[str, str | None],
        cause: models.Cause,
        linked: bool,  # noqa: FBT001
    ) -> models.Invocation:
        return await self.served.call(session, changes, cause=cause, linked=linked)

    @rule(session=sessions, number=st.integers(0, 30))
    def rollback(self, session: str, number: int) -> None:
        known = self.known(session)
        to = known[number % len(known)]
        if self.lines[session].live is not None:
            with pytest.raises(errors.ContainerLive):
                self.portal.call(self.served.sessions.rollback, CALLER, session, to)
            return
        self.portal.call(self.served.sessions.rollback, CALLER, session, to)
        self.lines[session].head = to

    @rule(session=sessions, changes=st.lists(CHANGES, min_size=1, max_size=3))
    def calls_and_a_checkpoint(self, session: str, changes: list[dict[str, str | None]]) -> None:
        for one in changes:
            self.call_in_its_container(session, one)
            self.checkpoint(session)

    @rule(session=sessions, changes=CHANGES)
    def call_in_its_container(self, session: str, changes: dict[str, str | None]) -> None:
        done = self.portal.call(kept_call, self.served, self.scheduler, session, changes)
        self.calls.append(done)
        self.has_run_in_its_container(session, changes, done)

    def has_run_in_its_container(
        self, session: str, changes: dict[str, str | None], done: models.Invocation
    ) -> None:
        line = self.lines[session]
        lost, line.lost = line.lost, None
        if line.live is None:
            line.live = Container(done.id, line.head, dict(self.files[line.head]))
        live = line.live
        live.calls += 1
        live.files = {name: text for name, text in (live.files | changes).items() if text is not None}
        assert done.container is not None
        assert (done.container.since, done.container.number) == (live.since, live.calls)
        told = done.container.lost
        assert (told and (told.since, told.calls)) == (lost and (lost.since, lost.calls))
        assert done.checkpoint_before == done.checkpoint_after

    def has_checkpoint(self, session: str) -> None:
        """What its container has is kept: as a checkpoint on the one that that began with, if it differs."""
        line = self.lines[session]
        head, live = self.portal.call(self.served.rows)[session].head, line.live
        assert live is not None
        if head not in {line.head, live.base}:
            self.files[head] = live.files
            self.parents[head] = live.base
            assert self.portal.call(self.served.line, head)[-1].parent == live.base
            line.own.append(head)
        line.head = head
        assert self.files[head] == live.files

    @rule(session=sessions)
    def checkpoint(self, session: str) -> None:
        if self.lines[session].live is None:
            with pytest.raises(errors.StateConflict):
                self.portal.call(self.served.sessions.checkpoint, CALLER, session)
            return
        made = self.portal.call(self.served.sessions.checkpoint, CALLER, session)
        self.has_checkpoint(session)
        assert made.id == self.lines[session].head

    @rule(session=sessions, how=st.sampled_from(["kept", "discarded", "unused"]))
    def end(self, session: str, how: str) -> None:
        line = self.lines[session]
        if how == "unused":
            if line.live is not None:
                live_of(self.served, session).since_used -= 1e9
            self.portal.call(self.served.sessions.containers.look_after)
        elif line.live is None and line.lost is None:
            with pytest.raises(errors.StateConflict):
                self.portal.call(self._end, session, how)
            return
        else:
            self.portal.call(self._end, session, how)
            line.lost = None
        if line.live is not None and how != "discarded":
            self.has_checkpoint(session)
        line.live = None

    async def _end(self, session: str, how: str) -> None:
        await self.served.sessions.end(CALLER, session, discard=how == "discarded")

    @rule(session=sessions, noticed=st.booleans(), changes=CHANGES)
    def container_dies(self, session: str, changes: dict[str, str | None], *, noticed: bool) -> None:
        line = self.lines[session]
        if line.live is None:
            return
        kept = live_of(self.served, session).kept
        assert isinstance(kept, Bare)
        kept.is_dead = True
        if noticed:
            self.portal.call(self.served.sessions.containers.look_after)
            self.has_checkpoint(session)
            line.lose()
            return
        done = self.portal.call(kept_call, self.served, self.scheduler, session, changes)
        self.calls.append(done)
        self.has_checkpoint(session)  # before the call began, in another
        line.lose()
        self.has_run_in_its_container(session, changes, done)

    @rule(session=sessions, number=st.integers(0, 30))
    def rollback_to_another_sessions(self, session: str, number: int) -> None:
        foreign = sorted(set(self.files) - set(self.known(session)))
        if foreign:
            with pytest.raises(errors.NotFound):
                self.portal.call(
                    self.served.sessions.rollback, CALLER, session, foreign[number % len(foreign)]
                )

    @rule(session=sessions)
    def discard(self, session: str) -> None:
        self.portal.call(self.served.sessions.discard, CALLER, session)
        line = self.lines[session]
        stands: set[str] = set()
        for other in self.lines.values():  # forks stand on it too
            stands |= {*self.down(other.head), *self.down(other.origin)}
        line.own = [one for one in line.own if one in stands]

    @rule(target=sessions, session=sessions, number=st.integers(0, 30))
    def fork(self, session: str, number: int) -> str:
        known = self.known(session)
        start = known[number % len(known)]
        asked = models.SessionFork(checkpoint=start)
        made = self.portal.call(self.served.sessions.fork, CALLER, session, asked)
        assert made.head.id == start
        self.lines[made.id] = Line(start, start)
        return made.id

    @rule(session=consumes(sessions))
    def delete(self, session: str) -> None:
        self.portal.call(self.served.sessions.delete, CALLER, session)
        del self.lines[session]
        with pytest.raises(errors.NotFound):
            self.portal.call(self._call, session, dict[str, str | None](), models.Cause.EXITED, False)

    @rule(what=st.sampled_from(["prune", "merge", "write", "sync"]))
    def look_after(self, what: str) -> None:
        self.portal.call(self._look_after, what)

    async def _look_after(self, what: str) -> None:
        sessions = self.served.sessions
        if what == "prune" and sessions.layers.to_prune:
            await sessions.layers.prune(sessions.layers.to_prune.popleft())
        elif what == "merge" and sessions.layers.to_merge:
            checkpoint, lent = sessions.layers.to_merge.popleft()
            await sessions.layers.merge(checkpoint, lent=lent)
        elif what == "write":
            await sessions.layers.unwritten.settle(list(sessions.layers.unwritten._packs))
        elif what == "sync":
            await sessions.layers.unwritten._sync()

    @rule()
    def restart(self) -> None:
        self.portal.call(self.served.sessions.containers.end_all)
        for session, line in self.lines.items():
            if line.live is not None:
                self.has_checkpoint(session)
                line.live = None
        self._serving.__exit__(None, None, None)
        self.serve()

    @rule()
    def kill(self) -> None:
        """Go on from the files as they are now, which is what a process that is killed leaves."""
        before, after = (self.directory / str(self.starts + n) for n in (0, 1))
        subprocess.run(["cp", "-a", before, after], check=True)
        for path in after.glob("*-shm"):
            path.unlink()
        self._serving.__exit__(None, None, None)
        shutil.rmtree(before)
        self.starts += 1
        for line in self.lines.values():
            line.lose()
        self.serve()

    @invariant()
    def they_are_what_the_model_says(self) -> None:
        if not hasattr(self, "served"):
            return
        self.portal.call(self.served.check)
        rows = self.portal.call(self.served.rows)
        assert rows.keys() == self.lines.keys()
        for id_, line in self.lines.items():
            assert (rows[id_].head, rows[id_].origin) == (line.head, line.origin)
            assert self.portal.call(self.served.files, line.head) == self.files[line.head]
            told = self.portal.call(self.served.sessions.get, CALLER, id_).container
            has = line.live or line.lost
            expected = has and ("live" if line.live else "lost", has.since, has.calls)
            assert (told and (told.state, told.since, told.calls)) == expected
            own = self.portal.call(self._own, id_)
            assert sorted(own) == sorted(line.own)
            for one in self.known(id_):
                assert self.portal.call(self.served.files, one) == self.files[one]
        for done in self.calls:
            found = self.portal.call(self.served.journal.get, done.id)
            assert found is not None
            assert (found.outcome, found.checkpoint_after) == (done.outcome, done.checkpoint_after)
        held = self.portal.call(self.served.journal.read, tables.held).get(CALLER.uid, (0, 0))
        assert self.served.sessions.layers.held.size_of(CALLER.uid) == held[0]

    async def _own(self, session: str) -> list[str]:
        def read(connection: object) -> list[tables.Checkpoint]:
            return tables.checkpoints(connection, session, before=None, limit=1000)  # type: ignore[arg-type]

        return [one.id for one in await self.served.journal.read(read)]

    def teardown(self) -> None:
        try:
            if hasattr(self, "served"):
                for session in list(self.lines):
                    self.portal.call(self.served.sessions.delete, CALLER, session)
                self._serving.__exit__(None, None, None)
                self.serve()
                self.portal.call(self._all_pruned)
                self._serving.__exit__(None, None, None)
                self._portal.__exit__(None, None, None)
        finally:
            stacks.FAN = self._fan
            shutil.rmtree(self.directory)

    async def _all_pruned(self) -> None:
        sessions = self.served.sessions
        while sessions.layers.to_prune:
            await sessions.layers.prune(sessions.layers.to_prune.popleft())
        assert await self.served.unreferenced() == set()
        assert {one.name for one in self.served.store.layers.iterdir()} == {"empty"}, "all of them are gone"


TestSessions = SessionMachine.TestCase
EXAMPLES = max(8, int(os.environ.get("SANDBOXD_HYPOTHESIS_EXAMPLES", "0")) // 10)
TestSessions.settings = settings(deadline=None, max_examples=EXAMPLES, stateful_step_count=30)
