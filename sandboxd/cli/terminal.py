"""What ``sandboxd`` prints: JSON for programs, tables for people, one line for each error.

Names, arguments and messages come from tools and strangers: in a table they are shown with their control
characters escaped and never read as markup. JSON escapes them by itself.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from sandboxd.cli.usage import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic import BaseModel

__all__ = [
    "age",
    "complain",
    "duration",
    "print_bytes",
    "print_json",
    "print_rows",
    "print_text",
    "wire",
    "words",
]


def wire(value: BaseModel) -> dict[str, Any]:
    """A model as the API writes it: fields without a value are left out."""
    return dict(value.model_dump(mode="json", exclude_none=True))


def print_json(value: Any) -> None:
    """One JSON value, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=True, default=str))


def print_text(text: str) -> None:
    """Lines of text, each with its control characters escaped."""
    for line in text.split("\n"):
        print(visible(line, 100_000))


def print_bytes(chunks: Iterable[bytes]) -> None:
    """A file that a tool made, for a terminal: lines and tabs are kept, all else that acts is escaped."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    for chunk in chunks:
        _print_part(decoder.decode(chunk))
    _print_part(decoder.decode(b"", final=True))


def _print_part(text: str) -> None:
    for part in re.split(r"([\n\t])", text):
        sys.stdout.write(part if part in {"\n", "\t"} else visible(part, len(part)))
    sys.stdout.flush()


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table; ``empty`` says on stderr what it means that there are no rows."""
    from rich import box  # noqa: PLC0415 - --json and errors must not pay for rich
    from rich.console import Console  # noqa: PLC0415 - same
    from rich.table import Table  # noqa: PLC0415 - same
    from rich.text import Text  # noqa: PLC0415 - same

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    if not table.row_count:
        complain(empty)
        return
    console = Console()
    # A pipe has no width: give each row a line of its own, so that grep and awk work.
    console = console if console.is_terminal else Console(width=max(table_width(table, console), 80))
    console.print(table)


def table_width(table: Any, console: Any) -> int:
    """The columns that a table needs to fold nothing."""
    return int(console.measure(table, options=console.options.update(width=10_000)).maximum)


def complain(text: str) -> None:
    """Lines on standard error."""
    for line in text.split("\n"):
        print(f"sandboxd: {visible(line)}", file=sys.stderr)


def duration(microseconds: int | None) -> str:
    """A duration for a person, such as ``1.2 s``."""
    if microseconds is None:
        return "-"
    seconds = microseconds / 1e6
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def age(at: int) -> str:
    """How long ago a time was, in microseconds since the epoch."""
    return duration(max(0, time.time_ns() // 1000 - at))


def words(argv: Sequence[Any]) -> str:
    """A command for a person: quoted as a shell would read it; bytes are shown as escapes."""
    import shlex  # noqa: PLC0415 - only tables need it

    texts = (
        item if isinstance(item, str) else item.decode().decode("utf-8", "backslashreplace") for item in argv
    )
    return " ".join(shlex.quote(text) for text in texts)
