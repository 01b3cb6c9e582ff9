"""What stands beside the records and is checked against them: columns of calls, and what was asked.

A record vouches for its call's body. The columns by which calls are found repeat what is in it; the digest of
a request was noted with its acceptance.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sandboxd import canonical
from sandboxd.journal import requests
from sandboxd.journal.upkeep import within

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

__all__ = ["differing", "requests_that_differ"]

_STEP = 500
_MOST = 16 << 20  # bytes of one step


def differing(header: bytes, body: bytes | None, uid: int, key: str | None, cause: str | None) -> str:
    """The first of a call's columns that is not as in its record; empty where none is.

    What is plainly there is not parsed: of 100,000 records that would take a second.
    """
    if (
        b'"uid":%d' % uid in header
        and b'"cause":"%b"' % (cause or "").encode() in header
        and (body is None or (b'"key":' not in body if key is None else _quoted(key) in body))
    ):
        return ""
    said, whole = _object(header), _object(body or b"{}")
    if _within(said, "caller", "uid") != uid:
        return "uid"
    if _within(said, "outcome", "cause") != cause:
        return "cause"
    return "key" if body is not None and whole.get("key") != key else ""


def _quoted(text: str) -> bytes:
    return b'"key":' + json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):  # its digest holds, so a version wrote it that is not known
        return {}
    return found if isinstance(found, dict) else {}


def _within(header: dict[str, Any], name: str, member: str) -> Any:
    found = header.get(name)
    return found.get(member) if isinstance(found, dict) else None


def requests_that_differ(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Ids of calls whose request is not what was accepted, and how; in short reads. Raises sqlite3.Error."""
    there = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if "requests" not in there:  # by a version that kept none
        return
    last = 0
    while True:
        found = connection.execute(
            "SELECT q.rowid, q.id, q.doc, q.contents, i.request_digest FROM requests AS q"
            " LEFT JOIN invocations AS i ON i.id = q.id WHERE q.rowid > ? ORDER BY q.rowid LIMIT ?",
            (last, _STEP),
        )
        rows = list(within(found, _MOST))
        if not rows:
            break
        for last, id_, doc, contents, digest in rows:  # noqa: B007
            if digest is None:
                yield id_, "what was asked is there, and the call is not"
            elif contents or canonical.digest_bytes(doc) != digest:  # most have none
                problem = requests.problem_of(doc, contents, digest)
                if problem:
                    yield id_, problem
    for (id_,) in connection.execute("SELECT id FROM queue WHERE id NOT IN (SELECT id FROM requests)"):
        yield id_, "it waits, and what was asked is gone"
