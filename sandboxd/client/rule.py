"""One line of a file of rules, and whether it is about a path.

Theory of operation (gitignore(5); ``dir.c`` and ``wildmatch.c`` of git).  Names are bytes. The rules may be a
tool's, and so may be the names, so matching takes no longer than both are long: a glob is cut at its stars
into pieces of fixed length, and each but the last is taken where it is found first. (The regular expressions
that pathspec makes of rules go back over every star, for ever if somebody wishes so, and match a rule for a
directory against what is in it, which is wrong where rules are in several files.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Rule", "rules_of"]

MAX_NAME = 255  # bytes: what matches only longer ones matches nothing
_BYTES = range(256)
_CLASSES: dict[bytes, Callable[[bytes], bool]] = {
    b"alnum": bytes.isalnum, b"alpha": bytes.isalpha, b"digit": bytes.isdigit, b"lower": bytes.islower,
    b"upper": bytes.isupper, b"space": bytes.isspace,
    b"blank": lambda one: one in b" \t",
    b"cntrl": lambda one: one < b" " or one == b"\x7f",
    b"graph": lambda one: b"!" <= one <= b"~",
    b"print": lambda one: b" " <= one <= b"~",
    b"punct": lambda one: b"!" <= one <= b"~" and not one.isalnum(),
    b"xdigit": lambda one: one in b"0123456789abcdefABCDEF",
}  # fmt: skip


class _Never(Exception):
    """Raised for a glob that matches nothing: a bracket or an escape that does not end."""


class Glob:
    """The part of a rule between two slashes."""

    def __init__(self, text: bytes) -> None:
        self.any_depth = len(text) > 1 and not text.strip(b"*")
        self._pieces: list[tuple[re.Pattern[bytes], int]] | None
        try:
            self._pieces = [(re.compile(pattern, re.DOTALL), length) for pattern, length in _pieces_of(text)]
        except _Never:
            self._pieces = None

    def matches(self, name: bytes) -> bool:
        """Whether all of a name is matched."""
        if self._pieces is None:
            return False
        (first, length), *rest = self._pieces
        if not rest:
            return len(name) == length and first.match(name) is not None
        last, tail = rest.pop()
        if first.match(name) is None:
            return False
        at, end = length, len(name) - tail
        for piece, long in rest:
            found = piece.search(name, at)
            if found is None:
                return False
            at = found.start() + long
        return at <= end and last.match(name, end) is not None


def _pieces_of(text: bytes) -> Iterable[tuple[bytes, int]]:
    """The pieces between stars as regular expressions, and how long what they match is."""
    pattern, length, at, total = b"", 0, 0, 0
    while at < len(text):
        one = text[at : at + 1]
        at += 1
        total += one != b"*"
        if total > MAX_NAME:
            raise _Never
        if one == b"*":
            yield pattern, length
            pattern, length = b"", 0
            continue
        length += 1
        if one == b"?":
            pattern += b"."
        elif one == b"[":
            members, at = _bracket(text, at)
            pattern += b"[%s]" % b"".join(b"\\x%02x" % member for member in members) if members else b"(?!)"
        else:
            if one == b"\\":
                one = text[at : at + 1]
                at += 1
                if not one:
                    raise _Never
            pattern += re.escape(one)
    yield pattern, length


def _bracket(text: bytes, at: int) -> tuple[list[int], int]:
    """The bytes that a bracket has, and where it ends."""
    inverted = text[at : at + 1] in {b"!", b"^"}
    at += inverted
    members: set[int] = set()
    before: int | None = None
    start = at
    while (one := text[at : at + 1]) != b"]" or at == start:
        found, end = _class_of(text, at) if one == b"[" else (None, at)
        if found is not None:
            members |= found
            before, at = None, end
        elif one == b"-" and before is not None and text[at + 1 : at + 2] not in {b"", b"]"}:
            upto, at = _member(text, at + 1)
            members |= set(range(before, upto + 1))
            before = None
        else:
            before, at = _member(text, at)
            members.add(before)
    return [each for each in _BYTES if (each in members) != inverted], at + 1


def _member(text: bytes, at: int) -> tuple[int, int]:
    """One byte in a bracket, and where the next one is."""
    at += text[at : at + 1] == b"\\"
    if at >= len(text):
        raise _Never
    return text[at], at + 1


def _class_of(text: bytes, at: int) -> tuple[set[int] | None, int]:
    """What ``[:name:]`` in a bracket stands for, and where it ends; None where it is none."""
    if text[at + 1 : at + 2] != b":":
        return None, at
    end = text.find(b"]", at + 2)
    if end < 0:
        raise _Never
    if text[end - 1 : end] != b":" or end - 1 == at + 1:
        return None, at
    kind = _CLASSES.get(text[at + 2 : end - 1])
    if kind is None:
        raise _Never
    return {each for each in _BYTES if kind(bytes([each]))}, end + 1


@dataclass(frozen=True)
class Rule:
    """One line: what it matches is ignored, or with ``negated`` is not."""

    globs: tuple[Glob, ...]
    negated: bool
    directories: bool
    """Whether it is about directories alone."""
    anchored: bool
    """Whether it is about paths from its file on, and not about names anywhere beneath."""

    @classmethod
    def of(cls, line: bytes) -> Self | None:
        """The rule of a line; None for one that is empty or a comment."""
        if line.startswith(b"#"):
            return None
        line = _trimmed(line.removesuffix(b"\r"))
        negated = line.startswith(b"!")
        line = line[negated:]
        directories = line.endswith(b"/")
        line = line[: len(line) - directories]
        if not line:
            return None
        anchored = b"/" in line
        parts = _parts(line.removeprefix(b"/")) if anchored else [line]
        return cls(tuple(map(Glob, parts)), negated, directories, anchored)

    def matches(self, path: Sequence[bytes], *, is_directory: bool) -> bool:
        """Whether it is about a path, as names from its file's directory on."""
        if self.directories and not is_directory:
            return False
        if not self.anchored:
            return self.globs[0].matches(path[-1])
        return _walk(self.globs, path)


def _parts(line: bytes) -> list[bytes]:
    """What is between the slashes that are in no bracket."""
    found, start, at = [], 0, 0
    while at < len(line):
        one = line[at : at + 1]
        escaped = line[at : at + 2] == b"\\/"
        if one == b"/" or escaped:
            found.append(line[start:at])
            start = at + 1 + escaped
        if one == b"[":
            try:
                _, at = _bracket(line, at + 1)
            except _Never:
                return [b"["]
        else:
            at += 2 if one == b"\\" else 1
    return [*found, line[start:]]


def _trimmed(line: bytes) -> bytes:
    """Without the spaces at the end that no backslash stands before."""
    end, at = 0, 0
    while at < len(line):
        if line[at : at + 1] == b"\\":
            at += 2
            end = at
            continue
        if line[at : at + 1] != b" ":
            end = at + 1
        at += 1
    return line[:end]


def _walk(globs: Sequence[Glob], path: Sequence[bytes]) -> bool:
    """Match names one by one; ``**`` is any number of them, and at the end at least one."""
    at = here = 0
    star, back = -1, 0
    while here < len(path):
        if at < len(globs) and globs[at].any_depth:
            if at == len(globs) - 1:
                return True
            star, back = at, here
            at += 1
        elif at < len(globs) and globs[at].matches(path[here]):
            at, here = at + 1, here + 1
        elif star >= 0:
            back += 1
            at, here = star + 1, back
        else:
            return False
    return at == len(globs)


def rules_of(text: bytes) -> tuple[Rule, ...]:
    """The rules of a file, the last first."""
    lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    found = [rule for line in lines if (rule := Rule.of(line)) is not None]
    return tuple(reversed(found))
