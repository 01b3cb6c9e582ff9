"""Sizes, durations, counts, rates and CPUs as fields of a policy's models.

Each is an integer in memory (bytes, microseconds, a plain count, bytes per second, thousandths of a
CPU) and a text with a unit in a file; a bare number where a unit belongs is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from sandboxd import units

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MIN_MEMORY",
    "NUMBER",
    "Count",
    "Cpus",
    "Duration",
    "Memory",
    "Rate",
    "Size",
    "SizeText",
    "between",
]

MIN_MEMORY = 4 * 2**20
"""Bytes; with less, PID 1 and a shell do not start."""


def _texts(parse: Callable[[str], int], kind: str) -> Callable[[object], object]:
    def convert(value: object) -> object:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"write a {kind}")  # noqa: TRY004, pydantic collects ValueError
        return parse(str(value))

    return convert


def _cpus(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("write a number of CPUs such as 1 or 0.5")  # noqa: TRY004, pydantic collects ValueError
    return units.parse_cpus(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("write a whole number such as 64 or 20k")  # noqa: TRY004, pydantic collects ValueError
    return units.parse_count(value)


def between(low: int, high: int, show: Callable[[int], str]) -> AfterValidator:
    def check(value: int) -> int:
        if not low <= value <= high:
            raise ValueError(f"must be from {show(low)} to {show(high)}, and is {show(value)}")
        return value

    return AfterValidator(check)


NUMBER = r"[0-9]+(\.[0-9]+)?"
SizeText = Annotated[str, Field(pattern=f"^{NUMBER} ?(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)$", examples=["512MiB"])]
_TimeText = Annotated[str, Field(pattern=f"^{NUMBER} ?(us|ms|s|m|h)$", examples=["1.5s"])]
_CountText = Annotated[str, Field(pattern=f"^{NUMBER} ?[kM]?$", examples=["20k"])] | int

Size = Annotated[
    int, BeforeValidator(_texts(units.parse_size, "size such as 512MiB"), json_schema_input_type=SizeText)
]
Duration = Annotated[
    int,
    BeforeValidator(_texts(units.parse_duration, "duration such as 1.5s"), json_schema_input_type=_TimeText),
    between(1, units.MAX, units.format_duration),
]
Count = Annotated[
    int,
    BeforeValidator(_count, json_schema_input_type=_CountText),
    between(1, units.MAX, units.format_count),
]
Rate = Annotated[Size, between(1, units.MAX, units.format_size)]
Memory = Annotated[Size, between(MIN_MEMORY, units.MAX, units.format_size)]
Cpus = Annotated[int, BeforeValidator(_cpus, json_schema_input_type=str | float)]
