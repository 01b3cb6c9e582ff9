"""An exchange with the daemon, and how its answer is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from sandboxd import errors
from sandboxd.client import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["BYTES_IN", "BYTES_OUT", "Call", "body_of", "many", "nothing", "one", "valid"]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
BYTES_IN = {"Content-Type": "application/octet-stream"}
BYTES_OUT = {"Accept": "application/octet-stream"}


@dataclass(frozen=True)
class Call(Generic[T]):
    """An exchange and the decoder of its body. ``decode`` raises Unavailable for a foreign answer."""

    exchange: wire.Exchange
    decode: Callable[[bytes], T]


def one(model: type[M]) -> Callable[[bytes], M]:
    """The decoder of an answer that is one of them."""

    def decode(body: bytes) -> M:
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            raise _foreign(model.__name__, error) from None

    return decode


def many(model: type[M], name: str) -> Callable[[bytes], list[M]]:
    """The decoder of an answer that has a list of them below a name."""
    adapter = TypeAdapter(dict[str, list[model]])  # type: ignore[valid-type]

    def decode(body: bytes) -> list[M]:
        try:
            return list(adapter.validate_json(body).get(name, []))
        except ValidationError as error:
            raise _foreign(name, error) from None

    return decode


def nothing(_: bytes) -> None:
    """The decoder of an answer that says nothing."""


def body_of(model: BaseModel) -> bytes:
    """What is sent of a model: what was given."""
    return model.model_dump_json(exclude_none=True, exclude_defaults=True).encode()


def valid(model: type[M], fields: Mapping[str, Any]) -> M:
    """What a caller's fields make. Raises InvalidRequest, which names the first that does not fit."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        where, what = _first(error)
        raise errors.InvalidRequest(f"{where}: {what}", field=where) from None


def _foreign(what: str, error: ValidationError) -> errors.Unavailable:
    return wire.protocol_error(f"an answer that is no {what} ({': '.join(_first(error))})")


def _first(error: ValidationError) -> tuple[str, str]:
    """Where the first thing is that does not fit, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]
