"""A daemon dies while it migrates an older version's state: that stays as it was, for the next to migrate."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from crashing import Crashing
from daemons import needs_containers
from frozen import FROZEN, expected, thawed

from sandboxd.journal import schema

if TYPE_CHECKING:
    from pathlib import Path

LONG = int(os.environ.get("SANDBOXD_CRASHES", "0")) >= 100
CHOSEN = FROZEN if LONG else [FROZEN[0], FROZEN[-1]]


@pytest.mark.parametrize("name", CHOSEN)
def test_dying_while_a_state_is_migrated(place: Path, no_leaks: None, name: str) -> None:
    needs_containers()
    frozen, state = expected(name), thawed(name, place / "state")
    steps = len(schema.MIGRATIONS) - frozen["schema"]
    with Crashing(place, seed=1, state=state) as crashing:
        crashing.faults.add("host")
        for point, action in (
            ("journal.backup", "KILL"),
            ("journal.migrate", "KILL"),
            ("journal.migrate", f"KILL {steps}"),
        ):
            crashing.arm(point, action)
            assert not crashing.start(), point
            assert left(state) == {"schema": frozen["schema"], "rows": frozen["rows"]}
        assert crashing.start(), crashing.said()
        crashing.check()
        assert crashing.daemon is not None
        client = crashing.daemon.client()
        assert {one.id for one in client.sessions(limit=100).sessions} >= set(frozen["sessions"])
        for id_, said in frozen["sessions"].items():
            kept = [one.digest for one in client.checkpoints(id_, limit=500).checkpoints]
            assert kept[-len(said["checkpoints"]) :] == said["checkpoints"]
        for id_, said in frozen["calls"].items():
            found = client.get(id_)
            assert found.outcome is not None
            assert found.outcome.cause == said["cause"]
    assert [path.name for path in (state / "backups").iterdir()] == [f"journal-{name}.sqlite3"]


def left(state: Path) -> dict[str, object]:
    """What a journal that nobody has open is; it stays as it is, with its log."""
    source = state / "journal.sqlite3"
    with closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        rows = {one: connection.execute(f"SELECT count(*) FROM {one}").fetchone()[0] for one in tables}
        return {"schema": connection.execute("PRAGMA user_version").fetchone()[0], "rows": rows}
