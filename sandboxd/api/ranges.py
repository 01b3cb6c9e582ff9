"""Parts of what has a known size: the Range header of RFC 9110, 14.

One range of bytes is served. Several of them, another unit, or what is no range at all is answered with the
whole, as the RFC lets a server do; one that lies outside is ``range_not_satisfiable``, and says how much
there is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from sandboxd.errors import RangeNotSatisfiable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

__all__ = ["Part", "cut", "part_of"]

_RANGE = re.compile(r"bytes=[ \t]*([0-9]*)-([0-9]*)[ \t]*", re.IGNORECASE)
_DIGITS = 18
"""Of a place: nothing is as large as that."""


class Part(NamedTuple):
    """The bytes from ``start`` up to and without ``end``, of ``size``. ``partial``: a range was asked for."""

    start: int
    end: int
    size: int
    partial: bool

    @property
    def length(self) -> int:
        """How many bytes that is."""
        return self.end - self.start

    @property
    def status(self) -> int:
        """Of the answer."""
        return 206 if self.partial else 200

    def headers(self, etag: str | None) -> dict[str, str]:
        """Of the answer."""
        found = {"accept-ranges": "bytes", "content-length": str(self.length)}
        if etag is not None:
            found["etag"] = etag
        if self.partial:
            found["content-range"] = f"bytes {self.start}-{self.end - 1}/{self.size}"
        return found


def part_of(request: Request, size: int, etag: str | None) -> Part:
    """What of ``size`` bytes the request asks for. Raises RangeNotSatisfiable."""
    whole = Part(0, size, size, partial=False)
    given = request.headers.getlist("range")
    found = _RANGE.fullmatch(given[0]) if len(given) == 1 else None
    only_if = request.headers.get("if-range")
    if found is None or (only_if is not None and (etag is None or only_if.strip() != etag)):
        return whole
    first, last = found.groups()
    if not first and not last:
        return whole
    if not first:
        start, end = max(0, size - _place(last)), size
    else:
        start, end = _place(first), size if not last else min(size, _place(last) + 1)
        if last and _is_less(last, first):
            return whole  # that is no range
    if start >= end:
        raise RangeNotSatisfiable(
            f"there are {size} bytes, and {given[0][:80]!r} lies outside of them", size=size
        )
    return Part(start, end, size, partial=True)


def _place(digits: str) -> int:
    """A number, and instead of one that is beyond everything one that is too."""
    digits = digits.lstrip("0")
    return 10**_DIGITS if len(digits) > _DIGITS else int(digits or "0")


def _is_less(one: str, other: str) -> bool:
    """Whether a number is less, however long it is: Python refuses to read thousands of digits."""
    one, other = one.lstrip("0"), other.lstrip("0")
    return (len(one), one) < (len(other), other)


async def cut(pieces: AsyncIterator[bytes], length: int) -> AsyncIterator[bytes]:
    """The first ``length`` bytes of pieces."""
    try:
        async for piece in pieces:
            if length <= len(piece):
                yield piece[:length]
                return
            length -= len(piece)
            yield piece
    finally:
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()
