"""A journal that is empty, or missing, beside what an earlier one has left."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from journals import record

from sandboxd import errors
from sandboxd.journal import Journal

pytestmark = pytest.mark.anyio

SANDBOXD = Path(sys.executable).with_name("sandboxd")


def emptied(state: Path, how: str) -> None:
    path = state / "journal.sqlite3"
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:  # a database without anything in it
        path.unlink()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")


@pytest.mark.parametrize("how", ["missing", "empty", "bare"])
@pytest.mark.parametrize("left", ["call", "layer", "backup"])
async def test_what_an_earlier_journal_left_is_not_lost(tmp_path: Path, how: str, left: str) -> None:
    async with Journal.open(tmp_path) as journal:
        await record(journal, tmp_path, stdout=b"x" if left == "call" else b"")
    place = {
        "call": tmp_path / "calls",
        "layer": tmp_path / "sessions" / "layers" / "0123",
        "backup": tmp_path / "backups" / "journal-schema-3.sqlite3",
    }[left]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(exist_ok=True)
    (tmp_path / "sessions" / "layers" / "empty").mkdir(parents=True, exist_ok=True)
    emptied(tmp_path, how)
    log = tmp_path / "journal.sqlite3-wal"
    log.write_bytes(b"what was not moved yet")
    for _ in range(2):
        with pytest.raises(errors.ConfigInvalid, match=r"missing or empty.* 1 .*move all") as told:
            async with Journal.open(tmp_path):
                pass
        assert str(place if left == "call" else place.parent) in str(told.value)
        assert how == "bare" or log.read_bytes() == b"what was not moved yet"
    log.unlink(missing_ok=True)
    place.rename(tmp_path / "away")
    async with Journal.open(tmp_path) as journal:
        assert journal.count == 0


async def test_a_first_start_that_was_cut_short_is_no_earlier_journal(tmp_path: Path) -> None:
    """What there is before anything of a call is on disk: keys, the lock, empty directories, blobs."""
    for name in ("calls", "sessions/layers/empty", "sessions/scratch", "blobs/sha256/ab", "backups"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "blobs/sha256/ab" / ("ab" * 32)).write_bytes(b"an input")
    (tmp_path / "journal.sqlite3").touch()
    async with Journal.open(tmp_path) as journal:
        await record(journal, tmp_path)
    assert (tmp_path / "journal.key").exists()


@pytest.mark.parametrize("command", [("verify",), ("verify", "--deep"), ("head",), ("show", "1")])
async def test_a_journal_of_a_newer_version_is_not_judged(tmp_path: Path, command: tuple[str, ...]) -> None:
    async with Journal.open(tmp_path) as journal:
        await record(journal, tmp_path)
    assert asked(tmp_path, command).returncode == 0
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 999")
    done = asked(tmp_path, command)
    assert (done.returncode, done.stdout) == (1, "")
    assert "was written by a newer sandboxd (schema 999" in done.stderr
    emptied(tmp_path, "empty")
    done = asked(tmp_path, command)
    assert (done.returncode, "is empty" in done.stderr) == (1, True)


def asked(state: Path, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SANDBOXD, "journal", *command, "--state", str(state)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
