"""Conditions on a content: If-Match and If-None-Match of RFC 9110, 13.1.

The ETag of a content is its digest in quotes, and a strong one. So If-Match, which compares strongly, is
never fulfilled by a tag that is marked as weak, and If-None-Match does not look at the mark. There are no
times of a last change, so If-Modified-Since and If-Unmodified-Since say nothing, as the RFC has it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sandboxd.errors import InvalidRequest, PreconditionFailed
from sandboxd.workspace.edit import Condition, names

if TYPE_CHECKING:
    from starlette.requests import Request

    from sandboxd.workspace.edit import Tags

__all__ = ["HEADERS", "condition_of", "etag_of", "is_unchanged"]

HEADERS = (
    ("If-Match", "ETags, one of which it must have, or `*`: it must be there"),
    ("If-None-Match", "ETags, none of which it may have, or `*`: it may not be there"),
)
"""For the document: each header and what it says."""
_ELEMENT = re.compile(r'[ \t]*(?:(W/)?"([^"\x00-\x20\x7f]*)"[ \t]*)?(?:,|$)')


def etag_of(digest: str) -> str:
    """What stands for a content in headers."""
    return f'"{digest}"'


def condition_of(request: Request) -> Condition:
    """What the request's headers say. Raises InvalidRequest."""
    return Condition(
        match=_tags(request, "If-Match", weak=False), unlike=_tags(request, "If-None-Match", weak=True)
    )


def is_unchanged(request: Request, digest: str | None) -> bool:
    """Whether who asks for a content has it already; ``digest`` is None where it is not known.

    Raises InvalidRequest, and PreconditionFailed where it is not the one that is asked for.
    """
    asked = condition_of(request)
    if asked.match is not None and not names(asked.match, digest):
        found = "has no digest yet" if digest is None else f"is {digest}"
        raise PreconditionFailed(f"what is there {found}, which If-Match does not name", digest=digest)
    return asked.unlike is not None and names(asked.unlike, digest)


def _tags(request: Request, header: str, *, weak: bool) -> Tags | None:
    """The digests that a header names; with ``weak`` also those that are marked so."""
    given = request.headers.getlist(header)
    if not given:
        return None
    text = ",".join(given).strip(" \t")
    if text == "*":
        return "*"
    found: list[tuple[str | None, str]] = []
    at = 0
    while at < len(text):
        element = _ELEMENT.match(text, at)
        if element is None:
            break
        at = element.end()
        if element[2] is not None:
            found.append((element[1], element[2]))
    if at < len(text) or not found:
        raise InvalidRequest(
            f'{header} is * or a list of ETags, such as "sha256:…", in their quotes', field=header
        )
    return frozenset(tag for mark, tag in found if weak or mark is None)
