"""The power goes while calls change sessions: each has what its records say, and nothing else.

Journal and layers are below one file system that is recorded. ``SANDBOXD_POWER_LOSSES`` says at how many
moments the power goes, chosen by chance; 0: at every one.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from disks import Syncing, mounted
from powerloss import Replay
from sessioncalls import CALLER, Served, serving

from sandboxd import models
from sandboxd.journal.schema import connect_reader
from sandboxd.workspace import store, unwritten
from sandboxd.workspace.audit import examine

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.workspace import tables

LOSSES = int(os.environ.get("SANDBOXD_POWER_LOSSES", "30"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Told:
    """What was said to be so, and when."""

    calls: list[tuple[int, models.Invocation, dict[str, str | None]]] = field(default_factory=list)
    made: list[tuple[int, str]] = field(default_factory=list)
    deleting: dict[str, int] = field(default_factory=dict)
    deleted: list[tuple[int, str]] = field(default_factory=list)
    heads: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    """Of each session: from when it may have, and from when it has, stood on a checkpoint, by its digest."""


def now() -> int:
    return time.monotonic_ns()


class Load:
    """Callers that change sessions, and write down what they are told."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served = served
        self.told = Told()
        self.chance = random.Random(seed)

    async def session(self, number: int) -> None:
        sessions = self.served.sessions
        made = await sessions.create(CALLER, models.SessionRequest(name=f"s{number}"))
        self.told.made.append((now(), made.id))
        self.moved(made.id, 0, made.head.digest)
        for step in range(20):
            await self.call(made.id, f"{number}-{step}", linked=self.chance.random() < 0.3)
            match self.chance.choice(("fork", "rollback", "discard", "none", "none", "none")):
                case "fork":
                    await self.fork(made.id)
                case "rollback":
                    await self.rollback(made.id)
                case "discard":
                    await sessions.discard(CALLER, made.id)

    def moved(self, session: str, since: int, digest: str) -> None:
        self.told.heads.setdefault(session, []).append((since, now(), digest))

    async def call(self, session: str, key: str, *, linked: bool) -> None:
        changes: dict[str, str | None] = {"log": key, f"file-{self.chance.randrange(4)}": key * 50}
        if self.chance.random() < 0.3:
            changes[f"file-{self.chance.randrange(4)}"] = None
        since = now()
        done = await self.served.call(session, changes, key=key, linked=linked)
        assert done.checkpoint_after is not None
        self.moved(session, since, done.checkpoint_after)
        self.told.calls.append((now(), done, changes))

    async def fork(self, session: str) -> None:
        fork = await self.served.sessions.fork(CALLER, session, models.SessionFork())
        self.told.made.append((now(), fork.id))
        self.moved(fork.id, 0, fork.head.digest)
        await self.call(fork.id, f"fork-{fork.id}", linked=False)
        if self.chance.random() < 0.7:
            self.told.deleting[fork.id] = now()
            await self.served.sessions.delete(CALLER, fork.id)
            self.told.deleted.append((now(), fork.id))

    async def rollback(self, session: str) -> None:
        found = await self.served.sessions.checkpoints(CALLER, session, before=None, limit=10)
        to = self.chance.choice(found.checkpoints)
        since = now()
        await self.served.sessions.rollback(CALLER, session, to.id)
        self.moved(session, since, to.digest)


async def check(told: Told, state: Path, uppers: Path, moment: int) -> None:
    """What was told before a moment is so, whatever of the rest is."""
    async with serving(state, uppers) as served:
        await served.check()
        await served.cleared()
        with closing(connect_reader(state / "journal.sqlite3")) as connection:
            assert examine(connection, state).damaged == []
        rows = await served.rows()
        for at, session in told.made:
            assert session in rows or at >= moment or told.deleting.get(session, moment + 1) <= moment
        assert not [session for at, session in told.deleted if at < moment and session in rows]
        for done in [done for at, done, _ in told.calls if at < moment]:
            found = await served.journal.get(done.id)
            assert found is not None
            assert found.checkpoint_after == done.checkpoint_after
        for row in rows.values():
            await check_files(told, served, row, moment)
        for session in list(rows)[:2]:  # and they go on
            await served.call(session, {"after": "the power"}, linked=True)
            assert (await served.files((await served.rows())[session].head))["after"] == "the power"
        await served.check()


async def check_files(told: Told, served: Served, row: tables.Row, moment: int) -> None:
    """A session stands where it was told to, and has what the calls on the way there did."""
    line = await served.line(row.head)
    known = told.heads.get(row.id, [])
    newest = max((n for n, (_, at, _) in enumerate(known) if at < moment), default=0)
    may = {digest for n, (since, _, digest) in enumerate(known) if n >= newest and since <= moment}
    assert not known or line[-1].digest in may, "it stands where it was told, or was about to be"
    changes = {done.checkpoint_after: what for _, done, what in told.calls}
    if any(one.call is not None and one.digest not in changes for one in line):
        return  # it was about to be told of one
    expected: dict[str, str | None] = {}
    for one in line:
        expected |= changes.get(one.digest, {})
    files = await served.files(row.head)
    assert files.pop("one", None) == files.pop("other", None)
    assert files == {name: text for name, text in expected.items() if text is not None}


@pytest.mark.timeout(24 * 3600)
async def test_sessions_start_from_whatever_the_power_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = time.time_ns()
    with mounted(tmp_path / "fs") as disk:
        monkeypatch.setattr(store, "_libc", Syncing(disk))
        monkeypatch.setattr(unwritten, "PAUSE", 0.01)  # what is in the journal becomes files all the time
        async with serving(disk.at / "state", tmp_path / "uppers") as served:
            load = Load(served, seed)
            await asyncio.gather(*(load.session(number) for number in range(2)))
            await load.call(load.told.made[0][1], "last", linked=False)
            await served.check()
    monkeypatch.undo()
    record = disk.record()
    chance = random.Random(seed)
    for left, moment, which in Replay().losses(record, LOSSES, tmp_path, chance):
        try:
            await check(load.told, left / "state", tmp_path / "uppers", moment)
        except Exception as error:
            error.add_note(f"seed {seed}, {which}: {left}")
            raise
        shutil.rmtree(left)
