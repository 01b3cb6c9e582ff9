"""What a policy's rule for artifacts asks of a file beside its path: its size, what it is, whether it has
secrets.

What a file is, is told from its first KiB (``filetype``), never from its name: a tool chose both, so this
keeps mistakes and simple tricks out, and proves nothing of what a program that opens the file takes it for.
Secrets are those of the call, in every form that ``redaction`` knows, and tokens that look like well-known
ones; what was compressed or encrypted is not seen through.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

import filetype

if TYPE_CHECKING:
    from sandboxd.redaction import Redactor

__all__ = ["HEAD", "Rule", "Scan", "fits", "media_type"]

HEAD = 1024
"""Bytes at the beginning of a file that are looked at for what it is."""
TEXT, BYTES = "text/plain", "application/octet-stream"
_LONGEST = 256  # bytes of a token that are kept of a chunk, so that the next one may end it
_TOKENS = {
    "a private key": rb"-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    "an AWS access key": rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Za-z0-9])",
    "a GitHub token": rb"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{22,244})",
    "a GitLab token": rb"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{20,}",
    "a Slack token": rb"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{10,}",
    "an npm token": rb"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}",
}
_ANY = re.compile(b"|".join(b"(%b)" % pattern for pattern in _TOKENS.values()))
_NAMES = tuple(_TOKENS)


class Rule(NamedTuple):
    """A pattern of files that are released, and what else they must be."""

    path: str
    max_size: int | None = None
    types: tuple[str, ...] = ()
    """Media types, also ``image/*``; without any, all."""
    files: int | None = None
    """The most files that are released under it."""
    secrets: Literal["allow", "deny"] = "allow"


def media_type(head: bytes) -> str:
    """What a file is by its first bytes: a media type; ``text/plain`` for other UTF-8."""
    head = head[:HEAD]
    try:
        found = filetype.guess_mime(head) if head else None
    except Exception:  # noqa: BLE001  # a matcher tripped over hostile bytes: then it is none that we know
        found = None
    if isinstance(found, str):
        return found
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if len(head) < HEAD or error.start < len(head) - 3:  # not just a character that was cut
            return BYTES
        text = head[: error.start].decode()
    printable = all(char.isprintable() or char in "\t\n\r\f" for char in text)
    return TEXT if printable else BYTES


def fits(found: str, types: tuple[str, ...]) -> bool:
    """Whether a media type is one of these; ``image/*`` stands for all images, no type for all."""
    return not types or any(
        found == one or (one.endswith("/*") and found.startswith(one[:-1])) for one in types
    )


class Scan:
    """Looks for secrets in a file that comes in pieces."""

    def __init__(self, redactor: Redactor | None) -> None:
        self._probe = None if redactor is None else redactor.probe()
        self._stream = None if self._probe is None else self._probe.stream()
        self._tail = b""
        self.found: str | None = None
        """What was found, in words that say nothing of its value."""

    def feed(self, data: bytes) -> None:
        """The next piece."""
        if self.found is not None:
            return
        if self._stream is not None:
            self._stream.feed(data)
        text = self._tail + data
        token = _ANY.search(text)
        if token is not None and token.lastindex is not None:
            self.found = f"it has what looks like {_NAMES[token.lastindex - 1]}"
        self._tail = text[-_LONGEST:]
        self._look()

    def finish(self) -> str | None:
        """What was found in all of it."""
        if self._stream is not None:
            self._stream.finish()
        self._look()
        return self.found

    def _look(self) -> None:
        if self.found is None and self._probe is not None and self._probe.count:
            self.found = "it has a secret of the call"
