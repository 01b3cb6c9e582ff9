"""The units that people write in policies and requests, and the integers they stand for.

Sizes become bytes, durations microseconds, counts plain integers, CPUs thousandths of one CPU.
"""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = [
    "format_count",
    "format_cpus",
    "format_duration",
    "format_size",
    "parse_count",
    "parse_cpus",
    "parse_duration",
    "parse_size",
]

SIZES = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
DURATIONS = {"us": 1, "ms": 10**3, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86_400 * 10**6}
COUNTS = {"": 1, "k": 10**3, "M": 10**6}
MAX = 2**53 - 1  # what canonical JSON can hold exactly
_QUANTITY = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s?([A-Za-z]*)")


def _parse(text: str, units: dict[str, int], kind: str, example: str) -> int:
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or found[2] not in units:
        names = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{text!r} is not a {kind}; write a number with one of {names}, such as {example}")
    exact = Decimal(found[1]) * units[found[2]]
    value = int(exact)
    if value != exact:
        raise ValueError(f"{text!r} is not a whole number of the smallest unit; write a rounder {kind}")
    if value > MAX:
        raise ValueError(f"{text!r} is too large for a {kind}")
    return value


def parse_size(value: str) -> int:
    """Bytes of a text such as ``512MiB``; a unit is required. Raises ValueError."""
    return _parse(value, SIZES, "size", "512MiB")


def parse_duration(value: str) -> int:
    """Microseconds of a text such as ``1.5s``; a unit is required. Raises ValueError."""
    return _parse(value, DURATIONS, "duration", "1.5s")


def parse_count(value: str | int) -> int:
    """An integer of ``20k`` or of a plain number. Raises ValueError."""
    return _parse(str(value), COUNTS, "count", "20k")


def parse_cpus(value: str | float) -> int:
    """Thousandths of a CPU of a number such as ``1`` or ``0.5``. Raises ValueError."""
    try:
        exact = Decimal(str(value)) * 1000
        thousandths = int(exact)
    except (ArithmeticError, ValueError):
        raise ValueError(f"{value!r} is not a number of CPUs; write one such as 1 or 0.5") from None
    if thousandths != exact or not 10 <= thousandths <= 1_000_000:
        raise ValueError(f"{value!r} is not a number of CPUs from 0.01 to 1000 in steps of 0.001")
    return thousandths


def _format(value: int, units: dict[str, int], order: tuple[str, ...]) -> str:
    for unit in order:
        if value and value % units[unit] == 0:
            return f"{value // units[unit]}{unit}"
    return f"{value}{order[-1]}"


def format_size(value: int) -> str:
    """The shortest exact text of a size in bytes, such as ``512MiB``."""
    return _format(value, SIZES, ("TiB", "GiB", "MiB", "KiB", "B"))


def format_duration(value: int) -> str:
    """The shortest exact text of a duration in microseconds, such as ``1500ms``."""
    return _format(value, DURATIONS, ("h", "m", "s", "ms", "us"))


def format_count(value: int) -> str:
    """The shortest exact text of a count, such as ``20k``."""
    return _format(value, COUNTS, ("M", "k", ""))


def format_cpus(value: int) -> str:
    """The text of thousandths of a CPU, such as ``0.5``."""
    return f"{Decimal(value) / 1000:f}"
