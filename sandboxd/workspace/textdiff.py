"""A unified diff of two texts, in bounded time.

Theory of operation.  Lines that both texts begin and end with are set aside. For the rest the shortest
script is looked for as Myers has it ("An O(ND) Difference Algorithm and Its Variations", 1986), whose
cost grows with the number of differences; past ``_MAX_DIFFERENCES`` of them, or ``_MAX_STEPS``, all of
the rest is told as replaced, which is as true and less short. (``difflib`` takes cubic time on texts made
for it.)

What is printed is what ``git apply`` and patch(1) read; names that need it are quoted as git does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["MAX_TEXT", "TextDiff", "text_diff"]

MAX_TEXT = 1 << 20
"""Bytes of a text, on either side, that is looked into."""
_MAX_DIFFERENCES = 800
_MAX_STEPS = 1_500_000
_CONTEXT = 3

_Block = tuple[int, int, int, int]
"""Lines of the old text (from, to) that became lines of the new one (from, to)."""


@dataclass(frozen=True)
class TextDiff:
    """The diff of one file. ``omitted`` says why there is none, or that it was cut: ``truncated``."""

    text: str
    omitted: Literal["binary", "too_large", "truncated"] | None = None


def text_diff(path: bytes, old: bytes | None, new: bytes | None, *, most: int = 64 << 10) -> TextDiff:
    """The unified diff of a file's content, None where there is no file, of ``most`` bytes or less."""
    if max(len(old or b""), len(new or b"")) > MAX_TEXT:
        return TextDiff("", "too_large")
    try:
        left, right = (_lines(text) for text in (old or b"", new or b""))
    except ValueError:
        return TextDiff("", "binary")
    head = [
        f"--- {_quoted(b'a/' + path) if old is not None else '/dev/null'}\n",
        f"+++ {_quoted(b'b/' + path) if new is not None else '/dev/null'}\n",
    ]
    parts: list[str] = []
    size = 0
    for line in _unified(left, right):
        for text in head if not parts else ():
            parts.append(text)
            size += len(text.encode())
        size += len(line.encode())
        if size > most:
            return TextDiff("".join(parts), "truncated")
        parts.append(line)
    return TextDiff("".join(parts))


def _lines(data: bytes) -> list[str]:
    """The lines of a text, each with its end. Raises ValueError for what is no text."""
    if b"\0" in data:
        raise ValueError("a NUL byte is in no text")
    text = data.decode()
    lines = text.split("\n")
    last = lines.pop()
    return [f"{line}\n" for line in lines] + ([last] if last else [])


def _quoted(path: bytes) -> str:
    """A name as git writes it: in quotes, with escapes, where it has bytes that a line cannot show."""
    try:
        text = path.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and text and not set('"\\') & set(text):
        return text
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in path)
    return f'"{"".join(plain)}"'


def _unified(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    for group in _grouped(_blocks(old, new)):
        first, last = group[0], group[-1]
        i1, j1 = max(0, first[0] - _CONTEXT), max(0, first[2] - _CONTEXT)
        i2, j2 = min(len(old), last[1] + _CONTEXT), min(len(new), last[3] + _CONTEXT)
        yield f"@@ -{_span(i1, i2)} +{_span(j1, j2)} @@\n"
        at = i1
        for a1, a2, b1, b2 in group:
            yield from (_marked(" ", line) for line in old[at:a1])
            yield from (_marked("-", line) for line in old[a1:a2])
            yield from (_marked("+", line) for line in new[b1:b2])
            at = a2
        yield from (_marked(" ", line) for line in old[at:i2])


def _marked(mark: str, line: str) -> str:
    return mark + line if line.endswith("\n") else f"{mark}{line}\n\\ No newline at end of file\n"


def _span(start: int, end: int) -> str:
    count = end - start
    if count == 1:
        return str(start + 1)
    return f"{start + 1 if count else start},{count}"


def _grouped(blocks: Sequence[_Block]) -> Iterator[list[_Block]]:
    """Blocks that are so near to each other that they share a hunk."""
    group: list[_Block] = []
    for block in blocks:
        if group and block[0] - group[-1][1] > 2 * _CONTEXT:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _blocks(old: Sequence[str], new: Sequence[str]) -> list[_Block]:
    """What became what, in order; lines between blocks are the same."""
    start, end = 0, min(len(old), len(new))
    while start < end and old[start] == new[start]:
        start += 1
    tail = 0
    while tail < end - start and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    left, right = old[start : len(old) - tail], new[start : len(new) - tail]
    if not left and not right:
        return []
    whole: _Block = (start, start + len(left), start, start + len(right))
    if not left or not right:
        return [whole]
    trace = _trace(left, right)
    if trace is None:
        return [whole]
    return _merged([(start + x, start + y) for x, y in _matches(trace, len(left), len(right))], whole)


def _trace(a: Sequence[str], b: Sequence[str]) -> list[list[int]] | None:
    """How far each diagonal is reached with 0, 1, 2, … differences; None where that takes too long."""
    n, m = len(a), len(b)
    most = min(n + m, _MAX_DIFFERENCES)
    reach = [0] * (2 * most + 3)
    trace: list[list[int]] = []
    steps = 0
    for d in range(most + 1):
        for k in range(-d, d + 1, 2):
            down = k == -d or (k != d and reach[most + k] < reach[most + k + 2])
            x = reach[most + k + 2] if down else reach[most + k] + 1
            y = x - k
            begun = x
            while x < n and y < m and a[x] == b[y]:
                x, y = x + 1, y + 1
            steps += x - begun + 1
            reach[most + k + 1] = x
            if x >= n and y >= m:
                trace.append(reach[most - d : most + d + 3])
                return trace
        trace.append(reach[most - d : most + d + 3])
        if steps > _MAX_STEPS:
            return None
    return None


def _matches(trace: list[list[int]], n: int, m: int) -> list[tuple[int, int]]:
    """The pairs of lines that are the same, in order. ``trace[d][k + d + 1]`` is the reach of diagonal k."""
    found: list[tuple[int, int]] = []
    x, y = n, m
    for d in range(len(trace) - 1, 0, -1):
        before, k = trace[d - 1], x - y

        def reached(diagonal: int, before: list[int] = before, d: int = d) -> int:
            at = diagonal + d
            return before[at] if 0 < at < len(before) - 1 else -1

        down = k == -d or (k != d and reached(k - 1) < reached(k + 1))
        came = k + 1 if down else k - 1
        x0 = reached(came)
        y0 = x0 - came
        while x > x0 + (not down) and y > y0 + down:
            x, y = x - 1, y - 1
            found.append((x, y))
        x, y = x0, y0
    while x > 0 and y > 0:
        x, y = x - 1, y - 1
        found.append((x, y))
    found.reverse()
    return found


def _merged(matches: list[tuple[int, int]], whole: _Block) -> list[_Block]:
    """The blocks between matching lines."""
    blocks: list[_Block] = []
    i, j = whole[0], whole[2]
    for x, y in [*matches, (whole[1], whole[3])]:
        if x > i or y > j:
            blocks.append((i, x, j, y))
        i, j = x + 1, y + 1
    return blocks
