"""Forgetting checkpoints on which nothing stands, in the journal's database; see ``tables``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd.workspace.tables import checkpoint, remove_checkpoint, remove_packs, remove_session

if TYPE_CHECKING:
    import sqlite3

    from sandboxd.workspace.tables import Checkpoint

__all__ = ["Pruned", "prune"]


@dataclass(frozen=True)
class Pruned:
    """Layers that nothing refers to any more, what callers have again, and whether that is all."""

    layers: list[str]
    freed: list[tuple[int, int, int]]
    """Uid, bytes and entries, each as ``held`` counts them."""
    complete: bool
    removed: list[tuple[str, tuple[object, ...]]]
    """Rows that are gone, each with its table."""
    noted: list[tuple[str, str]]
    """Sessions, and the digests of their checkpoints that were noted as forgotten."""

    def take_back(self, connection: sqlite3.Connection) -> None:
        """Let all of it be there again."""
        for table, row in self.removed:
            marks = ", ".join("?" * len(row))
            connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", row)  # noqa: S608  (constants)
        connection.executemany("DELETE FROM forgotten WHERE session = ? AND digest = ?", self.noted)


def prune(connection: sqlite3.Connection, session: str | None, *, limit: int = 200) -> Pruned:
    """Forget checkpoints of a session on which nothing stands, ``limit`` of them at once.

    Of a session that is gone, what others stand on is nobody's then, and the session is forgotten in the end:
    what it stood on itself, of one that went before, is forgotten too. ``session`` None: what is nobody's.
    Steps that are not complete may leave some of that.
    """
    layers: list[str] = []
    freed: list[tuple[int, int, int]] = []
    removed: list[tuple[str, tuple[object, ...]]] = []
    noted: list[tuple[str, str]] = []
    count = 0
    ended = connection.execute(
        "SELECT head, origin FROM sessions WHERE id = ? AND gone", (session,)
    ).fetchone()
    leaves = [
        row[0]
        for row in connection.execute(
            "SELECT id FROM checkpoints AS c WHERE session IS ?"
            " AND NOT EXISTS (SELECT 1 FROM checkpoints WHERE parent = c.id)"
            " AND NOT EXISTS (SELECT 1 FROM sessions WHERE (head = c.id OR origin = c.id) AND NOT gone)"
            " ORDER BY id DESC LIMIT ?",
            (session, limit),
        )
    ]
    queue = [one for one in dict.fromkeys(ended or ()) if _is_free(connection, one, session)]
    queue += [one for one in leaves if one not in queue]
    while queue and count < limit:
        one = checkpoint(connection, queue.pop())
        if one is None:
            continue
        layers += [one.layer] if one.layer is not None else []
        freed += [(one.uid, one.size, one.inodes + 1)] if one.layer is not None else []
        merged = connection.execute(
            "SELECT layer, own_size, own_inodes FROM merges WHERE checkpoint = ?", (one.id,)
        )
        for layer, own_size, own_inodes in merged.fetchall():
            layers.append(layer)
            freed.append((one.uid, own_size, own_inodes + 1))
        removed += _rows_of(connection, one)
        remove_checkpoint(connection, one.id)
        if not ended and session is not None and one.session == session:
            noted.append((session, one.digest))
        count += 1
        if one.layer is not None:
            remove_packs(connection, [one.layer])
        if one.parent is not None and _is_free(connection, one.parent, session):
            queue.append(one.parent)
    # records name them, and the session is still there
    connection.executemany("INSERT OR IGNORE INTO forgotten (session, digest) VALUES (?, ?)", noted)
    if queue or len(leaves) == limit:
        return Pruned(layers, freed, removed=removed, noted=noted, complete=False)
    if ended and session is not None:
        # as they are, for take_back
        for table, column in (
            ("checkpoints", "session"), ("sessions", "id"), ("containers", "session"),
            ("forgotten", "session"),
        ):  # fmt: skip
            rows = connection.execute(f"SELECT * FROM {table} WHERE {column} = ?", (session,))  # noqa: S608
            removed += [(table, tuple(row)) for row in rows]
        connection.execute("UPDATE checkpoints SET session = NULL WHERE session = ?", (session,))
        remove_session(connection, session)
    return Pruned(layers, freed, removed=removed, noted=noted, complete=True)


def _rows_of(connection: sqlite3.Connection, one: Checkpoint) -> list[tuple[str, tuple[object, ...]]]:
    """A checkpoint, its merges and its pack, as rows of their tables."""
    found: list[tuple[str, tuple[object, ...]]] = []
    for table, column, value in (
        ("checkpoints", "id", one.id),
        ("merges", "checkpoint", one.id),
        ("packs", "layer", one.layer),
    ):
        rows = connection.execute(f"SELECT * FROM {table} WHERE {column} = ?", (value,))  # noqa: S608
        found += [(table, tuple(row)) for row in rows]
    return found


def _is_free(connection: sqlite3.Connection, id_: str, session: str | None) -> bool:
    """Whether nothing stands on a checkpoint, and it is of this session, or of one that was removed."""
    return connection.execute(
        "SELECT 1 FROM checkpoints AS c WHERE id = ?1 AND (session IS NULL OR session = ?2)"
        " AND NOT EXISTS (SELECT 1 FROM checkpoints WHERE parent = c.id)"
        " AND NOT EXISTS (SELECT 1 FROM sessions WHERE (head = c.id OR origin = c.id) AND NOT gone)",
        (id_, session),
    ).fetchone() is not None  # fmt: skip
