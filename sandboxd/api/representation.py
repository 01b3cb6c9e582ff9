"""One content as an answer: all of it, a range, or nothing where who asks has it (RFC 9110, 13 and 14)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from sandboxd.api import conditions
from sandboxd.api.openapi import OCTETS
from sandboxd.api.ranges import Part, part_of
from sandboxd.api.streams import StreamResponse, begun

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from starlette.requests import Request

__all__ = ["ATTACHED", "DOCUMENTED", "HEADED", "represented"]

ATTACHED = {"content-disposition": "attachment"}  # a tool made it: no browser shall render it

DOCUMENTED: dict[str, Any] = {
    "raw_answer": True,
    "also": {206: "The range that was asked for; `Content-Range` says which"},
    "empty": {304: "It has one of the ETags of If-None-Match"},
    "headers": (
        ("Range", "`bytes=FIRST-LAST`, one range"),
        ("If-Range", "an ETag: without it a range is answered with the whole"),
        *conditions.HEADERS,
    ),
}
"""What the document says of a route that answers so."""

HEADED: dict[str, Any] = {
    "empty": {304: "It has one of the ETags of If-None-Match"},
    "headers": conditions.HEADERS,
}
"""The same for HEAD."""


async def represented(
    request: Request,
    size: int,
    digest: str | None,
    pieces: Callable[[int, int], AsyncIterator[bytes]],
    headers: Mapping[str, str] = ATTACHED,
) -> Response:
    """What the request asks for of ``size`` bytes; the digest of all of them is None while they still grow.

    ``pieces`` gives those from a place on, so many. Raises InvalidRequest, PreconditionFailed,
    RangeNotSatisfiable, and what ``pieces`` raises before the first of them.
    """
    etag = None if digest is None else conditions.etag_of(digest)
    if conditions.is_unchanged(request, digest):
        return Response(status_code=304, headers={} if etag is None else {"etag": etag})
    if request.method == "HEAD":  # ranges are of GET alone
        whole = Part(0, size, size, partial=False)
        return Response(headers=whole.headers(etag) | dict(headers), media_type=OCTETS)
    part = part_of(request, size, etag)
    chosen = await begun(pieces(part.start, part.length))
    return StreamResponse(chosen, OCTETS, status=part.status, headers=part.headers(etag) | dict(headers))
