"""``sandboxd journal`` on a state directory, as root runs it beside a daemon."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from journals import behind, record, spoiled

from sandboxd.journal import Journal
from sandboxd.journal.lock import Lock

SANDBOXD = Path(sys.executable).with_name("sandboxd")


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, which must not fail with a traceback."""
    found = subprocess.run([SANDBOXD, *argv], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in found.stderr, found.stderr
    return found


def filled(state: Path, count: int = 3) -> None:
    """A journal of a daemon that was stopped."""

    async def fill() -> None:
        async with Journal.open(state) as journal:
            for number in range(count):
                await record(journal, state, stdout=f"out {number}\n".encode(), files={"f": b"%d" % number})

    asyncio.run(fill())


def test_a_head_is_exported_and_finds_a_cut_tail(tmp_path: Path) -> None:
    state = tmp_path / "state"
    filled(state)
    done = run("journal", "verify", "--state", state)
    assert (done.returncode, done.stdout.startswith("3 records")) == (0, True)
    head, key = tmp_path / "head", tmp_path / "key"
    head.write_text(run("journal", "head", "--state", state).stdout)
    key.write_text(run("journal", "key", "--state", state).stdout)
    assert json.loads(head.read_text())["n"] == 3
    assert run("journal", "verify", "--head", head, "--state", state).returncode == 0
    behind(
        state,
        "DELETE FROM heads",
        "DELETE FROM invocations WHERE id = (SELECT id FROM records WHERE n = 3)",
        "DELETE FROM records WHERE n = 3",
    )
    assert run("journal", "verify", "--state", state).returncode == 0  # nothing here says that it was longer
    found = run("journal", "verify", "--head", head, "--state", state)
    assert (found.returncode, "cut off" in found.stderr) == (1, True)
    (state / "journal.key").unlink()
    assert run("journal", "key", "--state", state).stdout == key.read_text()  # the public one is still there
    (state / "journal.pub").unlink()
    found = run("journal", "verify", "--head", head, "--state", state)
    assert (found.returncode, "--key" in found.stderr) == (1, True)
    found = run("journal", "verify", "--head", head, "--key", key, "--state", state)
    assert (found.returncode, "cut off" in found.stderr) == (1, True)
    found = run("journal", "verify", "--head", head, "--key", head, "--state", state)
    assert (found.returncode, "no public Ed25519 key" in found.stderr) == (1, True)
    found = run("journal", "verify", "--head", "/nonexistent", "--state", state)
    assert (found.returncode, "no file with one" in found.stderr) == (1, True)


def test_damaged_files_are_named_with_their_calls(tmp_path: Path) -> None:
    filled(tmp_path)
    call = sorted((tmp_path / "calls").iterdir())[1]
    (call / "stdout").write_bytes(b"changed")
    assert run("journal", "verify", "--state", tmp_path).returncode == 0
    found = run("journal", "verify", "--deep", "--state", tmp_path)
    assert found.returncode == 1
    assert f"record 2, call {call.name}: stdout was changed" in found.stderr
    told = json.loads(run("journal", "verify", "--deep", "--json", "--state", tmp_path).stdout)
    assert (told["ok"], told["files"], [each["n"] for each in told["damaged"]]) == (False, 6, [2])


def test_what_no_head_vouches_for_is_said(tmp_path: Path) -> None:
    """Who can write the journal can remove the heads in it too: then it says that nothing vouches."""
    filled(tmp_path, 5)
    key = tmp_path / "node.pem"
    key.write_text(run("journal", "key", "--state", tmp_path).stdout)
    id_ = json.loads(run("journal", "key", "--json", "--state", tmp_path).stdout)["id"]
    found = run("journal", "verify", "--key", key, "--state", tmp_path)
    assert found.returncode == 0
    assert f"signed up to record 5 with the key {id_}" in found.stdout
    assert "nothing signed" not in found.stdout
    head = tmp_path / "head"
    head.write_text(run("journal", "head", "--state", tmp_path).stdout)
    behind(tmp_path, "DELETE FROM heads")
    found = run("journal", "verify", "--key", key, "--state", tmp_path)
    assert "nothing signed vouches for records after 0" in found.stdout
    assert "signed up to" not in found.stdout
    found = run("journal", "verify", "--head", head, "--state", tmp_path)  # that one is signed as well
    assert f"signed up to record 5 with the key {id_}" in found.stdout
    behind(
        tmp_path,
        "UPDATE invocations SET doc = NULL, pruned = 1 WHERE id = (SELECT id FROM records WHERE n = 2)",
    )
    found = run("journal", "verify", "--state", tmp_path)
    assert (found.returncode, "1 of them were pruned" in found.stdout) == (0, True)


def test_a_named_key_alone_is_believed(tmp_path: Path) -> None:
    """A copy whose chain was written by another node brings that one's key, which nobody asked for."""
    filled(tmp_path / "genuine")
    filled(tmp_path / "copy")
    key = tmp_path / "genuine.pem"
    key.write_text(run("journal", "key", "--state", tmp_path / "genuine").stdout)
    assert run("journal", "verify", "--state", tmp_path / "copy").returncode == 0
    found = run("journal", "verify", "--state", tmp_path / "copy", "--key", key)
    assert (found.returncode, "does not hold" in found.stderr) == (1, True)
    other = tmp_path / "copy.pem"
    other.write_text(run("journal", "key", "--state", tmp_path / "copy").stdout)
    both = ("--key", key, "--key", other)
    assert run("journal", "verify", "--state", tmp_path / "copy", *both).returncode == 0


def test_a_body_that_is_gone_is_shown_as_damage(tmp_path: Path) -> None:
    filled(tmp_path)
    behind(tmp_path, "UPDATE invocations SET doc = NULL WHERE id = (SELECT id FROM records WHERE n = 2)")
    found = run("journal", "show", "2", "--state", tmp_path)
    assert (found.returncode, "not retention" in found.stderr) == (1, True)
    found = run("journal", "verify", "--state", tmp_path)
    assert (found.returncode, "the body of record 2 is gone" in found.stderr) == (1, True)


def test_the_index_of_sessions_is_made_again(tmp_path: Path) -> None:
    async def fill() -> list[str]:
        async with Journal.open(tmp_path) as journal:
            return [(await record(journal, tmp_path, session="s")).id for _ in range(3)]

    ids = asyncio.run(fill())
    behind(tmp_path, "DELETE FROM session_records WHERE n = 2")
    found = run("journal", "verify", "--state", tmp_path)
    assert found.returncode == 1
    assert f"record 2, call {ids[1]}: the index of sessions does not have it" in found.stderr
    assert "sandboxd journal reindex" in found.stderr
    refused = run("journal", "export", "--session", "s", "-o", tmp_path / "x", "--state", tmp_path)
    assert refused.returncode != 0
    assert "sandboxd journal reindex" in refused.stderr
    lock = Lock(tmp_path / "lock")
    assert "another sandboxd" in run("journal", "reindex", "--state", tmp_path).stderr
    lock.release()
    done = run("journal", "reindex", "--state", tmp_path)
    assert (done.returncode, done.stdout) == (0, "3 records are of a session; the index has them\n")
    assert run("journal", "verify", "--state", tmp_path).returncode == 0
    spoiled(tmp_path, "session_records")
    assert "the index of sessions cannot be read" in run("journal", "verify", "--state", tmp_path).stderr
    assert run("journal", "reindex", "--state", tmp_path).returncode == 0
    assert run("journal", "verify", "--state", tmp_path).returncode == 0
    assert (
        run("journal", "export", "--session", "s", "-o", tmp_path / "x", "--state", tmp_path).returncode == 0
    )
    told = run("journal", "verify", "--bundle", tmp_path / "x")
    assert "all calls of session s among these records are in it" in told.stdout
    assert run("journal", "reindex", "--state", tmp_path / "nowhere").returncode != 0


@pytest.mark.parametrize("damage", ["zeroed", "emptied", "missing"])
def test_the_index_of_sessions_stays_where_records_cannot_be_read(tmp_path: Path, damage: str) -> None:
    """It may be all that is left to say which calls were of a session."""

    async def fill() -> None:
        async with Journal.open(tmp_path) as journal:
            for _ in range(3):
                await record(journal, tmp_path, session="s")

    asyncio.run(fill())
    if damage == "missing":
        behind(tmp_path, "DELETE FROM records WHERE n = 2")
    else:
        # an empty leaf is a sound page to SQLite: only the signed head says what was there
        spoiled(tmp_path, "records", bytes(4096) if damage == "zeroed" else b"\x0d" + bytes(4095))
    behind(tmp_path, "DELETE FROM session_records WHERE n = 3")
    found = run("journal", "verify", "--state", tmp_path)
    assert (found.returncode, "reindex" in found.stderr) == (1, False)
    refused = run("journal", "reindex", "--state", tmp_path)
    assert refused.returncode != 0
    assert f"record {2 if damage == 'missing' else 1} cannot be read, or is gone" in refused.stderr
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as connection:
        assert connection.execute("SELECT n FROM session_records").fetchall() == [(1,), (2,)]


def test_damaged_pages_are_named_and_indexes_made_again(tmp_path: Path) -> None:
    filled(tmp_path)
    spoiled(tmp_path, "invocation_keys")
    spoiled(tmp_path, "sqlite_autoindex_requests_1")
    for deep in ([], ["--deep"]):
        found = run("journal", "verify", *deep, "--state", tmp_path)
        assert found.returncode == 1
        assert "the index invocation_keys of table invocations of the journal's database" in found.stderr
        assert "the index sqlite_autoindex_requests_1 of table requests" in found.stderr
        assert "`sandboxd journal reindex` makes indexes again" in found.stderr
    done = run("journal", "reindex", "--state", tmp_path)
    assert done.returncode == 0
    assert "the index invocation_keys of table invocations was made again" in done.stdout
    assert run("journal", "verify", "--deep", "--state", tmp_path).returncode == 0
    for table in ("queue", "sessions", "checkpoints", "heads", "contents"):
        copy = tmp_path / table
        copy.mkdir()
        shutil.copy(tmp_path / "journal.sqlite3", copy)
        spoiled(copy, table)
        for deep in ([], ["--deep"]):
            found = run("journal", "verify", *deep, "--state", copy)
            assert found.returncode == 1
            assert f"the table {table} of the journal's database is damaged" in found.stderr
            assert "reindex" not in found.stderr
        refused = run("journal", "reindex", "--state", copy)
        if table == "queue":  # the daemon saves what it can of it
            assert (refused.returncode, "a daemon that starts saves what it can" in found.stderr) == (0, True)
            continue
        assert refused.returncode != 0
        named = "what was signed of records cannot be read" if table == "heads" else f"the table {table}"
        assert named in refused.stderr
