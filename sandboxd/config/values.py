"""The forms of values in the configuration file: texts with units, paths, names of accounts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sandboxd import units

__all__ = [
    "MAX_ID",
    "YEARS",
    "AbsolutePath",
    "Account",
    "Count",
    "Cpus",
    "Duration",
    "Id",
    "LongDuration",
    "Percent",
    "Section",
    "Size",
    "absolute_path",
    "duration",
]

MAX_ID = 2**32 - 2  # (uid_t)-1 means "no id", chown(2)
YEARS = 3650 * 24 * 3600 * 10**6
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?")


def _size(value: object) -> object:
    if isinstance(value, str):
        return units.parse_size(value)
    raise ValueError("a size needs a unit, such as 512MiB")


def duration(value: object) -> object:
    """Microseconds of a text with a unit."""
    if isinstance(value, str):
        return units.parse_duration(value)
    raise ValueError("a duration needs a unit, such as 10s")


def _cpus(value: object) -> object:
    return units.parse_cpus(value) if isinstance(value, (int, float, str)) else value


def _count(value: object) -> object:
    return units.parse_count(value) if isinstance(value, str) else value


def _percent(value: object) -> object:
    share = re.fullmatch(r"([0-9]{1,3})\s?%", value) if isinstance(value, str) else None
    if share is None:
        raise ValueError('write a share such as "3%"')
    return int(share[1])


def absolute_path(value: object) -> object:
    """The path of a text. Raises ValueError for what is no absolute one."""
    if not isinstance(value, str):
        raise ValueError("a path must be a text")  # noqa: TRY004  # pydantic collects ValueError only
    if not value.startswith("/") or "\0" in value or len(value) > 4095:
        raise ValueError(f"{value[:80]!r} is not an absolute path")
    return Path(value)


def _account(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is not the name of a user or group")
    return value


Size = Annotated[int, BeforeValidator(_size), Field(gt=0, le=units.MAX)]
Duration = Annotated[int, BeforeValidator(duration), Field(gt=0, le=24 * 3600 * 10**6)]
LongDuration = Annotated[int, BeforeValidator(duration), Field(ge=60 * 10**6, le=YEARS)]
Count = Annotated[int, BeforeValidator(_count), Field(strict=True, ge=0)]
Percent = Annotated[int, BeforeValidator(_percent)]
Cpus = Annotated[int, BeforeValidator(_cpus), Field(ge=10)]
"""Thousandths of a CPU."""
AbsolutePath = Annotated[Path, BeforeValidator(absolute_path)]
Account = Annotated[str, AfterValidator(_account)]
Id = Annotated[int, Field(strict=True, ge=0, le=MAX_ID)]


class Section(BaseModel):
    """The base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
