"""What a request differs in from the one that its key stands for, as lines for a person.

The daemon tells both values where they are short and may be told; of variables, inputs and standard input it
tells the names alone. What it sends is shown as far as it is what it should be, and never as it is.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sandboxd import units
from sandboxd.cli.usage import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["told"]

SHOWN = 6  # fields
MAX_VALUE = 200  # characters
FORMATS: dict[str, Callable[[int], str]] = {
    "deadline": units.format_duration,
    "limits.wall": units.format_duration,
    "limits.cpu_time": units.format_duration,
    "limits.memory": units.format_size,
    "limits.stdout": units.format_size,
    "limits.stderr": units.format_size,
}
"""Numbers with a unit, and how a person writes them."""


def told(details: Mapping[str, Any]) -> list[str]:
    """A line for each field whose values were told, of the details of a ``key_conflict``."""
    differs = details.get("differs")
    found = [each for each in differs if _is_told(each)] if isinstance(differs, list) else []
    lines = [
        f"{visible(each['field'], MAX_VALUE)} was {_shown(each['field'], each['before'])}, "
        f"and is {_shown(each['field'], each['now'])}"
        for each in found[:SHOWN]
    ]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} more; --json has them")
    return lines


def _is_told(each: object) -> bool:
    return isinstance(each, dict) and isinstance(each.get("field"), str) and {"before", "now"} <= each.keys()


def _shown(field: str, value: object) -> str:
    if value is None:
        return "not given"
    if field in FORMATS and isinstance(value, int):
        return FORMATS[field](value)
    return visible(json.dumps(value, ensure_ascii=False), MAX_VALUE)
