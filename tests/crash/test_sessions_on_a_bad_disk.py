"""Sessions on a disk that is full or breaks: each change is told as it is, done or not, and all goes on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

import anyio
import pytest
from disks import GROWING, Syncing, mounted
from sessioncalls import CALLER, Served, serving

from sandboxd import errors, models
from sandboxd.workspace import stacks, store, tables, unwritten

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from disks import Disk

LONG = int(os.environ.get("SANDBOXD_CRASHES", "0")) >= 100
JOURNAL = r"journal\.sqlite3-wal$"
LAYERS = r"/sessions/"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    with mounted(tmp_path / "fs") as disk:
        monkeypatch.setattr(store, "_libc", Syncing(disk))
        monkeypatch.setattr(unwritten, "PAUSE", 0.01)
        monkeypatch.setattr(stacks, "FAN", 3)
        yield disk


Snapshot = dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]]


async def snapshot(served: Served) -> Snapshot:
    """Where every session stands, which checkpoints it has, and its files."""
    found: Snapshot = {}
    for row in (await served.rows()).values():
        own = await served.journal.read(
            lambda it, id_=row.id: tables.checkpoints(it, id_, before=None, limit=100)  # type: ignore[misc]
        )
        ids = tuple(sorted(one.id for one in own))
        found[row.id] = (row.head, row.origin, ids, await served.files(row.head))
    return found


async def create(served: Served, _: str, __: str) -> object:
    return await served.sessions.create(CALLER, models.SessionRequest(name="another"))


async def call(served: Served, session: str, _: str) -> object:
    return await served.call(session, {"log": "more"})


async def linked(served: Served, session: str, _: str) -> object:
    return await served.call(session, {"log": "more"}, linked=True)


async def fork(served: Served, session: str, _: str) -> object:
    return await served.sessions.fork(CALLER, session, models.SessionFork(name="fork"))


async def rollback(served: Served, session: str, first: str) -> object:
    return await served.sessions.rollback(CALLER, session, first)


async def discard(served: Served, session: str, _: str) -> object:
    return await served.sessions.discard(CALLER, session)


async def delete(served: Served, session: str, _: str) -> object:
    await served.sessions.delete(CALLER, session)
    return None


async def merge(served: Served, session: str, _: str) -> object:
    head = (await served.rows())[session].head
    await served.sessions.layers.merge(head, lent=False)
    return None


Change = Callable[[Served, str, str], Coroutine[None, None, object]]
CHANGES: list[Change] = [create, call, linked, fork, rollback, discard, delete, merge]


async def held_is_right(served: Served) -> None:
    """What is counted is what is there."""
    with anyio.fail_after(20):
        while True:
            held = await served.journal.read(tables.held)
            if served.sessions.layers.held.size_of(CALLER.uid) == held.get(CALLER.uid, (0, 0))[0]:
                return
            await anyio.sleep(0.02)


FAULTS = {
    "sync": (["fsync"], JOURNAL, "EIO"),
    "sync-full": (["fsync"], JOURNAL, "ENOSPC"),
    "write": (["write"], JOURNAL, "EIO"),
    "write-full": (["grow", "write"], JOURNAL, "ENOSPC"),
    "syncfs": (["syncfs"], "", "EIO"),
    "layers-full": (GROWING, LAYERS, "ENOSPC"),
    "layers": (["write", "setxattr"], LAYERS, "EIO"),
}
EACH = [
    (name, change, attended)
    for name in FAULTS
    for change in CHANGES
    for attended in (True, False)
    if LONG
    or (attended and (name == "sync" or (name in {"write-full", "syncfs"} and change in {linked, discard})))
]


@pytest.mark.parametrize(
    ("fault", "change", "attended"), EACH, ids=lambda one: getattr(one, "__name__", str(one))
)
async def test_a_change_that_fails_is_said_so_and_leaves_a_session_whole(
    disk: Disk, tmp_path: Path, fault: str, change: Change, *, attended: bool
) -> None:
    on, path, do = FAULTS[fault]
    state, uppers = disk.at / "state", tmp_path / "uppers"
    async with serving(state, uppers, attended=attended) as served:
        made = await served.sessions.create(CALLER, models.SessionRequest(name="one"))
        firsts = [await served.call(made.id, {"log": f"line {number}"}) for number in range(4)]
        line = await served.line((await served.rows())[made.id].head)
        await served.sessions.rollback(CALLER, made.id, line[2].id)
        await served.call(made.id, {"log": "after"})
        before = await snapshot(served)
        disk.fail(*on, path=path, do=do)
        doing = asyncio.create_task(change(served, made.id, line[1].id))
        await asyncio.wait({doing}, timeout=0.4)
        disk.mend()
        failed: errors.SandboxdError | None = None
        try:
            with anyio.fail_after(20):
                await doing
        except errors.HostFailed as error:
            failed = error
        await goes_on(served)
        after = await snapshot(served)
        extra = after.keys() - before.keys()
        names = {row.name for row in (await served.rows()).values()}
        expected = dict(after) if failed is None else dict(before)
        if failed is not None:
            assert str(failed)
            assert change is not merge, "what is done beside calls fails no caller"
            assert len(extra) == 1, "only the one that it goes on with is new"
            assert after[made.id] == before[made.id], f"told that it failed, with {failed}"
            assert names == {"one", None}
        else:
            those: dict[Change, set[str | None]] = {
                create: {"one", "another"},
                fork: {"one", "fork"},
                delete: set(),
            }
            assert names == {None} | those.get(change, {"one"})
        await served.check()
        await held_is_right(served)
        for first in firsts:
            found = await served.journal.get(first.id)
            assert found is not None
            assert found.outcome is not None
    async with serving(state, uppers) as served:
        again = await snapshot(served)
        assert {id_: again.get(id_) for id_ in expected} == expected, "and so it is after a restart"
        await served.check()
        await served.cleared()
        await held_is_right(served)


async def goes_on(served: Served) -> None:
    """It takes what it is asked for, as soon as the disk does."""
    with anyio.fail_after(20):
        while True:
            try:
                made = await served.sessions.create(CALLER, models.SessionRequest())
                done = await served.call(made.id, {"a": "b"}, linked=True)
            except errors.HostFailed:
                await anyio.sleep(0.05)
            else:
                assert done.checkpoint_before != done.checkpoint_after
                return


@pytest.mark.parametrize("times", [1, 2])
async def test_what_was_written_before_a_sync_that_failed_stays_in_the_journal(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """A sync that succeeds after one that failed says nothing of what was written before."""
    monkeypatch.setattr(unwritten, "STEP", 1)
    async with serving(disk.at / "state", tmp_path / "uppers", attended=False) as served:
        made = await served.sessions.create(CALLER, models.SessionRequest())
        for number in range(3):
            await served.call(made.id, {"log": f"line {number}"})
        head = (await served.rows())[made.id].head
        assert await served.files(head) == {"log": "line 2"}
        disk.fail("syncfs", do="EIO", times=times)
        for _ in range(3):
            await served.sessions.layers.unwritten._sync()
        packs = await served.journal.read(lambda it: tables.packs(it, after="", limit=10))
        assert len(packs) == 3
        await served.call(made.id, {"log": "line 3"})
        head = (await served.rows())[made.id].head
        assert await served.files(head) == {"log": "line 3"}
        disk.mend()
        await served.sessions.layers.unwritten._sync()
        packs = await served.journal.read(lambda it: tables.packs(it, after="", limit=10))
        assert len(packs) == 3, "what came after it is on disk"
    async with serving(disk.at / "state", tmp_path / "uppers", attended=False) as served:
        assert await served.files(head) == {"log": "line 3"}
        assert not await served.journal.read(lambda it: tables.packs(it, after="", limit=10))
