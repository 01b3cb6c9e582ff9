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
from sandboxd.models.refusal import OVER, place_of, said_of

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["MEDIA_TYPE", "document", "internal", "invalid", "of", "of_fault", "respond"]

log = structlog.get_logger(__name__)
MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 20


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
    wrong = [{"field": place_of(each), "message": said_of(each)} for each in found[:MAX_ERRORS]]
    over = next((each for each in found if each["type"] in OVER), None)
    if over is not None:
        limit = over["ctx"]["max_length"]
        said = f"{place_of(over)}: {said_of(over)}"
        return TooLarge(said, field=place_of(over), limit=limit, errors=wrong)
    first = wrong[0]
    message = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
    return InvalidRequest(message, field=first["field"], errors=wrong)
