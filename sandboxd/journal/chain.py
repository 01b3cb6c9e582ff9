"""The chain of records: each header holds the digest of the one before it.

Theory of operation: a header is canonical JSON (RFC 8785). Its number ``n`` counts from 1 without
gaps; ``prev`` is the digest of the whole header before it, and of ``GENESIS`` for the first. A changed
header no longer has the digest that the next one names, a removed or moved one breaks the numbers, and
a body that was changed no longer has the digest in its header. Cutting off the newest records cannot
be seen from within: signed heads (``signing``) and heads that were exported show it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd import canonical, errors
from sandboxd.journal import sessioncalls

if TYPE_CHECKING:
    import sqlite3

__all__ = ["GENESIS", "Broken", "Head", "append", "follow", "parse_head", "read_head"]

GENESIS = "sha256:" + "0" * 64
_HEAD = re.compile(r"(?:(\d{1,15}):)?(sha256:[0-9a-f]{64})")
_BODY = re.compile(rb'"body":"(sha256:[0-9a-f]{64})"')


@dataclass(frozen=True)
class Head:
    """The newest record: its number (0: there is none yet) and its digest."""

    n: int
    digest: str

    def __str__(self) -> str:
        return f"{self.n}:{self.digest}"


class Broken(Exception):
    """Raised when a record is not as it was recorded; the message says which and how."""

    def __init__(self, n: int, problem: str) -> None:
        super().__init__(problem)
        self.n = n


def parse_head(text: str) -> tuple[int | None, str]:
    """The number, if it has one, and the digest of ``N:sha256:…`` or ``sha256:…``. Raises InvalidRequest."""
    found = _HEAD.fullmatch(text)
    if found is None:
        raise errors.InvalidRequest("a head is N:sha256:<64 hex digits>", field="head")
    return (None if found[1] is None else int(found[1])), found[2]


def read_head(connection: sqlite3.Connection) -> Head:
    """The newest record of a journal."""
    row = connection.execute("SELECT n, digest FROM records ORDER BY n DESC LIMIT 1").fetchone()
    return Head(*row) if row else Head(0, GENESIS)


def append(
    connection: sqlite3.Connection, head: Head, header: dict[str, Any], body: bytes, *, indexed: bool = True
) -> Head:
    """Add a record after ``head`` and return the new head. ``header`` gets ``n``, ``prev`` and ``body``.

    ``indexed``: whether the index of sessions gets it.
    """
    streams = [header.get(name) or {} for name in ("stdout", "stderr")]
    held = len(body) + sum(stream.get("size", 0) for stream in streams)
    whole = {**header, "n": head.n + 1, "prev": head.digest, "body": canonical.digest_bytes(body)}
    data = canonical.canonical(whole)
    new = Head(head.n + 1, canonical.digest_bytes(data))
    connection.execute(
        "INSERT INTO records (n, id, digest, header, at, bytes) VALUES (?, ?, ?, ?, ?, ?)",
        (new.n, header["id"], new.digest, data, header["at"], held),
    )
    if indexed and (session := header.get("session")) is not None:
        sessioncalls.add(connection, session, new.n)
    return new


def follow(head: Head, n: int, id_: str, digest: str, data: bytes) -> str:
    """The digest of the body of the record that follows ``head``. Raises Broken if it is not that record."""
    if n != head.n + 1:
        raise Broken(head.n + 1, f"record {head.n + 1} is missing: record {n} follows {head.n}")
    if canonical.digest_bytes(data) != digest:
        raise Broken(n, f"record {n} was changed: its header no longer has its digest")
    fields = _glance(head, n, id_, data)
    if fields is None:
        fields = _parsed(head, n, id_, data)
    return fields


def _glance(head: Head, n: int, id_: str, data: bytes) -> str | None:
    """The same without parsing, where each member is there just once; None where that does not show.

    In canonical JSON a member looks in one way only, and a quote within a text is escaped: what is found
    once is the member that each header has, and no text and no part of another object.
    """
    members = (b'"prev":"%b"' % head.digest.encode(), b',"n":%d,' % n, b'"id":"%b"' % id_.encode())
    keys = (b'"prev":', b'"n":', b'"id":', b'"body":')
    if not all(map(data.__contains__, members)) or any(data.count(key) != 1 for key in keys):
        return None
    found = _BODY.search(data)
    return None if found is None else found[1].decode()


def _parsed(head: Head, n: int, id_: str, data: bytes) -> str:
    try:
        header = json.loads(data)
    except ValueError:
        raise Broken(n, f"record {n} is no JSON") from None
    if not isinstance(header, dict) or header.get("n") != n or header.get("id") != id_:
        raise Broken(n, f"record {n} is not the record of its place: it was moved or changed")
    if header.get("prev") != head.digest:
        raise Broken(
            n, f"record {n} does not follow record {head.n}: one of them was changed, moved or replaced"
        )
    return str(header.get("body"))
