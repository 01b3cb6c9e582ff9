"""What a peer sends, decoded strictly: JSON bodies, raw bodies, and query strings.

A body is bounded before it is read where it says its length, and while it is read where it does not.
JSON must be UTF-8 with no duplicate key, no NaN, no unbounded depth: what two parsers could read
in two ways is refused. The number of its values is bounded before it is parsed: a few bytes of ``[],[],``
cost hundreds as objects, and the event loop has nothing else to do meanwhile.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

import anyio
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from sandboxd import canonical, units
from sandboxd.api import problem
from sandboxd.errors import InvalidRequest, RequestTimeout, TooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from sandboxd.room import Held

__all__ = ["Bounds", "chunks", "decode", "parse_json", "query", "read"]

Model = TypeVar("Model", bound=BaseModel)

MAX_VALUES = 100_000  # of one JSON text; the largest request that the models accept has about 50,000
MAX_PARAMETERS = 100
MAX_QUERY = 16 * 1024


def media_type(request: Request) -> str:
    """The media type of the body, without parameters; empty if the peer gave none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True)
class Bounds:
    """Of a body that is read whole: bytes, and microseconds from its header to its end."""

    size: int
    time: int


async def read(request: Request, bounds: Bounds, held: Held | None = None) -> bytes:
    """The whole body. Raises TooLarge as soon as it is known to be, RequestTimeout if it is cut off or late.

    ``held`` counts what is held meanwhile; its QueueFull is raised too.
    """
    limit = bounds.size
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > limit:  # h11 has seen to it that it is a number
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    with anyio.move_on_after(bounds.time / 1e6) as late:
        async for part in chunks(request):
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            if held is not None:
                held.grow(len(part))
            parts.append(part)
    if late.cancelled_caught:
        raise RequestTimeout(f"the body did not arrive within {units.format_duration(bounds.time)}")
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def chunks(request: Request) -> AsyncIterator[bytes]:
    """The pieces of a body as they come; what is not taken is not read from the socket either.

    Raises RequestTimeout if the peer goes away, or is sent away for stalling, before its end.
    """
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise RequestTimeout("the body ended before it was complete")
        more = message.get("more_body", False)
        if message["body"]:
            yield message["body"]


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes", limit=limit)


async def decode(request: Request, model: type[Model], bounds: Bounds, held: Held | None = None) -> Model:
    """The JSON body as a model. Raises InvalidRequest, or 415, or what ``read`` does."""
    if media_type(request) not in {"application/json", ""}:
        raise HTTPException(415, "the body must be JSON: send Content-Type: application/json")
    data = parse_json(await read(request, bounds, held))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise problem.invalid(error) from None


class _NotStrictError(ValueError):
    """Raised inside the parser for JSON that two parsers could read in two ways."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotStrictError(f"the key {twice[:80]!r} is there twice")
    return made


def _constant(name: str) -> Any:
    raise _NotStrictError(f"{name} is no JSON")


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def parse_json(body: bytes) -> Any:
    """The value of a JSON text. Raises InvalidRequest."""
    if not canonical.few(body, MAX_VALUES):
        raise InvalidRequest(f"the body holds more than {MAX_VALUES} values")
    try:
        value = _STRICT.decode(body.decode())
        if _SURROGATE.search(body) is not None:  # seldom, and half of a pair has no UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the body is not strict JSON: half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"the body is not JSON: {error.msg} ({where})") from None
    except _NotStrictError as error:
        raise InvalidRequest(f"the body is not strict JSON: {error}") from None
    except ValueError:  # an integer of more digits than Python converts
        raise InvalidRequest("the body is not strict JSON: a number has too many digits") from None
    return value


def query(request: Request, model: type[Model]) -> Model:
    """The query string as a model: no parameter that it does not have, none twice unless it is a list.

    Raises InvalidRequest.
    """
    raw: bytes = request.scope["query_string"]
    if not raw:
        pairs = []
    elif len(raw) > MAX_QUERY:
        raise InvalidRequest(f"the query string is longer than {MAX_QUERY} bytes")
    else:
        try:
            pairs = parse_qsl(
                raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS
            )
        except ValueError:  # UnicodeDecodeError included
            raise InvalidRequest("the query string is not valid") from None
    values: dict[str, Any] = {}
    for key, value in pairs:
        field = model.model_fields.get(key)
        if field is not None and field.json_schema_extra == {"repeated": True}:
            values.setdefault(key, []).append(value)
        elif key in values:
            raise InvalidRequest(f"the parameter {key[:80]!r} is there twice", field=key[:80])
        else:
            values[key] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise problem.invalid(error) from None
