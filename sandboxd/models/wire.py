"""What every wire type is made of: the base, texts, quantities, bytes."""

from __future__ import annotations

import base64
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from sandboxd import units

__all__ = ["Absolute", "Bytes", "Content", "Count", "Counted", "Duration", "Size", "Text", "Wire"]


class Wire(BaseModel):
    """The base of every wire type: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True)


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path, such as /workspace")
    return value


def _duration(value: object) -> object:
    return units.parse_duration(value) if isinstance(value, str) else value


def _size(value: object) -> object:
    return units.parse_size(value) if isinstance(value, str) else value


def _count(value: object) -> object:
    return units.parse_count(value) if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_no_nul)]
Absolute = AfterValidator(_absolute)
Duration = Annotated[int, BeforeValidator(_duration), Field(gt=0, le=units.MAX)]
"""Microseconds; a text with a unit (``"1.5s"``) is accepted too."""
Size = Annotated[int, BeforeValidator(_size), Field(ge=0, le=units.MAX)]
"""Bytes; a text with a unit (``"64MiB"``) is accepted too."""
Count = Annotated[int, BeforeValidator(_count), Field(gt=0, le=units.MAX)]

Counted = Annotated[int, Field(ge=0, le=units.MAX)]
"""Told by a process that is not believed."""


class Bytes(Wire):
    """Bytes on the wire: exactly one of ``text`` (valid UTF-8) and ``base64``."""

    text: str | None = None
    base64: str | None = None
    _decoded: bytes | None = PrivateAttr(None)  # decoding tens of MiB once is slow enough

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.text is None) == (self.base64 is None):
            raise ValueError("give exactly one of text and base64")
        if self.base64 is not None:
            try:
                self._decoded = base64.b64decode(self.base64, validate=True)
            except ValueError:
                raise ValueError("base64 is not valid base64") from None
        return self

    def decode(self) -> bytes:
        """The bytes themselves."""
        if self.text is not None:
            return self.text.encode("utf-8", "surrogatepass")
        return base64.b64decode(self.base64 or "") if self._decoded is None else self._decoded

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The wire form of bytes: text when they are valid UTF-8."""
        try:
            return cls(text=data.decode())
        except UnicodeDecodeError:
            return cls(base64=base64.b64encode(data).decode())


class Content(Bytes):
    """A stream or a file. ``text``/``base64`` hold its head; ``size`` and ``digest`` speak of all of it.

    ``complete`` is false when the head is shorter than what is stored (fetch the rest by its own URL);
    ``truncated`` is true when the tool made more than the policy keeps, ``dropped`` bytes of it.
    """

    size: int
    digest: str
    complete: bool = True
    truncated: bool = False
    dropped: int = 0
