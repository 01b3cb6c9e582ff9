"""Sessions and checkpoints in the journal's database: plain functions on a connection, within a transaction.

A checkpoint is a layer on top of its parent; many sessions may stand on one. What a checkpoint shows is the
stack of layers from it down: where the last 16 (256, 4096 …) up to one of them were merged into one layer,
that stands for them, so a stack has at most some dozen layers however many calls there were.
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
    "FAN",
    "Checkpoint",
    "Kept",
    "Merge",
    "Pruned",
    "Row",
    "Stack",
    "checkpoint",
    "checkpoints",
    "count_of",
    "digest_of",
    "due",
    "expired",
    "find",
    "first_of",
    "going",
    "held",
    "insert_checkpoint",
    "insert_merge",
    "insert_pack",
    "insert_session",
    "list_sessions",
    "make_checkpoint",
    "mark_gone",
    "mark_there",
    "move",
    "packs",
    "prune",
    "referenced",
    "remove_checkpoint",
    "remove_packs",
    "remove_session",
    "stack_of",
    "touch",
    "within",
]

FAN = 16
"""How many layers are merged into one, and how many of those again."""


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


@dataclass(frozen=True)
class Merge:
    """One layer in the place of ``span`` of them."""

    checkpoint: str
    span: int
    below: str | None
    layer: str
    size: int
    inodes: int
    own_size: int = 0
    """Bytes and entries that it does not share with the layers that it was made of."""
    own_inodes: int = 0
    content: str | None = None
    """The digest of what it holds; None where an earlier version made it."""


@dataclass(frozen=True)
class Kept:
    """A layer that is kept: the checkpoint up to which it goes, and what digests say of both."""

    layer: str
    checkpoint: str
    digest: str
    """Of the checkpoint."""
    content: str | None
    """Of what the layer holds; None where that is not known."""
    size: int
    inodes: int


@dataclass(frozen=True)
class Stack:
    """The layers that make a checkpoint, the newest first, and what they hold together."""

    kept: tuple[Kept, ...]
    size: int
    inodes: int

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(one.layer for one in self.kept)


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


_SESSION = ", ".join(one.name for one in fields(Row))
_CHECKPOINT = ", ".join(one.name for one in fields(Checkpoint))
_MERGE = ", ".join(one.name for one in fields(Merge))


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


def insert_merge(connection: sqlite3.Connection, one: Merge) -> bool:
    """Add a merge; whether its checkpoint is still there, and it was."""
    if checkpoint(connection, one.checkpoint) is None:
        return False
    values = tuple(getattr(one, field.name) for field in fields(Merge))
    return bool(
        connection.execute(
            f"INSERT OR IGNORE INTO merges ({_MERGE}) VALUES ({', '.join('?' * len(values))})",  # noqa: S608
            values,
        ).rowcount
    )


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


def first_of(connection: sqlite3.Connection, id_: str) -> Checkpoint | None:
    """The first checkpoint of the line that one is in, whichever session it was made in."""
    row = connection.execute(
        "WITH RECURSIVE line(id, parent) AS (SELECT id, parent FROM checkpoints WHERE id = ?"
        " UNION ALL SELECT c.id, c.parent FROM checkpoints AS c JOIN line ON c.id = line.parent)"
        " SELECT id FROM line WHERE parent IS NULL",
        (id_,),
    ).fetchone()
    return checkpoint(connection, row[0]) if row else None


def stack_of(connection: sqlite3.Connection, id_: str, *, floor: int = -1) -> Stack:
    """The layers of a checkpoint, down to those of a depth above ``floor``."""
    kept: list[Kept] = []
    size = inodes = 0
    at = checkpoint(connection, id_)
    while at is not None and at.depth > floor:
        merges = connection.execute(
            f"SELECT {_MERGE} FROM merges WHERE checkpoint = ? AND span <= ? ORDER BY span DESC LIMIT 1",  # noqa: S608
            (at.id, at.depth - max(floor, 0)),
        ).fetchone() if at.depth % FAN == 0 and at.depth else None  # fmt: skip
        if merges is not None:
            merge = Merge(*merges)
            kept.append(Kept(merge.layer, at.id, at.digest, merge.content, merge.size, merge.inodes))
            size, inodes = size + merge.size, inodes + merge.inodes
            at = checkpoint(connection, merge.below)
            continue
        if at.layer is not None:
            kept.append(Kept(at.layer, at.id, at.digest, at.content, at.size, at.inodes))
            size, inodes = size + at.size, inodes + at.inodes
        at = checkpoint(connection, at.parent)
    return Stack(tuple(kept), size, inodes)


def due(connection: sqlite3.Connection, id_: str) -> list[tuple[Checkpoint, int, str]]:
    """Merges that a checkpoint's stack lacks: of which checkpoint, how many, and what is below them.

    Those of fewer come before those of more, which are made of them.
    """
    wanted: list[tuple[Checkpoint, int]] = []
    line: dict[int, str] = {}
    at = checkpoint(connection, id_)
    ends: list[Checkpoint] = []
    while at is not None:
        line[at.depth] = at.id
        if at.depth and at.depth % FAN == 0:
            ends.append(at)
            known = [
                Merge(*row)
                for row in connection.execute(
                    f"SELECT {_MERGE} FROM merges WHERE checkpoint = ? ORDER BY span DESC",  # noqa: S608
                    (at.id,),
                )
            ]
            spans = {merge.span for merge in known}
            span = FAN
            while at.depth % span == 0:
                if span not in spans:
                    wanted.append((at, span))
                span *= FAN
            if known:
                merge = known[0]
                at = checkpoint(connection, merge.below)
                continue
        at = checkpoint(connection, at.parent)
    found = []
    for end, span in sorted(wanted, key=lambda one: (one[1], one[0].depth)):
        below = line.get(end.depth - span)
        if below is None:
            continue
        found.append((end, span, below))
    return found


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


def referenced(connection: sqlite3.Connection) -> set[str]:
    """The names of every layer that something refers to."""
    return {
        row[0]
        for row in connection.execute(
            "SELECT layer FROM checkpoints WHERE layer IS NOT NULL UNION SELECT layer FROM merges"
        )
    }
