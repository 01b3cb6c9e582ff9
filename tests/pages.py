"""The pages of the documentation as data: their fenced blocks, tables, links and anchors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CELL = re.compile(r"(?<!\\)\|")
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, its text, and the line on which it begins."""

    info: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """One page."""

    path: Path

    @property
    def name(self) -> str:
        """The path from the root of the checkout."""
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text()

    @property
    def prose(self) -> str:
        """All but the fenced blocks."""
        return _FENCE.sub("", self.text)

    def blocks(self, info: str) -> list[Block]:
        """The fenced blocks with this info string."""
        return [
            Block(found[1], found[2], self.text[: found.start()].count("\n") + 1)
            for found in _FENCE.finditer(self.text)
            if found[1] == info
        ]

    def links(self) -> list[str]:
        """The targets of all links."""
        return _LINK.findall(self.prose)

    def anchors(self) -> set[str]:
        """The anchors of all headings, as forges make them."""
        kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(self.prose))
        return {heading.replace(" ", "-") for heading in kept}

    def rows(self, first: str) -> Iterator[list[str]]:
        """The rows of every table whose first column has this title, as the texts of their cells."""
        title = None
        for line in self.prose.splitlines():
            if not line.startswith("|"):
                title = None
                continue
            cells = [cell.strip() for cell in _CELL.split(line)[1:-1]]
            if title is None:
                title = cells[0]
            elif title == first and not set(line) <= set("|-: "):
                yield cells

    def section(self, heading: str) -> str:
        """The prose from a heading to the next one of its level or above."""
        level = heading.partition(" ")[0]
        rest = self.prose.partition(f"{heading}\n")[2]
        assert rest, f"{self.name} has no heading {heading!r}"
        return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def code(cell: str) -> list[str]:
    """What stands in backticks in a cell."""
    return _CODE.findall(cell)


def page(name: str) -> Page:
    """The page of a path from the root of the checkout."""
    return Page(ROOT / name)


PAGES = tuple(
    Page(path) for path in (ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md",
                            *sorted((ROOT / "docs").glob("*.md")))
)  # fmt: skip
