"""Journals for tests: calls written by the journal itself, and what is changed behind its back."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from sandboxd import canonical, models
from sandboxd.journal import Accepted, Ids, Journal, outcome_header, schema

if TYPE_CHECKING:
    from pathlib import Path

new_id = Ids().new
DIGEST = "sha256:" + "ab" * 32


def named(kind: str) -> list[str]:
    """The names of all tables, or all indexes, of a journal."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for steps in schema.MIGRATIONS:
            for step in steps:
                if isinstance(step, str):
                    connection.execute(step)
        rows = connection.execute("SELECT name FROM sqlite_schema WHERE type = ? ORDER BY name", (kind,))
        return [name for (name,) in rows]


TABLES, INDEXES = named("table"), named("index")


def call(**fields: object) -> models.Invocation:
    """A call that was accepted."""
    values: dict[str, object] = {
        "id": new_id(),
        "state": models.State.ACCEPTED,
        "caller": models.CallerInfo(uid=1, gid=1, role="agent"),
        "policy": models.DigestRef(name="default", digest=DIGEST),
        "image": models.DigestRef(name="host", digest=DIGEST),
        "plan": DIGEST,
        "argv": ["true"],
        "times": models.Times(accepted=1_700_000_000_000_000),
    }
    return models.Invocation(**(values | fields))  # type: ignore[arg-type]


def stream(data: bytes) -> models.Content:
    """What an invocation says of a stream."""
    return models.Content(text="", size=len(data), digest=canonical.digest_bytes(data), complete=not data)


async def record(
    journal: Journal,
    state: Path,
    *,
    stdout: bytes = b"",
    files: dict[str, bytes] | None = None,
    **fields: object,
) -> models.Invocation:
    """A call that ran, with its output and its artifacts on disk."""
    begun = call(**fields)
    assert await journal.accept(Accepted(begun, DIGEST)) is None
    if stdout:
        place = state / "calls" / begun.id
        place.mkdir(parents=True)
        (place / "stdout").write_bytes(stdout)
        (place / "events").touch()
    artifacts = []
    for path, data in (files or {}).items():
        digest = canonical.digest_bytes(data)
        blob = state / "blobs" / "sha256" / digest[7:9] / digest[7:]
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        artifacts.append(models.Artifact(path=path, size=len(data), digest=digest))
    ended = begun.times.model_copy(update={"ended": begun.times.accepted + 500_000})
    done = begun.model_copy(
        update={
            "state": models.State.ENDED,
            "outcome": models.Outcome(cause=models.Cause.EXITED, message="It ended.", exit_code=0),
            "stdout": stream(stdout),
            "stderr": stream(b""),
            "artifacts": artifacts,
            "times": ended,
            "attempts": 1,
        }
    )
    await journal.ended(done, outcome_header(done, inputs=[]))
    return done


def behind(state: Path, *statements: str) -> None:
    """Change a journal that nobody has open."""
    connection = sqlite3.connect(state / "journal.sqlite3", isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def spoiled(state: Path, name: str, page: bytes = b"\x77") -> None:
    """Make the first page of a table or index unreadable: ``page`` is what it begins with then."""
    path = state / "journal.sqlite3"
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        root = connection.execute(query, (name,)).fetchone()[0]
    data = bytearray(path.read_bytes())
    data[(root - 1) * 4096 : (root - 1) * 4096 + len(page)] = page
    path.write_bytes(data)
