"""Sessions and checkpoints in the journal's database: plain functions on a connection, within a transaction.

A checkpoint is a layer on top of its parent; many sessions may stand on one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sandboxd import canonical
from sandboxd.models import CheckpointInfo

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

__all__ = [
    "Checkpoint",
    "Row",
    "checkpoint",
    "checkpoints",
    "count_of",
    "digest_of",
    "expired",
    "find",
    "first_of",
    "going",
    "held",
    "insert_checkpoint",
    "insert_pack",
    "insert_session",
    "list_sessions",
    "make_checkpoint",
    "mark_gone",
    "mark_there",
    "move",
    "packs",
    "referenced",
    "remove_checkpoint",
    "remove_packs",
    "remove_session",
    "touch",
    "within",
]


@dataclass(frozen=True)
class Row:
    """A session. Times and durations in microseconds, sizes in bytes; None: no limit of its own."""

    id: str
    uid: int
    name: str | None
    policy: str | None
    labels: dict[str, str]
    created: int
    used: int
    ttl: int | None
    idle: int | None
    quota_size: int | None
    quota_inodes: int | None
    head: str
    origin: str
    """The checkpoint that it began with."""
    calls: int = 0
    checkout: str | None = None
    """Device and inode of its caller's directory, of a session that stands on one."""
    network: str | None = None
    """What its calls used of the network, as ``allowance`` has it."""

    @property
    def expires(self) -> int | None:
        """When it ends by itself, if nothing uses it until then."""
        ends = []
        if self.ttl is not None:
            ends.append(self.created + self.ttl)
        if self.idle is not None:
            ends.append(self.used + self.idle)
        return min(ends, default=None)


@dataclass(frozen=True)
class Checkpoint:
    """A workspace as it stood. ``content``, ``size`` and ``inodes`` are its own layer's."""

    id: str
    session: str | None
    uid: int
    """Whose quota it counts to: of the session that it was made in."""
    parent: str | None
    depth: int
    digest: str
    layer: str | None
    content: str | None
    size: int
    inodes: int
    created: int
    call: str | None

    def info(self, head: str) -> CheckpointInfo:
        """What is told of it; ``head`` is where its session stands."""
        return CheckpointInfo(
            id=self.id,
            parent=self.parent,
            digest=self.digest,
            size=self.size,
            inodes=self.inodes,
            created=self.created,
            call=self.call,
            head=self.id == head,
        )


_SESSION = ", ".join(one.name for one in fields(Row))
_CHECKPOINT = ", ".join(one.name for one in fields(Checkpoint))


def digest_of(content: str | None, parent: str | None) -> str:
    """The digest of a checkpoint: of its layer's, and of its parent's."""
    return canonical.digest({"content": content, "parent": parent})


def make_checkpoint(
    id_: str,
    session: str,
    uid: int,
    parent: Checkpoint | None,
    *,
    layer: str | None = None,
    content: str | None = None,
    size: int = 0,
    inodes: int = 0,
    created: int,
    call: str | None = None,
) -> Checkpoint:
    """A checkpoint on top of its parent; its digest is of the parent's and the content's."""
    digest = digest_of(content, None if parent is None else parent.digest)
    depth = 0 if parent is None else parent.depth + 1
    above = None if parent is None else parent.id
    return Checkpoint(id_, session, uid, above, depth, digest, layer, content, size, inodes, created, call)


def _session(row: tuple[Any, ...]) -> Row:
    values = dict(zip((one.name for one in fields(Row)), row, strict=True))
    return Row(**{**values, "labels": json.loads(values["labels"])})


def insert_session(connection: sqlite3.Connection, row: Row) -> None:
    """Add a session, whose name nobody else of the caller's has. Raises sqlite3.IntegrityError."""
    values = {one.name: getattr(row, one.name) for one in fields(Row)}
    values |= {"labels": json.dumps(row.labels), "expires": row.expires, "gone": 0}
    names, marks = ", ".join(values), ", ".join("?" * len(values))
    connection.execute(f"INSERT INTO sessions ({names}) VALUES ({marks})", tuple(values.values()))  # noqa: S608


def insert_checkpoint(connection: sqlite3.Connection, one: Checkpoint) -> None:
    """Add a checkpoint."""
    marks = ", ".join("?" * len(fields(Checkpoint)))
    values = tuple(getattr(one, field.name) for field in fields(Checkpoint))
    connection.execute(f"INSERT INTO checkpoints ({_CHECKPOINT}) VALUES ({marks})", values)  # noqa: S608


def insert_pack(connection: sqlite3.Connection, layer: str, pack: bytes) -> None:
    """Add what a layer is to be made of."""
    connection.execute("INSERT INTO packs (layer, pack) VALUES (?, ?)", (layer, pack))


def packs(connection: sqlite3.Connection, *, after: str, limit: int) -> list[tuple[str, bytes]]:
    """A page of the layers that may not be on disk as files, and what they are made of."""
    found = connection.execute(
        "SELECT layer, pack FROM packs WHERE layer > ? ORDER BY layer LIMIT ?", (after, limit)
    )
    return [(layer, pack) for layer, pack in found]


def remove_packs(connection: sqlite3.Connection, layers: Iterable[str]) -> None:
    """The files of these layers are on disk, or nothing refers to them."""
    connection.executemany("DELETE FROM packs WHERE layer = ?", [(layer,) for layer in layers])


def find(connection: sqlite3.Connection, named: str, uid: int | None) -> Row | None:
    """The session of this id or name; ``uid`` None: anybody's by its id."""
    if uid is None:
        where, values = "id = ?", (named,)
    else:
        where, values = "uid = ? AND (id = ? OR name = ?)", (uid, named, named)  # type: ignore[assignment]
    row = connection.execute(
        f"SELECT {_SESSION} FROM sessions WHERE {where} AND NOT gone",  # noqa: S608  (constants)
        values,
    ).fetchone()
    return _session(row) if row else None


def list_sessions(
    connection: sqlite3.Connection, uid: int | None, *, before: str | None, limit: int
) -> list[Row]:
    """Sessions, the newest first."""
    rows = connection.execute(
        f"SELECT {_SESSION} FROM sessions WHERE NOT gone AND (?1 IS NULL OR uid = ?1)"  # noqa: S608
        " AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3",
        (uid, before, limit),
    )
    return [_session(row) for row in rows]


def touch(connection: sqlite3.Connection, row: Row, *, at: int, called: bool = False) -> None:
    """Note that a session was used."""
    ends = Row(**{**{one.name: getattr(row, one.name) for one in fields(Row)}, "used": at}).expires
    connection.execute(
        "UPDATE sessions SET used = ?, expires = ?, calls = calls + ? WHERE id = ?",
        (at, ends, int(called), row.id),
    )


def move(connection: sqlite3.Connection, session: str, *, since: str, to: str) -> bool:
    """Move a session's head, if it is where it was; whether it was."""
    return bool(
        connection.execute(
            "UPDATE sessions SET head = ? WHERE id = ? AND head = ? AND NOT gone", (to, session, since)
        ).rowcount
    )


def checkpoint(connection: sqlite3.Connection, id_: str | None) -> Checkpoint | None:
    """One by its id."""
    row = connection.execute(
        f"SELECT {_CHECKPOINT} FROM checkpoints WHERE id = ?",  # noqa: S608
        (id_,),
    ).fetchone()
    return Checkpoint(*row) if row else None


def checkpoints(
    connection: sqlite3.Connection, session: str, *, before: str | None, limit: int
) -> list[Checkpoint]:
    """Those that were made in a session, the newest first."""
    rows = connection.execute(
        f"SELECT {_CHECKPOINT} FROM checkpoints WHERE session = ?1 AND (?2 IS NULL OR id < ?2)"  # noqa: S608
        " ORDER BY id DESC LIMIT ?3",
        (session, before, limit),
    )
    return [Checkpoint(*row) for row in rows]


def within(connection: sqlite3.Connection, row: Row, named: str) -> Checkpoint | None:
    """The checkpoint of this id or digest that a session knows: made in it, or before it in its line."""
    found = connection.execute(
        f"SELECT {_CHECKPOINT} FROM checkpoints WHERE id = ?1 OR digest = ?1 ORDER BY id DESC",  # noqa: S608
        (named,),
    )
    candidates = [Checkpoint(*one) for one in found]
    for one in candidates:
        if one.session == row.id:
            return one
    if not candidates:
        return None
    wanted, least = {one.id: one for one in candidates}, min(one.depth for one in candidates)
    current = checkpoint(connection, row.origin)  # a fork's line goes on in that of which it was made
    while current is not None and current.depth >= least:
        if current.id in wanted:
            return current
        current = checkpoint(connection, current.parent)
    return None


def elsewhere(connection: sqlite3.Connection, uid: int, named: str) -> Row | None:
    """The session of a caller that the newest checkpoint of this id or digest was made in."""
    found = connection.execute(
        "SELECT session FROM checkpoints WHERE (id = ?1 OR digest = ?1) AND uid = ?2 AND session IS NOT NULL"
        " ORDER BY id DESC LIMIT 1",
        (named, uid),
    ).fetchone()
    return find(connection, found[0], None) if found else None


def first_of(connection: sqlite3.Connection, id_: str) -> Checkpoint | None:
    """The first checkpoint of the line that one is in, whichever session it was made in."""
    row = connection.execute(
        "WITH RECURSIVE line(id, parent) AS (SELECT id, parent FROM checkpoints WHERE id = ?"
        " UNION ALL SELECT c.id, c.parent FROM checkpoints AS c JOIN line ON c.id = line.parent)"
        " SELECT id FROM line WHERE parent IS NULL",
        (id_,),
    ).fetchone()
    return checkpoint(connection, row[0]) if row else None


def held(connection: sqlite3.Connection) -> dict[int, tuple[int, int]]:
    """Bytes and entries of all layers made in the sessions of each caller; a layer is an entry itself.

    Of those that were merged what is their own: what they share is counted once.
    """
    rows = connection.execute(
        "SELECT uid, sum(size), sum(inodes) FROM ("
        "SELECT uid, size, inodes + 1 AS inodes FROM checkpoints WHERE layer IS NOT NULL UNION ALL"
        " SELECT c.uid, m.own_size, m.own_inodes + 1 FROM merges AS m JOIN checkpoints AS c"
        " ON c.id = m.checkpoint) GROUP BY uid"
    )
    return {row[0]: (int(row[1]), int(row[2])) for row in rows}


def count_of(connection: sqlite3.Connection, uid: int) -> int:
    """How many sessions a caller has."""
    found = connection.execute("SELECT count(*) FROM sessions WHERE uid = ? AND NOT gone", (uid,))
    return int(found.fetchone()[0])


FIRST = (-1, "")
"""Before the first of ``expired``."""


def expired(
    connection: sqlite3.Connection, *, now: int, after: tuple[int, str] = FIRST, limit: int = 100
) -> list[tuple[int, str]]:
    """A page of the sessions whose time is over, by when it was and their ids; ``after`` is the last seen.

    Some stay, since calls run in them: whoever asks goes on past them.
    """
    rows = connection.execute(
        "SELECT expires, id FROM sessions WHERE expires <= ? AND (expires, id) > (?, ?) AND NOT gone"
        " ORDER BY expires, id LIMIT ?",
        (now, *after, limit),
    )
    return [(row[0], row[1]) for row in rows]


def going(connection: sqlite3.Connection) -> list[str]:
    """Ids of sessions that are being removed."""
    return [row[0] for row in connection.execute("SELECT id FROM sessions WHERE gone")]


def mark_gone(connection: sqlite3.Connection, session: str, *, over: int | None = None) -> bool:
    """Take a session away from everybody's eyes; whether it was there, and its time over at ``over``."""
    return bool(
        connection.execute(
            "UPDATE sessions SET gone = 1 WHERE id = ?1 AND NOT gone AND (?2 IS NULL OR expires <= ?2)",
            (session, over),
        ).rowcount
    )


def mark_there(connection: sqlite3.Connection, session: str) -> None:
    """Take that back."""
    connection.execute("UPDATE sessions SET gone = 0 WHERE id = ?", (session,))


def remove_checkpoint(connection: sqlite3.Connection, id_: str) -> None:
    """Forget a checkpoint, and its merges."""
    connection.execute("DELETE FROM merges WHERE checkpoint = ?", (id_,))
    connection.execute("DELETE FROM checkpoints WHERE id = ?", (id_,))


def remove_session(connection: sqlite3.Connection, id_: str) -> None:
    """Forget a session and its container, and none of its checkpoints."""
    connection.execute("DELETE FROM forgotten WHERE session = ?", (id_,))
    connection.execute("DELETE FROM containers WHERE session = ?", (id_,))
    connection.execute("DELETE FROM sessions WHERE id = ?", (id_,))


def referenced(connection: sqlite3.Connection) -> set[str]:
    """The names of every layer that something refers to."""
    return {
        row[0]
        for row in connection.execute(
            "SELECT layer FROM checkpoints WHERE layer IS NOT NULL UNION SELECT layer FROM merges"
        )
    }
