"""Problem documents (RFC 9457): the one form in which the API says that something was refused.

``code`` is stable and meant for programs; ``details`` holds what the error knows, as data. Values
that a peer sent are never repeated at length, and a fault of ours says nothing about our insides.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pydantic_core
import structlog
from starlette.responses import Response

from sandboxd.errors import InvalidRequest, RangeNotSatisfiable, Refused, SandboxdError, TooLarge
from sandboxd.models import Problem

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["MEDIA_TYPE", "document", "internal", "invalid", "of", "of_fault", "respond"]

log = structlog.get_logger(__name__)
MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 20
MAX_TEXT = 300  # characters of one message
OVER = {"too_long", "string_too_long", "bytes_too_long"}
"""What pydantic calls a value that is over its bound."""
COUNTED: dict[type, str] = {str: "characters", bytes: "bytes", dict: "members"}
"""What the bound of a value counts, by its type; of a list it is items."""


def document(status: int, code: str, detail: str, details: dict[str, Any] | None = None) -> bytes:
    """The JSON of a problem."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
    }
    if details:
        body["details"] = details
    return pydantic_core.to_json(body, fallback=str)


def respond(error: SandboxdError, *, status: int | None = None) -> Response:
    """The response for an error of ours; ``status`` overrides the one of its class."""
    if status is None:
        status = error.status if isinstance(error, Refused) else 500
    headers = {}
    retry_after = error.details.get("retry_after")
    if isinstance(retry_after, int | float):
        headers["retry-after"] = str(max(1, round(retry_after)))
    if isinstance(error, RangeNotSatisfiable):
        headers["content-range"] = f"bytes */{error.details['size']}"
    return Response(
        document(status, error.code, str(error), error.details), status, headers, media_type=MEDIA_TYPE
    )


def of(error: SandboxdError) -> Problem:
    """The same as part of another answer."""
    status = error.status if isinstance(error, Refused) else 500
    return Problem.model_validate_json(document(status, error.code, str(error), error.details))


def of_fault(error: Exception) -> Problem:
    """The problem of a fault of ours, which the log has."""
    log.error("request failed", exc_info=error)
    return Problem.model_validate_json(bytes(internal().body))


def internal() -> Response:
    """The response for a fault of ours that nothing expected; the log has the rest."""
    text = "the daemon made a mistake; its log says which"
    return Response(document(500, SandboxdError.code, text), 500, media_type=MEDIA_TYPE)


def invalid(error: ValidationError) -> InvalidRequest | TooLarge:
    """The error for input that is not what its model says, with the path of each wrong field.

    TooLarge, which names the field and its limit, if one of them is over its bound.
    """
    count = error.error_count()
    if count > 1000:  # listing them would cost more than the request did
        return InvalidRequest(f"{count} fields are wrong")
    found = error.errors(include_url=False)
    wrong = [{"field": _field(each), "message": _said(each)} for each in found[:MAX_ERRORS]]
    over = next((each for each in found if each["type"] in OVER), None)
    if over is not None:
        limit = over["ctx"]["max_length"]
        said = f"{_field(over)}: {_said(over)}"
        return TooLarge(said, field=_field(over), limit=limit, errors=wrong)
    first = wrong[0]
    message = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
    return InvalidRequest(message, field=first["field"], errors=wrong)


def _field(error: ErrorDetails) -> str:
    # one of several types that a value may have is a step of pydantic's, not of the request's
    steps = [str(step)[:128] for step in error["loc"]]
    return ".".join(step for step in steps if not step.startswith("function-"))


def _said(error: ErrorDetails) -> str:
    """One message without the words that only somebody who knows our models understands."""
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    if error["type"] in OVER:
        return f"has more than {error['ctx']['max_length']} {COUNTED.get(type(error['input']), 'items')}"
    return error["msg"].removeprefix("Value error, ")[:MAX_TEXT]
