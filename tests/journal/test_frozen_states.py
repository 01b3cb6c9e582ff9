"""States that released versions left when they were killed: this version has all that is in them."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from daemons import start_daemon, until
from freeze import LISTING, POLICIES, SECRET
from frozen import FROZEN, expected, thawed

from sandboxd import Client, errors
from sandboxd.journal import Journal, schema

if TYPE_CHECKING:
    from pathlib import Path

LONG = int(os.environ.get("SANDBOXD_CRASHES", "0")) >= 100
SERVED = FROZEN if LONG else [FROZEN[0], FROZEN[len(FROZEN) // 2], FROZEN[-1]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_each_schema_since_the_first_complete_one_is_frozen() -> None:
    """Whoever adds a migration freezes what the version before it leaves: ``scripts/freeze COMMIT``."""
    assert [int(name[7:]) for name in FROZEN] == list(range(5, len(schema.MIGRATIONS)))
    assert [expected(name)["schema"] for name in FROZEN] == [int(name[7:]) for name in FROZEN]


@pytest.mark.parametrize("name", FROZEN)
async def test_it_is_migrated_with_a_backup(tmp_path: Path, name: str) -> None:
    frozen, state = expected(name), thawed(name, tmp_path / "state")
    async with Journal.open(state) as journal:
        report = await journal.verify(frozen["head"], deep=True)
        pruned = sum(call["pruned"] for call in frozen["calls"].values())
        assert (report.problem, report.damaged, report.pruned) == (None, [], pruned)
        assert str(report.head) == frozen["head"]
        assert pruned == 3
        for id_, said in frozen["calls"].items():
            found = await journal.get(id_)
            assert found is not None
            assert found.outcome is not None
            assert (found.outcome.cause, found.outcome.exit_code, found.outcome.signal) == (
                said["cause"], said["exit_code"], said["signal"],
            )  # fmt: skip
            assert (found.pruned is not None) == said["pruned"]
        assert len(await journal.open_calls()) == frozen["rows"]["queue"]
        rows = await journal.read(lambda connection: counted(connection, frozen["rows"]))
        assert rows == frozen["rows"]
        assert len(await journal.owed()) == frozen["rows"]["callbacks"] == 1
    (backup,) = (state / "backups").iterdir()
    assert backup.name == f"journal-{name}.sqlite3"
    with closing(sqlite3.connect(backup)) as old:
        assert old.execute("PRAGMA user_version").fetchone() == (frozen["schema"],)
        assert counted(old, frozen["rows"]) == frozen["rows"]
    async with Journal.open(state):  # once
        pass
    assert len(list((state / "backups").iterdir())) == 1


def counted(connection: sqlite3.Connection, tables: dict[str, int]) -> dict[str, int]:
    return {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}


@pytest.mark.parametrize("name", SERVED)
def test_a_daemon_takes_it_up(tmp_path: Path, name: str) -> None:
    frozen, state = expected(name), thawed(name, tmp_path / "state")
    policies = tmp_path / "its"
    policies.mkdir()
    for policy, text in POLICIES.items():
        (policies / f"{policy}.yaml").write_text(text)
    with start_daemon(tmp_path, state=state, config=f"policies: [{policies}]\n") as daemon:
        client = daemon.client()
        for id_, said in frozen["streams"].items():
            assert {name: shown(client, id_, name, text) for name, text in said.items()} == said
        check_calls(client, {call["key"]: id_ for id_, call in frozen["calls"].items() if call["key"]})
        for id_, call in frozen["calls"].items():
            if call["pruned"]:
                assert client.get(id_).pruned is not None
                with pytest.raises(errors.Pruned):
                    client.stdout(id_)
        check_sessions(client, frozen)
        if "told" in {one.name for one in client.policies()}:
            done = client.run(["sh", "-c", "sha256sum < /run/secrets/TOKEN"], policy="told")
            assert done.stdout is not None
            assert done.stdout.text == f"{hashlib.sha256(SECRET).hexdigest()}  -\n"
        until(lambda: client.search("large", limit=50).hits, "what an older version recorded is found")


def shown(client: Client, id_: str, name: str, said: str) -> str:
    with getattr(client, name)(id_) as chunks:
        data = b"".join(chunks)
    return f"sha256:{hashlib.sha256(data).hexdigest()}" if said.startswith("sha256:") else data.decode()


def check_calls(client: Client, keys: dict[str, str]) -> None:
    """What ran or waited when the older daemon was killed, and what callers remember."""
    assert client.run(["sh", "-c", "echo once"], key="once", labels={"team": "x"}).id == keys["once"]
    for key, said in (("flying", "before\n"), ("busy", "busy\n")):
        (one,) = [call for call in client.list(limit=100).invocations if call.key == key]
        assert one.outcome is not None
        assert one.outcome.error is not None
        assert one.outcome.error.code == "interrupted"
        stdout = client.get(one.id).stdout
        assert stdout is not None
        assert stdout.text == said
    (waited,) = [call for call in client.list(limit=100).invocations if call.key == "waiting"]
    done = client.wait(waited.id)
    assert done.stdout is not None
    assert (done.outcome and done.outcome.cause, done.stdout.text) == ("exited", "one\nmore\n")


def check_sessions(client: Client, frozen: dict[str, object]) -> None:
    sessions = frozen["sessions"]
    assert isinstance(sessions, dict)
    for id_, said in sessions.items():
        info = client.session(id_)
        assert (info.name, info.labels) == (said["name"], said["labels"])
        done = client.run(["sh", "-c", LISTING], session=id_)
        with client.stdout(done.id) as chunks:
            assert b"".join(chunks).decode() == said["files"]
        kept = [one.digest for one in client.checkpoints(id_, limit=500).checkpoints]
        assert kept[-len(said["checkpoints"]) :] == said["checkpoints"]
    to = next(one for one in sessions.values() if one["name"] == "back")["checkpoints"][0]
    client.rollback_session("back", to)  # to where it was before it was rolled back
    done = client.run(["cat", "f", "g"], session="back")
    assert done.stdout is not None
    assert done.stdout.text == "2\ng\n"
    with pytest.raises(errors.NotFound):
        client.session("removed")
    if "live" in {one.name for one in client.sessions().sessions}:
        done = client.run(["cat", "file"], session="live")
        assert done.stdout is not None
        assert done.stdout.text == "started\nmore\n"
        assert done.container is not None
        assert done.container.lost is not None
