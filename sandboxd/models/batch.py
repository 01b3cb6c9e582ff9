"""Many requests in one, and what came of each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from sandboxd.models.invocation import Invocation
from sandboxd.models.operating import Problem
from sandboxd.models.wire import Wire

__all__ = ["Batch", "BatchResult"]

MAX_REQUESTS = 10_000
MAX_PARALLEL = 1000


class Batch(Wire):
    """What is asked at once. A request that is no request is refused alone."""

    requests: Annotated[list[Any], Field(min_length=1, max_length=MAX_REQUESTS)]
    parallel: Annotated[int, Field(ge=1, le=MAX_PARALLEL)] = 8
    """How many of them wait or run at the same time."""
    tied: Annotated[list[Annotated[int, Field(ge=0, lt=MAX_REQUESTS)]], Field(max_length=MAX_REQUESTS)] = (
        Field(default_factory=list)
    )
    """Numbers of requests that end when the caller goes away, though they have a key.

    So a client may give keys of its own, by which it asks for the same calls again of the next daemon.
    """

    @field_validator("tied")
    @classmethod
    def _of_requests(cls, tied: list[int], info: ValidationInfo) -> list[int]:
        last = len(info.data.get("requests", ())) - 1
        beyond = next((one for one in tied if one > last), None)
        if beyond is not None and last >= 0:
            raise ValueError(f"no request has the number {beyond}; they are numbered from 0 to {last}")
        return tied


class BatchResult(Wire):
    """One line of the answer: what came of the request with this number, from 0. They come as they end."""

    index: int
    invocation: Invocation | None = None
    problem: Problem | None = None
