"""Whom the daemon tells that a call has ended."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from sandboxd.models.wire import Absolute, Text, Wire

__all__ = ["Callback"]

MAX_PATH = 107  # sun_path without its NUL, unix(7)


def _fits(value: str) -> str:
    if len(value.encode("utf-8", "surrogatepass")) > MAX_PATH:
        raise ValueError(f"longer than the {MAX_PATH} bytes that a socket's address holds")
    return value


class Callback(Wire):
    """A datagram socket of the caller's, to which one line of JSON is sent: id, state, cause, exit code."""

    unix: Annotated[Text, Absolute, AfterValidator(_fits), Field(max_length=MAX_PATH)]
