"""Checking what is kept of sessions: their checkpoints, the layers of these, and what records say of them.

Theory of operation.  All is read a page at a time, beside a daemon that goes on: what seems wrong is read
again before it is told, since it may have gone or moved meanwhile. Checked are

    checkpoints   each has the digest that its parent's and its layer's make, and a parent, or is the first
    sessions      where each began and where it stands is there
    layers        each holds what its digest says: as files, or as the pack of which files are to be made
    records       each checkpoint that a record of a session names is there, as long as the session is, unless
                  its owner has discarded it, which the journal notes

A session that was removed takes its checkpoints with it: that nobody took away both by hand cannot be told.
Nor can it be told that a session was moved to another of its checkpoints.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd import errors
from sandboxd.journal.verify import Damage
from sandboxd.workspace import soundness, tables
from sandboxd.workspace.layerpack import digest_of_pack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Audit", "examine"]

STEP = 500
MOST = 1000
LAYERS = "sessions/layers"
OLDER = "files of sessions were not checked: an earlier version wrote the journal; start the daemon once"


@dataclass
class Audit:
    """What was found: ``damaged`` is at most 1,000, of which those of no record have the number 0."""

    layers: int
    """Layers that were read."""
    unknown: int
    """Layers of which no digest was kept, by an earlier version."""
    damaged: list[Damage]
    note: str = ""
    """Why nothing was checked."""


def examine(connection: sqlite3.Connection, state: Path) -> Audit:
    """Check what a state directory keeps of sessions. Reads all of their files."""
    return _Examination(connection, state / LAYERS).run()


class _Examination:
    def __init__(self, connection: sqlite3.Connection, layers: Path) -> None:
        self._connection = connection
        self._layers = layers
        self._found = Audit(0, 0, [])

    def run(self) -> Audit:
        tables_of = "SELECT name FROM sqlite_schema WHERE name IN ('sessions', 'forgotten')"
        there = {row[0] for row in self._connection.execute(tables_of)}
        if "forgotten" not in there:
            self._found.note = OLDER if there else ""
            return self._found
        for part in (self._checkpoints, self._sessions, self._merges, self._records):
            try:
                part()
            except sqlite3.DatabaseError as error:
                self._note(f"what the journal says of sessions cannot be read: {error}")
        return self._found

    def _note(self, what: str, n: int = 0, id_: str = "") -> None:
        if len(self._found.damaged) < MOST:
            self._found.damaged.append(Damage(n, id_, what))

    def _pages(self, query: str, first: Any) -> Iterator[tuple[Any, ...]]:
        """Rows in the order of their first column, which the query compares with ``?1``."""
        last = first
        while rows := self._connection.execute(f"{query} LIMIT {STEP}", (last,)).fetchall():
            yield from rows
            last = rows[-1][0]

    def _checkpoints(self) -> None:
        for (id_,) in self._pages("SELECT id FROM checkpoints WHERE id > ?1 ORDER BY id", ""):
            how = self._of_checkpoint(id_)
            if how and (how := self._of_checkpoint(id_)):  # it may have gone, or its layer become files
                self._note(how)

    def _of_checkpoint(self, id_: str) -> str:
        """What is wrong with one, if it is there."""
        one = tables.checkpoint(self._connection, id_)
        if one is None:
            return ""
        named = f"checkpoint {one.id}, {one.digest}, of session {one.session or '(removed)'}"
        parent = tables.checkpoint(self._connection, one.parent)
        if one.parent is not None and parent is None:
            return f"{named}: its parent {one.parent} is gone"
        if one.depth != (0 if parent is None else parent.depth + 1):
            return f"{named}: it is not where its parent leads to"
        if one.digest != tables.digest_of(one.content, None if parent is None else parent.digest):
            return f"{named}: it was changed: it does not have the digest that its parent and its layer make"
        if one.layer is None:
            return f"{named}: it has lost its layer" if one.content is not None else ""
        how = self._of_layer(one.layer, one.content)
        return f"{named}: its layer {how}" if how else ""

    def _of_layer(self, name: str, content: str | None) -> str:
        pack = self._connection.execute("SELECT pack FROM packs WHERE layer = ?", (name,)).fetchone()
        self._found.layers += 1
        try:
            if pack is not None:
                found = digest_of_pack(pack[0])
                how = "" if found == content else f"was changed: its pack has the digest {found}"
            else:
                how = soundness.problem(self._layers / name, content)
        except ValueError as error:
            how = f"was changed: {error}"
        except errors.HostFailed as error:
            how = f"cannot be read: {error}"
        return how

    def _merges(self) -> None:
        query = (
            "SELECT m.checkpoint || ' ' || m.span, m.layer, m.content, c.digest FROM merges AS m"
            " LEFT JOIN checkpoints AS c ON c.id = m.checkpoint"
            " WHERE m.checkpoint || ' ' || m.span > ?1 ORDER BY m.checkpoint || ' ' || m.span"
        )
        for key, layer, content, digest in self._pages(query, ""):
            id_, _, span = key.partition(" ")
            named = f"checkpoint {id_}, {digest}"
            self._found.unknown += content is None
            how = "is of no checkpoint" if digest is None else self._of_layer(layer, content)
            there = "SELECT 1 FROM merges WHERE checkpoint = ? AND span = ?"
            if how and self._connection.execute(there, (id_, int(span))).fetchone():
                self._note(f"{named}: its layer that stands for {span} {how}")

    def _sessions(self) -> None:
        query = "SELECT id, head, origin FROM sessions WHERE id > ?1 AND NOT gone ORDER BY id"
        for id_, *_ in self._pages(query, ""):
            row = tables.find(self._connection, id_, None)
            for what, named in () if row is None else (("stands on", row.head), ("began with", row.origin)):
                if tables.checkpoint(self._connection, named) is None:
                    again = tables.find(self._connection, id_, None)
                    if again is not None and named in {again.head, again.origin}:
                        self._note(f"session {id_}: the checkpoint {named} that it {what} is gone")

    def _records(self) -> None:
        for n, header in self._pages("SELECT n, header FROM records WHERE n > ?1 ORDER BY n", 0):
            if b'"checkpoint_after":"' not in header and b'"checkpoint_before":"' not in header:
                continue
            try:
                said = json.loads(header)
                session, id_ = str(said["session"]), str(said["id"])
                named = {str(one) for key in ("before", "after") if (one := said[f"checkpoint_{key}"])}
            except (ValueError, KeyError, TypeError):
                continue  # the chain says so
            for digest in sorted(named):
                if not self._is_accounted_for(session, digest):
                    self._note(f"the checkpoint {digest} of session {session} is gone", n, id_)

    def _is_accounted_for(self, session: str, digest: str) -> bool:
        found = self._connection.execute(
            "SELECT EXISTS (SELECT 1 FROM checkpoints WHERE digest = ?2)"
            " OR NOT EXISTS (SELECT 1 FROM sessions WHERE id = ?1 AND NOT gone)"
            " OR EXISTS (SELECT 1 FROM forgotten WHERE session = ?1 AND digest IN (?2, ''))",
            (session, digest),
        ).fetchone()
        return bool(found[0])
