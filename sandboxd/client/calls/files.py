"""The calls of the API that are about the files of sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, TypedDict
from urllib.parse import quote

from sandboxd import errors, models
from sandboxd.client import wire
from sandboxd.client.calls.call import BYTES_IN, BYTES_OUT, Call, body_of, one

if TYPE_CHECKING:
    from typing import Unpack

__all__ = [
    "ListingFields",
    "ReadFields",
    "bring",
    "diff",
    "export",
    "lend",
    "listing",
    "make_directory",
    "put",
    "read",
    "remove",
]


class ListingFields(TypedDict):
    """Of which checkpoint, how deep, with digests; ``after`` is the ``next`` of the page before.

    ``limit`` is how many files a page has.
    """

    checkpoint: NotRequired[str | None]
    recursive: NotRequired[bool]
    digest: NotRequired[bool]
    after: NotRequired[str | None]
    limit: NotRequired[int]


def _file(session: str, path: str, **query: str | int | None) -> str:
    """The target of a file, whose path is the text that the daemon gave."""
    base = wire.target("sessions", session, "files", **query)
    before, mark, after = base.partition("?")
    return f"{before}/{quote(path, safe='/')}{mark}{after}"


def diff(
    session: str, since: str | None, to: str | None, *, text: bool, limit: int
) -> Call[models.SessionDiff]:
    """What differs between two checkpoints."""
    target = wire.target("sessions", session, "diff", since=since, to=to, text=text, limit=limit)
    return Call(wire.Exchange("GET", target), one(models.SessionDiff))


def listing(session: str, path: str, **fields: Unpack[ListingFields]) -> Call[models.FileList]:
    """What a directory has."""
    target = wire.target("sessions", session, "files", path=path, **fields)
    return Call(wire.Exchange("GET", target), one(models.FileList))


class ReadFields(TypedDict):
    """Of which checkpoint; from which byte on, and how many, else to the end; what digest it must have."""

    checkpoint: NotRequired[str | None]
    offset: NotRequired[int]
    length: NotRequired[int | None]
    match: NotRequired[str | None]


def read(session: str, path: str, **fields: Unpack[ReadFields]) -> wire.Exchange:
    """The bytes of a file. Raises InvalidRequest for what is no range."""
    target = _file(session, path, checkpoint=fields.get("checkpoint"))
    headers = BYTES_OUT | _match(fields.get("match"))
    offset, length = fields.get("offset", 0), fields.get("length")
    for name, value, least in (("offset", offset, 0), ("length", length, 1)):
        if value is not None and value < least:
            raise errors.InvalidRequest(f"{name} is {value}, and has to be {least} at least", field=name)
    if offset or length is not None:
        last = "" if length is None else offset + length - 1
        headers |= {"Range": f"bytes={offset}-{last}"}
    return wire.Exchange("GET", target, headers=headers)


def put(
    session: str, path: str, data: bytes | None, *, mode: int | None, match: str | None, new: bool
) -> Call[models.FileWritten]:
    """Write a file; ``match`` is the digest that it must have, or ``*``; ``new``: nothing may be there.

    ``data`` is None where it is sent in chunks.
    """
    headers = BYTES_IN | _match(match)
    headers |= {"If-None-Match": "*"} if new else {}
    target = _file(session, path, mode=None if mode is None else f"{mode & 0o777:03o}")
    return Call(wire.Exchange("PUT", target, data, headers), one(models.FileWritten))


def remove(session: str, path: str, *, recursive: bool, match: str | None) -> Call[models.FileWritten]:
    """Remove a file or directory."""
    target = _file(session, path, recursive=recursive)
    return Call(wire.Exchange("DELETE", target, headers=_match(match)), one(models.FileWritten))


def make_directory(session: str, path: str) -> Call[models.FileWritten]:
    """Make a directory."""
    return Call(wire.Exchange("PUT", _file(session, path, directory=1), b""), one(models.FileWritten))


def export(session: str, since: str | None, to: str | None, *, times: bool) -> wire.Exchange:
    """A layer of the files."""
    target = wire.target("sessions", session, "export", since=since, to=to, times=times)
    return wire.Exchange("GET", target, headers={"Accept": "*/*"})


def bring(session: str, *, match: str | None, own: bool) -> Call[models.CheckpointInfo]:
    """Put a layer, which is sent in chunks, over the files; ``match`` is the digest of a checkpoint."""
    target = wire.target("sessions", session, "import", own=own)
    # All of it is on the disk before an answer comes, which may take as long as there are files.
    exchange = wire.Exchange("POST", target, headers=_match(match), waits=True)
    return Call(exchange, one(models.CheckpointInfo))


def _match(digest: str | None) -> dict[str, str]:
    return {} if digest is None else {"If-Match": digest if digest == "*" else f'"{digest}"'}


def lend(session: str, handle: str) -> Call[models.SessionInfo]:
    """Give a session its directory again."""
    body = body_of(models.SessionLend(checkout=handle))
    return Call(
        wire.Exchange("POST", wire.target("sessions", session, "checkout"), body), one(models.SessionInfo)
    )
