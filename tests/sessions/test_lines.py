"""Sessions without a daemon around them: what they leave behind, how deep they get, what a disk undoes."""

# ruff: noqa: ASYNC110, ASYNC221, ASYNC240  -- nothing tells when; and nothing else runs meanwhile

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import pytest

from sandboxd import errors, failpoint, models
from sandboxd.api.identity import Caller
from sandboxd.config import SessionShare
from sandboxd.journal import Journal
from sandboxd.lanes import Lanes
from sandboxd.session import MOST_LAYERS
from sandboxd.sessions import Sessions
from sandboxd.workspace import tables
from sandboxd.workspace.checkout import Owner
from sandboxd.workspace.effort import Effort
from sandboxd.workspace.handles import Handed, Handles
from sandboxd.workspace.layerimport import import_layer
from sandboxd.workspace.store import LayerStore
from sandboxd.workspace.view import Lent, View

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

CALLER = Caller(4242, 4242, frozenset(), "agent", ("*",))
ASKED = models.SessionRequest()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def opened(state: Path) -> AsyncIterator[Sessions]:
    """Sessions that nobody looks after yet."""
    state.mkdir(exist_ok=True)
    async with Journal.open(state) as journal:
        lanes = Lanes("directories", most=32, each=2, waiting=0)
        made = Sessions(
            journal, LayerStore(state / "sessions"), handles=Handles(), lanes=lanes, policy_of=str
        )
        await made.open()
        yield made


@asynccontextmanager
async def looked_after(sessions: Sessions) -> AsyncIterator[None]:
    """As the daemon does."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sessions.run)
        yield
        tasks.cancel_scope.cancel()


def touch(name: str = "file") -> object:
    def fill(_: Sequence[Path | Lent], into: int) -> None:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=into))

    return fill


async def change(
    sessions: Sessions, session: models.SessionInfo, name: str = "file", caller: Caller = CALLER
) -> models.CheckpointInfo:
    return await sessions.change(caller, session.id, touch(name), effort=Effort())  # type: ignore[arg-type]


def left(state: Path) -> set[str]:
    return {one.name for one in (state / "sessions" / "layers").iterdir()} - {"empty"}


async def known(sessions: Sessions) -> int:
    """Checkpoints that there are."""

    def read(connection: sqlite3.Connection) -> int:
        return int(connection.execute("SELECT count(*) FROM checkpoints").fetchone()[0])

    return await sessions._journal.read(read)


async def emptied(sessions: Sessions, state: Path) -> None:
    with anyio.fail_after(20):
        while left(state) or await known(sessions):
            await anyio.sleep(0.02)


@pytest.mark.parametrize("restart", ["before", "after", "never"])
@pytest.mark.parametrize("number", [3, 230])
async def test_what_a_fork_stood_on_goes_with_it(tmp_path: Path, number: int, restart: str) -> None:
    """Also where the session that made it went before: its room is its caller's again."""
    state, share = tmp_path / "s", replace(CALLER, sessions=SessionShare.model_validate({"size": "1MiB"}))

    async def fill(sessions: Sessions) -> None:
        made = await sessions.create(share, ASKED)
        for each in range(number):
            await change(sessions, made, f"f{each}", share)
        await sessions.fork(share, made.id, models.SessionFork(name="fork"))
        await sessions.rollback(share, "fork", made.head.id)  # it stands on its origin all the same
        await sessions.delete(share, made.id)
        while sessions.layers.to_prune:
            await anyio.sleep(0.01)
        assert await known(sessions) == number + 1

    async with opened(state) as sessions, looked_after(sessions):
        await fill(sessions)
        if restart == "never":
            await sessions.delete(share, "fork")
            await emptied(sessions, state)
            await fill(sessions)  # there is room for it again
    if restart == "never":
        return
    async with opened(state) as sessions:
        if restart == "after":
            await sessions.delete(share, "fork")
        else:
            async with looked_after(sessions):
                await sessions.delete(share, "fork")
                await emptied(sessions, state)
    async with opened(state) as sessions, looked_after(sessions):
        await emptied(sessions, state)


async def test_what_an_earlier_daemon_left_is_forgotten_at_start(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as sessions:
        made = await sessions.create(CALLER, ASKED)
        for _ in range(3):
            await change(sessions, made)

        def forget(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE checkpoints SET session = NULL")
            connection.execute("DELETE FROM sessions")

        await sessions._journal.write(forget)
    async with opened(tmp_path / "s") as sessions, looked_after(sessions):
        await emptied(sessions, tmp_path / "s")


async def test_a_session_that_nobody_merges_gets_so_deep_and_goes_on_once_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as sessions:
        made = await sessions.create(CALLER, ASKED)
        for number in range(MOST_LAYERS):
            await change(sessions, made, f"f{number}")
        before = left(tmp_path / "s")
        with pytest.raises(errors.QuotaExceeded, match="201 layers, more than the 200") as caught:
            await change(sessions, made)
        assert caught.value.details == {"quota": "session.layers", "asked": 201, "allowed": 200}
        assert left(tmp_path / "s") == before
    async with (
        opened(tmp_path / "s") as sessions,
        looked_after(sessions),
    ):  # which knows of no merge that is due
        with pytest.raises(errors.QuotaExceeded):
            await change(sessions, made)
        with anyio.fail_after(60):
            while (await sessions.get(CALLER, made.id)).layers > 20:
                await anyio.sleep(0.05)
        await change(sessions, made)
        async with sessions.standing(CALLER, made.id, None) as (standing,):
            with View(standing.layers) as view:
                names = {entry.path for entry in view.walk()}
        assert names == {b"file", *(b"f%d" % number for number in range(MOST_LAYERS))}


async def test_hard_links_do_not_keep_layers_from_being_merged(tmp_path: Path) -> None:
    """ext4 refuses the 65,001st name of a file, and a merge makes as many again as its layer has."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("0"))
        for number in range(1, 40_000):
            entry = tarfile.TarInfo(str(number))
            entry.type, entry.linkname = tarfile.LNKTYPE, "0"
            tar.addfile(entry)
    body.seek(0)

    def fill(below: Sequence[Path | Lent], into: int) -> None:
        with View(below) as view:
            import_layer(body, into, view, owner=(1000, 1000))

    async with opened(tmp_path / "s") as sessions, looked_after(sessions):
        made = await sessions.create(CALLER, ASKED)
        await sessions.change(CALLER, made.id, fill, effort=Effort())
        for number in range(16 * 3):
            await change(sessions, made, f"f{number}")
        with anyio.fail_after(60):
            while (await sessions.get(CALLER, made.id)).layers > 6:
                await anyio.sleep(0.05)
        found = await sessions.get(CALLER, made.id)
        assert 40_000 > found.inodes >= 16 * 3
        async with sessions.standing(CALLER, made.id, None) as (standing,):
            with View(standing.layers) as view:
                assert len(view.children(view.root())) == 40_000 + 16 * 3


async def test_a_merge_that_fails_keeps_no_other_from_being_made(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as sessions:
        made = await sessions.create(CALLER, ASKED)
        for number in range(16 * 3 + 1):
            await change(sessions, made, f"f{number}")
        async with sessions.standing(CALLER, made.id, None) as (standing,):
            lowest = standing.layers[-1]
        fixed = lowest / "f0"
        subprocess.run(["chattr", "+i", fixed], check=True)  # it gets no further name
        async with looked_after(sessions):
            try:
                with anyio.fail_after(30):
                    while (await sessions.get(CALLER, made.id)).layers > 16 + 2 + 1:
                        await anyio.sleep(0.05)
            finally:
                subprocess.run(["chattr", "-i", fixed], check=True)
            for number in range(16):
                await change(sessions, made, f"g{number}")
            with anyio.fail_after(30):
                while (await sessions.get(CALLER, made.id)).layers > 4 + 1:
                    await anyio.sleep(0.05)


async def test_calls_that_end_at_once_do_not_share_the_same_room(tmp_path: Path) -> None:
    room = 10
    share = replace(CALLER, sessions=SessionShare.model_validate({"size": f"{4 * room}KiB"}))
    async with opened(tmp_path / "s") as sessions:
        made = [await sessions.create(share, ASKED) for _ in range(30)]
        kept = []

        async def one(session: models.SessionInfo) -> None:
            try:
                kept.append(await change(sessions, session, caller=share))
            except errors.QuotaExceeded as error:
                assert error.details["quota"] == "sessions.size"  # noqa: PT017

        async with anyio.create_task_group() as tasks:
            for session in made:
                tasks.start_soon(one, session)
        assert len(kept) == room
        assert len(left(tmp_path / "s")) == room


async def test_a_caller_has_so_many_entries(tmp_path: Path) -> None:
    share = replace(CALLER, sessions=SessionShare(inodes=10))
    async with opened(tmp_path / "s") as sessions:
        with pytest.raises(errors.QuotaExceeded, match=r"quota.inodes 11 is more than the 10"):
            await sessions.create(share, models.SessionRequest(quota=models.SessionQuota(inodes=11)))
        made = await sessions.create(share, ASKED)
        for _ in range(5):  # an entry, and the checkpoint
            await change(sessions, made, caller=share)
        with pytest.raises(errors.QuotaExceeded, match="12 inodes, more than the 10") as caught:
            await change(sessions, made, caller=share)
        assert caught.value.details == {"quota": "sessions.inodes", "asked": 12, "allowed": 10}
        assert len(left(tmp_path / "s")) == 5


async def test_a_session_that_was_used_since_is_not_over(tmp_path: Path) -> None:
    async with opened(tmp_path / "s") as sessions:
        made = await sessions.create(CALLER, models.SessionRequest(idle=1_000_000))
        await anyio.sleep(1.1)
        row = await sessions._journal.read(lambda connection: tables.find(connection, made.id, None))
        assert row is not None
        assert sessions.holds.is_over(row)
        now = time.time_ns() // 1000
        await sessions._journal.write(lambda connection: tables.touch(connection, row, at=now))
        assert not await sessions._delete(row, over=now)
        assert (await sessions.get(CALLER, made.id)).id == made.id
        assert await sessions._delete(row, over=now + 2_000_000)


async def test_what_could_not_be_synced_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked was told that it is not so: it must not come true when the disk is there again."""
    faults = tmp_path / "faults"
    faults.mkdir()
    monkeypatch.setattr(failpoint, "_failpoints", failpoint._Failpoints(faults))
    async with opened(tmp_path / "s") as sessions:
        made = await sessions.create(CALLER, ASKED)
        kept = await change(sessions, made)
        (faults / "journal.sync").write_text("EIO")
        with pytest.raises(errors.HostFailed, match="could not be synced"):
            await change(sessions, made, "second")
        (faults / "journal.sync").unlink()
        with anyio.fail_after(10):
            while sessions._journal._writer._restoring is not None:
                await anyio.sleep(0.01)
        assert (await sessions.get(CALLER, made.id)).head.id == kept.id
        assert await known(sessions) == 2
        (faults / "journal.sync").write_text("EIO")
        with pytest.raises(errors.HostFailed, match="could not be synced"):
            await sessions.create(CALLER, models.SessionRequest(name="mine"))
        (faults / "journal.sync").unlink()
        with anyio.fail_after(10):
            while sessions._journal._writer._restoring is not None:
                await anyio.sleep(0.01)
        assert await known(sessions) == 2
        await sessions.create(CALLER, models.SessionRequest(name="mine"))
        await change(sessions, made, "third")
    async with opened(tmp_path / "s") as sessions:
        async with sessions.standing(CALLER, made.id, None) as (standing,):
            with View(standing.layers) as view:
                assert {entry.path for entry in view.walk()} == {b"file", b"third"}
        assert len(left(tmp_path / "s")) == 2


async def test_a_directory_is_not_lent_to_a_session_that_is_removed(tmp_path: Path) -> None:
    """Nothing else would let go of it."""
    place = tmp_path / "lent"
    place.mkdir()
    os.chown(place, CALLER.uid, CALLER.gid)

    def handed(sessions: Sessions) -> str:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        return sessions.checkouts._handles.add(Handed(fd, Owner(CALLER.uid, CALLER.gid, os.getpid())))

    for pause in (0, 0.002, 0.005, 0.01, 0.02):
        async with opened(tmp_path / "s") as sessions:
            try:
                made = await sessions.create(CALLER, models.SessionRequest(checkout=handed(sessions)))
            finally:
                await sessions.close()
        async with opened(tmp_path / "s") as sessions:

            async def lend(made: models.SessionInfo = made, sessions: Sessions = sessions) -> None:
                with suppress(errors.NotFound):
                    await sessions.lend(CALLER, made.id, handed(sessions))

            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(lend)
                    await anyio.sleep(pause)
                    await sessions.delete(CALLER, made.id)
                assert not sessions.checkouts._lent
                assert not list(sessions.layers._store.mounts.iterdir())
            finally:
                await sessions.close()
