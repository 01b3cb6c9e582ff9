"""States of released schemas, frozen, and states that were damaged: all of them open, and the rest goes on.

``tests/states/schema-1.tar.xz`` is the state directory of a daemon of that schema that was killed by SIGKILL
while a call ran; it was made by hand, before ``scripts/freeze``. ``test_frozen_states`` has the others.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time
from typing import TYPE_CHECKING, Any

import pytest
from daemons import until
from frozen import thawed
from journals import behind, call, new_id, record

from sandboxd import errors, models
from sandboxd.journal import Accepted, Journal
from sandboxd.journal.search import Query

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

FROZEN = ["schema-1"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("name", FROZEN)
async def test_a_frozen_state_is_migrated_with_a_backup(tmp_path: Path, name: str) -> None:
    state = thawed(name, tmp_path / "state")
    async with Journal.open(state) as journal:
        report = await journal.verify(deep=True)
        assert (report.ok, report.records, report.files) == (True, 6, 5)
        listed = await journal.list()
        assert [one.outcome.cause.value if one.outcome else None for one in listed] == [
            None, "exited", "signalled", "exec_failed", "exited", "exited", "exited",
        ]  # fmt: skip
        (released,) = [one for one in listed if one.artifacts]
        assert await journal.referenced([file.digest for file in released.artifacts]) == {
            file.digest for file in released.artifacts
        }
        assert (await journal.oldest(1))[0].bytes > 4096
        assert len(await journal.open_calls()) == 1
    (backup,) = (state / "backups").iterdir()
    assert backup.name == f"journal-{name}.sqlite3"
    with sqlite3.connect(backup) as old:
        assert old.execute("PRAGMA user_version").fetchone() == (int(name.rpartition("-")[2]),)
        assert old.execute("SELECT count(*) FROM invocations").fetchone() == (7,)
    old.close()
    async with Journal.open(state) as journal:  # once
        assert (await journal.verify()).ok
    assert len(list((state / "backups").iterdir())) == 1


@pytest.mark.parametrize("name", FROZEN)
def test_a_daemon_takes_a_frozen_state_up(
    daemon_factory: Callable[..., Daemon], tmp_path: Path, name: str
) -> None:
    state = thawed(name, tmp_path / "state")
    daemon = daemon_factory(state=state)
    client = daemon.client()
    calls = {call.id: call for call in client.list().invocations}
    assert len(calls) == 7
    (flying,) = [one for one in calls.values() if one.key == "flying"]
    assert flying.outcome is not None
    assert flying.outcome.error is not None
    assert flying.outcome.error.code == "interrupted"
    assert client.get(flying.id).stdout.text == "before\n"  # type: ignore[union-attr]
    (loud,) = [one for one in calls.values() if one.stdout is not None and one.stdout.size == 2**20]
    assert len(b"".join(client.stdout(loud.id))) == 2**20
    assert client.run(["true"], key="once", labels={"team": "x"}).id in calls
    until(lambda: len(client.search("before").hits) == 1, "what an older version recorded is found")
    assert daemon.run("echo", "new").outcome is not None


async def test_a_backup_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = thawed("schema-1", tmp_path)
    usage = os.statvfs(tmp_path)
    full = type("Usage", (), {"free": 1000, "total": usage.f_blocks, "used": 0})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(errors.HostFailed, match="make room and start again"):
        async with Journal.open(state):
            pass
    monkeypatch.undo()
    async with Journal.open(state) as journal:
        assert (await journal.verify()).ok


async def test_tables_of_no_release_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    state = thawed("schema-12", tmp_path)
    behind(state, "ALTER TABLE queue DROP COLUMN resting", "ALTER TABLE merges DROP COLUMN own_size")
    before = (state / "journal.sqlite3").read_bytes()
    with pytest.raises(
        errors.ConfigInvalid, match=r"schema 12, and lacks merges\.own_size, queue\.resting: "
    ):
        async with Journal.open(state):
            pass
    assert (state / "journal.sqlite3").read_bytes() == before
    assert not (state / "backups").exists()


async def test_a_backup_takes_nothing_of_one_that_was_cut_off(tmp_path: Path) -> None:
    state = thawed("schema-12", tmp_path)
    (state / "backups").mkdir()
    for suffix in ("", "-journal", "-wal", "-shm"):
        (state / "backups" / f"journal-schema-12.tmp{suffix}").write_bytes(b"x" * 5000)
    async with Journal.open(state) as journal:
        assert (await journal.verify()).ok
    assert [path.name for path in (state / "backups").iterdir()] == ["journal-schema-12.sqlite3"]
    with sqlite3.connect(state / "backups" / "journal-schema-12.sqlite3") as old:
        assert old.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    old.close()


async def test_backups_are_bounded(tmp_path: Path) -> None:
    state = thawed("schema-1", tmp_path)
    (state / "backups").mkdir()
    for number in range(90, 95):
        path = state / "backups" / f"journal-schema-{number}.sqlite3"
        path.touch()
        os.utime(path, (number, number))
    async with Journal.open(state):
        pass
    assert sorted(path.name for path in (state / "backups").iterdir()) == [
        "journal-schema-1.sqlite3", "journal-schema-94.sqlite3",
    ]  # fmt: skip


async def test_a_damaged_body_is_named_and_the_others_are_listed(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        calls = [await record(journal, tmp_path, stdout=b"x") for _ in range(5)]
        waiting = call()
        await journal.accept(Accepted(waiting, "x"))
    behind(
        tmp_path,
        f"UPDATE invocations SET doc = CAST(substr(doc, 1, 100) AS BLOB) WHERE id = '{calls[2].id}'",
        f"UPDATE invocations SET doc = x'ff' WHERE id = '{waiting.id}'",
    )
    async with Journal.open(tmp_path) as journal:
        assert {one.id for one in await journal.list()} == {one.id for one in calls} - {calls[2].id}
        with pytest.raises(errors.JournalCorrupt, match=calls[2].id):
            await journal.get(calls[2].id)
        assert "the body of record 3 was changed" in str((await journal.verify()).problem)
        (left,) = await journal.in_flight()
        assert (left.id, left.caller.uid, left.policy.name) == (waiting.id, 1, "default")
        assert abs(left.times.accepted - time.time_ns() // 1000) < 600 * 10**6


def flipped(state: Path, table: str, rng: Any) -> None:
    """One byte of a page of a table is another."""
    path = state / "journal.sqlite3"
    data = bytearray(path.read_bytes())
    pages = [
        at for at in range(4096, len(data), 4096) if data[at] == 0x0D and b'{"id":"' in data[at : at + 4096]
    ]
    assert pages, table
    at = rng.choice(pages) + rng.randrange(4096)
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


async def test_whatever_byte_is_flipped_the_journal_opens_or_says_that_it_is_damaged(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    async with Journal.open(whole) as journal:
        calls = [await record(journal, whole) for _ in range(40)]
    rng = random.Random(11)
    listed = found = 0
    for number in range(60):
        state = tmp_path / str(number)
        shutil.copytree(whole, state)
        flipped(state, "invocations", rng)
        async with Journal.open(state) as journal:
            try:
                listed += len(await journal.list()) >= len(calls) - 5
                report = await journal.verify()
            except errors.JournalCorrupt:
                continue
            found += not report.ok
        shutil.rmtree(state)
    assert listed > 50  # most pages hold a handful of calls: the others are listed
    assert found > 20  # a flip in unused space changes nothing


def test_a_daemon_starts_on_a_damaged_state(daemon_factory: Callable[..., Daemon]) -> None:
    """A body, a spool and a blob are damaged, and so is a call that was in flight at the end."""
    daemon = daemon_factory()
    client = daemon.client()
    good = daemon.run("echo", "good")
    bad = daemon.run("sh", "-c", "echo shown; echo file > f", policy="files")
    spool = daemon.run("echo", "spooled")
    flying = client.start(["sleep", "1000"])
    until(lambda: client.get(flying.id).state == "running", "it runs")
    daemon.stop(9)
    behind(
        daemon.state,
        f"UPDATE invocations SET doc = x'7b' WHERE id IN ('{bad.id}', '{flying.id}')",
    )
    (daemon.state / "calls" / spool.id / "events").write_bytes(b"\xff" * 100)
    (daemon.state / "calls" / spool.id / "stdout").write_bytes(b"changed")
    digest = bad.artifacts[0].digest.removeprefix("sha256:")
    (daemon.state / "blobs" / "sha256" / digest[:2] / digest).write_bytes(b"other")
    again = daemon_factory(state=daemon.state, name="again")
    client = again.client()
    listed = {one.id: one for one in client.list().invocations}
    assert good.id in listed
    assert bad.id not in listed
    assert client.get(good.id).stdout.text == "good\n"  # type: ignore[union-attr]
    with pytest.raises(errors.SandboxdError):
        client.get(bad.id)
    ended = client.get(flying.id)
    assert ended.outcome is not None
    assert ended.outcome.error is not None
    assert ended.outcome.error.code == "interrupted"
    assert again.run("echo", "served").outcome is not None


async def test_records_and_ids_stay_in_order_when_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, real = [new_id()], time.time_ns
    for back in (3600, 7200, -7200, 86_400):
        monkeypatch.setattr(time, "time_ns", lambda back=back: real() - back * 10**9)
        ids += [new_id() for _ in range(50)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    async with Journal.open(tmp_path) as journal:
        for back in (0, 86_400, 3600):
            accepted = (real() - back * 10**9) // 1000
            await record(journal, tmp_path, id=new_id(), times=models.Times(accepted=accepted))
        assert (await journal.verify()).ok
        assert [one.n for one in await journal.oldest(9)] == [2, 3, 1]  # retention goes by their times
    monkeypatch.undo()
    async with Journal.open(tmp_path) as journal:
        newest = await journal.list(limit=1)
        assert new_id() > newest[0].id
    assert Query().limit == 100
