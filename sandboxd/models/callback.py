"""Who is told that a call has ended, and what became of that."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sandboxd.models.wire import Absolute, Text, Wire

__all__ = ["Callback", "CallbackState"]

MAX_PATH = 107  # sun_path without its NUL, unix(7)
PROGRAM = r"^[a-z0-9][a-z0-9_-]{0,63}$"


def _fits(value: str) -> str:
    if len(value.encode("utf-8", "surrogatepass")) > MAX_PATH:
        raise ValueError(f"longer than the {MAX_PATH} bytes that a socket's address holds")
    return value


class Callback(Wire):
    """A datagram socket of the caller's or a program of the operator's, which is told one line of JSON."""

    unix: Annotated[Text, Absolute, AfterValidator(_fits), Field(max_length=MAX_PATH)] | None = None
    """Sent there: id, state, cause, exit code."""
    exec: Annotated[str, Field(pattern=PROGRAM)] | None = None
    """A name of the configuration's ``callbacks``. Its standard input has the whole outcome too."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.unix is None) == (self.exec is None):
            raise ValueError(
                "give either `unix`, the path of a socket of yours, or `exec`, the name of a program of the "
                "configuration's `callbacks`"
            )
        return self


class CallbackState(Wire):
    """What became of the callback of a call."""

    unix: str | None = None
    exec: str | None = None
    state: Literal["owed", "told", "given_up"]
    """``owed``: the call has not ended, or it is tried again."""
    tries: int
    at: int | None = None
    """When it was told, or given up."""
    problem: str | None = None
    """Why the last try failed."""
