"""Calls as the journal's tables have them: found by key or id, listed, parsed. Functions on a connection."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from sandboxd import errors, models
from sandboxd.journal import records, requests

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["MAX_LIST", "check_same", "conflict", "find_key", "get", "in_flight", "listed", "selected"]

MAX_LIST = 500
_MAX_LABELS = 16  # of a filter
_MAX_PAGE = 8 << 20  # bytes of documents; one has up to some MiB of argv, artifacts and what was withheld

log = structlog.get_logger(__name__)


def get(connection: sqlite3.Connection, id_: str) -> models.Invocation | None:
    """One by its id. Raises JournalCorrupt."""
    row = connection.execute(
        "SELECT i.doc, i.policy, i.pruned, i.uid, r.header FROM invocations AS i"
        " LEFT JOIN records AS r ON r.id = i.id WHERE i.id = ?",
        (id_,),
    ).fetchone()
    if row is None:
        return None
    doc, policy, pruned, uid, header = row
    if doc is not None and header is None:  # whoever asks at the start has to go on
        return _parse_open(id_, doc, uid, policy)
    if doc is not None:
        return _parse(id_, doc)
    return None if header is None else records.from_header(header, policy, pruned or 0)


def in_flight(connection: sqlite3.Connection) -> list[models.Invocation]:
    """Those without an outcome, oldest first."""
    found = connection.execute(
        "SELECT id, doc, uid, policy FROM invocations WHERE state != 'ended' ORDER BY id"
    )
    return [_parse_open(*row) for row in found]


def selected(
    *,
    uid: int | None,
    policy: str | None,
    cause: models.Cause | None,
    state: models.State | None,
    key: str | None,
    labels: Mapping[str, str],
    before: str | None,
    limit: int,
) -> tuple[str, list[object]]:
    """A query for the ids and documents of calls, newest first, and its values. Raises InvalidRequest."""
    if len(labels) > _MAX_LABELS:
        raise errors.InvalidRequest(f"at most {_MAX_LABELS} labels can be filtered by", field="label")
    filters: dict[str, object] = {
        "uid = ?": uid,
        "policy = ?": policy,
        "cause = ?": cause,
        "state = ?": state,
        "key = ?": key,
        "id < ?": before,
    }
    given = {clause: value for clause, value in filters.items() if value is not None}
    where = ["doc IS NOT NULL", *given]
    values: list[object] = [str(v) if isinstance(v, str) else v for v in given.values()]
    for name, value in labels.items():
        where.append("id IN (SELECT id FROM labels WHERE name = ? AND value = ?)")
        values += [name, value]
    # Only constant clauses are joined; every value is bound.
    query = f"SELECT id, doc FROM invocations WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?"  # noqa: S608
    return query, [*values, max(1, min(limit, MAX_LIST))]


def listed(connection: sqlite3.Connection, query: str, values: Sequence[object]) -> list[models.Invocation]:
    """What ``selected`` selects: fewer where they are large, and those that can be read."""
    found, size = [], 0
    for id_, doc in _each(connection, query, values):
        try:
            found.append(_parse(id_, doc))
        except errors.JournalCorrupt as error:  # the others are listed; ``get`` says it of this one
            log.warning("left out of a list", id=id_, reason=str(error))
        size += len(doc)
        if size > _MAX_PAGE:
            break
    return found


def find_key(connection: sqlite3.Connection, uid: int, key: str) -> records.Existing | None:
    """The call that a caller's key stands for."""
    row = connection.execute(
        "SELECT id, request_digest FROM invocations WHERE uid = ? AND key = ?", (uid, key)
    ).fetchone()
    return records.Existing(*row) if row else None


def check_same(connection: sqlite3.Connection, id_: str, doc: bytes) -> None:
    """Raise StateConflict for a call that ended in another way, NotFound for one that was not accepted."""
    found = connection.execute("SELECT doc FROM invocations WHERE id = ?", (id_,)).fetchone()
    if found is None:
        raise errors.NotFound(f"invocation {id_} was never accepted")
    if found[0] != doc:
        raise errors.StateConflict(f"invocation {id_} has an outcome already")


def conflict(
    connection: sqlite3.Connection, existing: records.Existing, now: requests.Asked | None
) -> errors.KeyConflict:
    """The refusal of a request whose key stands for another one."""
    before = requests.read(connection, existing.id)
    known = before is not None and not requests.problem_of(before.doc, None, before.digest)
    differs = requests.differences(before.doc, now.doc) if before and known and now else []
    named = ", ".join(each["field"] for each in differs[:5]) + (" and more" if len(differs) > 5 else "")
    return errors.KeyConflict(
        "this key was used before with another request" + (f": they differ in {named}" if named else ""),
        id=existing.id,
        request_digest=existing.request_digest,
        differs=differs,
    )


def _each(
    connection: sqlite3.Connection, query: str, values: Sequence[object]
) -> Iterator[tuple[str, bytes]]:
    """The rows of a list; where a page is damaged, those that can be read."""
    try:
        yield from connection.execute(query, values).fetchall()
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        log.warning("the database is damaged; what can be read is listed", reason=str(error))
        for (id_,) in connection.execute(query.replace("SELECT id, doc", "SELECT id", 1), values).fetchall():
            try:
                row = connection.execute("SELECT doc FROM invocations WHERE id = ?", (id_,)).fetchone()
            except sqlite3.DatabaseError as damage:
                log.warning("left out of a list", id=id_, reason=str(damage))
                continue
            if row is not None and row[0] is not None:
                yield id_, row[0]


def _parse_open(id_: str, doc: bytes, uid: int, policy: str) -> models.Invocation:
    """A call without an outcome; of one whose document is damaged, what its row says."""
    try:
        return _parse(id_, doc)
    except errors.JournalCorrupt as error:
        log.error("what was accepted is damaged", id=id_, reason=str(error))  # noqa: TRY400  # all there is
        return records.remains(id_, uid, policy)


def _parse(id_: str, doc: bytes) -> models.Invocation:
    try:
        return models.Invocation.model_validate_json(doc)
    except ValidationError as error:
        raise errors.JournalCorrupt(f"invocation {id_} in the journal cannot be read", id=id_) from error
