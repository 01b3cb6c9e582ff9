"""Path patterns: ``out/**/*.png``.

A pattern is a relative path whose components may hold ``*`` (any characters), ``?`` (one character)
and ``[a-z]`` or ``[!a-z]`` (one of a set); a component ``**`` stands for any number of components, none
included. No wildcard crosses a ``/``; names that begin with a dot are names like any other. Characters
are those of UTF-8; a byte that is not part of valid UTF-8 counts as one character, which only a
wildcard matches.

Matching is linear: components advance a set of positions (never backtracking over ``**``), and inside
a component each stretch between two ``*`` is found once, leftmost, and never given back (atomic
groups), which is enough because only the first fit matters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from sandboxd import errors

__all__ = ["Pattern"]

_MAX_PATTERN = 4095
_MAX_PARTS = 64  # components: what one step may cost is bounded, whoever wrote the pattern
_MAX_STARS = 4  # components "**": what follows each of them is tried at every directory


def _bracket(text: str, start: int) -> tuple[str, int] | None:
    """The regular expression of the set at ``start`` and the index after it; None if it never closes."""
    end = start + 1
    if text[end : end + 1] in {"!", "^"}:
        end += 1
    if text[end : end + 1] == "]":
        end += 1
    end = text.find("]", end)
    if end < 0:
        return None
    body = text[start + 1 : end]
    negated = body[0] in "!^"
    items: list[str] = []
    rest = body[1:] if negated else body
    while rest:
        if len(rest) >= 3 and rest[1] == "-":
            low, high, rest = rest[0], rest[2], rest[3:]
            if low > high:
                raise errors.InvalidRequest(f"pattern {text!r} has the empty range {low}-{high}")
            items.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            items.append(re.escape(rest[0]))
            rest = rest[1:]
    return f"[{'^' if negated else ''}{''.join(items)}]", end + 1


def _component(text: str) -> re.Pattern[str]:
    segments: list[str] = [""]
    at = 0
    while at < len(text):
        step = at + 1
        match text[at]:
            case "*":
                while text[step : step + 1] == "*":
                    step += 1
                segments.append("")
            case "?":
                segments[-1] += "."
            case "[" if found := _bracket(text, at):
                expression, step = found
                segments[-1] += expression
            case character:
                segments[-1] += re.escape(character)
        at = step
    if len(segments) == 1:
        return re.compile(segments[0], re.DOTALL)
    middle = "".join(f"(?>.*?{segment})" for segment in segments[1:-1])
    return re.compile(f"{segments[0]}{middle}.*{segments[-1]}", re.DOTALL)


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern. ``Pattern.of`` makes one."""

    text: str

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Compile a pattern. Raises InvalidRequest when it can match no path of a workspace."""
        shown = text[:200]
        if not text or len(text.encode("utf-8", "surrogatepass")) > _MAX_PATTERN or "\0" in text:
            raise errors.InvalidRequest(
                f"a pattern has 1 to {_MAX_PATTERN} bytes and no NUL character", pattern=shown
            )
        if any(part in {"", ".", ".."} for part in text.split("/")):
            raise errors.InvalidRequest(
                f"pattern {shown!r} must be relative to the workspace, with no empty, '.' or '..' component",
                pattern=shown,
            )
        if text.count("/") >= _MAX_PARTS:
            raise errors.InvalidRequest(f"a pattern has at most {_MAX_PARTS} components", pattern=shown)
        if text.split("/").count("**") > _MAX_STARS:
            raise errors.InvalidRequest(f"a pattern has at most {_MAX_STARS} times '**'", pattern=shown)
        pattern = cls(text)
        pattern.start()  # compiles, so that a bad set is told now
        return pattern

    @cached_property
    def _parts(self) -> tuple[re.Pattern[str] | None, ...]:
        """An expression per component; None is ``**``."""
        parts: list[re.Pattern[str] | None] = []
        for text in self.text.split("/"):
            if text != "**":
                parts.append(_component(text))
            elif not parts or parts[-1] is not None:
                parts.append(None)
        if parts[-1] is None:  # "out/**" is every file beneath, so at least one component more
            parts.append(re.compile(".*", re.DOTALL))
        return tuple(parts)

    def start(self) -> int:
        """The positions before the first component of a path, as a bit mask."""
        return self._closed(1)

    def step(self, positions: int, name: bytes) -> int:
        """The positions after one more component; 0 means that nothing from here on can match."""
        if not positions:
            return 0
        text = name.decode("utf-8", "surrogateescape")
        reached = 0
        left = positions & ~(1 << len(self._parts))
        while left:
            here = left & -left
            left ^= here
            part = self._parts[here.bit_length() - 1]
            if part is None:
                reached |= here
            elif part.fullmatch(text):
                reached |= here << 1
        return self._closed(reached)

    def accepts(self, positions: int) -> bool:
        """Whether the path that led to these positions matches."""
        return bool(positions >> len(self._parts))

    def matches(self, path: bytes) -> bool:
        """Whether a whole relative path matches."""
        positions = self.start()
        for name in path.split(b"/"):
            positions = self.step(positions, name)
        return self.accepts(positions)

    def _closed(self, positions: int) -> int:
        """With what ``**`` reaches by standing for nothing; two of them are never side by side."""
        return positions | (positions & self._free) << 1

    @cached_property
    def _free(self) -> int:
        """The positions of ``**``."""
        return sum(1 << at for at, part in enumerate(self._parts) if part is None)
