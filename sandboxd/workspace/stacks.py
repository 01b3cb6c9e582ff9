"""The stacks of layers that make checkpoints, in the journal's database; see ``tables``.

What a checkpoint shows is the stack of layers from it down: where the last 16 (256, 4096 …) up to one of them
were merged into one layer, that stands for them, so a stack has at most some dozen layers however many calls
there were.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sandboxd.workspace.tables import checkpoint

if TYPE_CHECKING:
    import sqlite3

    from sandboxd.workspace.tables import Checkpoint

__all__ = ["FAN", "Kept", "Merge", "Stack", "due", "insert_merge", "stack_of"]

FAN = 16
"""How many layers are merged into one, and how many of those again."""


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


_MERGE = ", ".join(one.name for one in fields(Merge))


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
