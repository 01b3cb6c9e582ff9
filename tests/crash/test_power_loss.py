"""The power goes at any moment: a journal starts from what the disk holds then, and has what it promised.

``SANDBOXD_POWER_LOSSES`` says at how many moments, chosen by chance; 0: at every one.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from typing import TYPE_CHECKING

import pytest
from crashing import Crashing
from daemons import IMAGES, needs_containers
from disks import mounted
from invocations import DIGEST, call, ended
from powerloss import Replay

from sandboxd import models
from sandboxd.journal import Accepted, Journal, outcome_header

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.journal import Head

LOSSES = int(os.environ.get("SANDBOXD_POWER_LOSSES", "40"))
WHOLE = max(2, LOSSES // 20) if LOSSES else 100  # of them, how many a whole daemon starts from


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Told:
    """What a journal said that it has, and when."""

    def __init__(self) -> None:
        self.accepted: list[tuple[int, models.Invocation]] = []
        self.ended: list[tuple[int, models.Invocation, Head]] = []

    async def one(self, journal: Journal, uid: int, key: str) -> None:
        invocation = call(uid=uid, key=key)
        assert await journal.accept(Accepted(invocation, DIGEST)) is None
        self.accepted.append((time.monotonic_ns(), invocation))
        journal.follow(invocation.model_copy(update={"state": models.State.RUNNING}))
        done = ended(invocation)
        head = await journal.ended(done, outcome_header(done))
        self.ended.append((time.monotonic_ns(), done, head))

    async def check(self, directory: Path, moment: int) -> None:
        async with Journal.open(directory) as journal:
            newest = None
            for at, done, head in self.ended:
                if at < moment:
                    newest = max(newest or head, head, key=lambda one: one.n)
                    assert await journal.get(done.id) == _stored(done)
            assert (report := await journal.verify(None if newest is None else str(newest))).ok, (
                report.problem
            )
            for at, invocation in self.accepted:
                if at < moment:
                    assert await journal.get(invocation.id) is not None
                    assert invocation.key is not None
                    found = await journal.find_key(invocation.caller.uid, invocation.key)
                    assert found is not None
                    assert found.id == invocation.id
            for open_ in await journal.in_flight():  # as a daemon does when it starts
                done = ended(open_, models.Cause.FAILED)
                await journal.ended(done, outcome_header(done))
            assert (await journal.verify()).ok


def _stored(done: models.Invocation) -> models.Invocation:
    """As the journal has it: the heads of streams are in the spool."""
    assert done.stdout is not None
    return done.model_copy(update={"stdout": done.stdout.model_copy(update={"text": "", "complete": False})})


@pytest.mark.timeout(24 * 3600)
async def test_a_journal_starts_from_whatever_the_power_left(tmp_path: Path) -> None:
    told = Told()
    with mounted(tmp_path / "fs") as disk:
        async with Journal.open(disk.at / "state") as journal:

            async def several(uid: int) -> None:
                for number in range(20):
                    await told.one(journal, uid, f"key-{number}")

            await asyncio.gather(*(several(uid) for uid in range(4)))
    record = disk.record()
    chance = random.Random(time.time_ns())
    replay = Replay()
    for left, moment, _ in replay.losses(record, LOSSES, tmp_path, chance):
        await told.check(left / "state", moment)
        shutil.rmtree(left)
    left = tmp_path / "whole"
    replay.leave(left, "nothing", chance)
    await told.check(left / "state", time.monotonic_ns())


@pytest.mark.timeout(24 * 3600)
def test_a_daemon_starts_from_whatever_the_power_left(place: Path, no_leaks: None) -> None:
    needs_containers()
    with Crashing(place, seed=time.time_ns() % 1_000_000) as crashing:
        with mounted(place / "fs") as disk:
            crashing.state = disk.at / "state"
            for kind in ("session", "kept"):  # layers need what FUSE has not, and are synced as a whole
                crashing.kinds.remove(kind)
            assert crashing.start()
            crashing.start_callers()
            time.sleep(3)
            crashing.kill()
            crashing.drop_callers()
            crashing.leave()
        crashing.forget_runs()
        record = disk.record()
        for left, moment, _ in Replay().losses(record, WHOLE, place, crashing.random):
            crashing.state = left / "state"
            crashing.state.mkdir(exist_ok=True)
            (crashing.state / "images").unlink(missing_ok=True)
            (crashing.state / "images").symlink_to(IMAGES)
            assert crashing.start(), crashing.said()
            crashing.check_at_rest(before=moment)
            crashing.leave()
