"""The pure half of every client: targets, problem documents, event lines. Standard library only."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "MAX_DOCUMENT",
    "Exchange",
    "Lines",
    "artifact_target",
    "count",
    "document",
    "error_of",
    "invocation_target",
    "lost",
    "parse_json",
    "protocol_error",
    "target",
    "timed_out",
]

MAX_DOCUMENT = 64 * 2**20
"""Bytes of a JSON answer or of one event line: two heads of streams and a thousand artifacts fit."""
MAX_MESSAGE = 4096
_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_MEMBERS = {"type", "title", "status", "code", "detail", "details", "instance"}


class Exchange:
    """One HTTP request as data. ``waits``: the answer may take as long as a call does.

    No dataclass: that module costs 15 ms of the start of ``run-in-sandbox``.
    """

    __slots__ = ("body", "headers", "method", "target", "waits")

    def __init__(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        waits: bool = False,
    ) -> None:
        self.method = method
        self.target = target
        self.body = body
        self.headers = headers or {}
        self.waits = waits

    def all_headers(self) -> dict[str, str]:
        """The headers to send. One exchange per connection, hence ``close``."""
        known = {"Host": "sandboxd", "Accept": "application/json", "Connection": "close"}
        if self.body is not None:
            known |= {"Content-Type": "application/json", "Content-Length": str(len(self.body))}
        return known | dict(self.headers)


def target(*segments: str, **query: str | int | None) -> str:
    """``/v1/…`` with each segment and each query value quoted; None is left out, a bool is 1 or 0."""
    path = "/v1/" + "/".join(quote(segment, safe="", errors="surrogateescape") for segment in segments)
    pairs = {
        key: f"{value:d}" if isinstance(value, int) else value
        for key, value in query.items()
        if value is not None
    }
    return f"{path}?{urlencode(pairs)}" if pairs else path


def invocation_target(id: str, *segments: str, **query: str | int | None) -> str:  # noqa: A002 - the field's name
    """The target of an invocation. Raises InvalidRequest for what cannot be an id."""
    if not _ID.fullmatch(id):
        raise errors.InvalidRequest(f"{id[:80]!r} is not the id of an invocation", field="id")
    return target("invocations", id, *segments, **query)


def artifact_target(id: str, path: str) -> str:  # noqa: A002 - the field's name
    """The target of an artifact by the path that the invocation gives it."""
    return invocation_target(id, "artifacts", *path.split("/"))


def error_of(status: int, content_type: str, body: bytes) -> errors.SandboxdError:
    """The exception that a problem document (RFC 9457) stands for: its class by ``code``.

    A code of a newer daemon becomes ``Refused`` (4xx) or ``SandboxdError`` (5xx); ``details["code"]``
    and ``details["status"]`` then keep what it was. An answer that is no problem document at all is
    ``Unavailable`` with reason ``protocol``.
    """
    if content_type.split(";", maxsplit=1)[0].strip().lower() != "application/problem+json":
        return protocol_error(f"status {status} without a problem document")
    try:
        document = parse_json(body)
    except errors.Unavailable as error:
        return error
    if not isinstance(document, dict):
        return protocol_error("a problem document that is no object")
    code = str(document.get("code", ""))
    message = str(document.get("detail") or document.get("title") or f"status {status}")[:MAX_MESSAGE]
    # by name: whoever builds on the tree has classes of the same codes
    known = {one.code: one for one in (getattr(errors, name) for name in errors.__all__)}
    kind = known.get(code)
    found = (kind or (errors.Refused if 400 <= status < 500 else errors.SandboxdError))(message)
    # Extension members stand beside `detail` or below `details`; both are kept.
    nested = document.get("details")
    found.details.update(nested if isinstance(nested, dict) else {})
    found.details.update({key: value for key, value in document.items() if key not in _MEMBERS})
    if kind is None:
        found.details.update(code=code, status=status)
    return found


def count(text: str) -> int:
    """The number that a header has; 0 for one that is not there."""
    return int(text) if text.isdecimal() and len(text) < 20 else 0


def parse_json(body: bytes) -> Any:
    """A JSON document of the daemon. Raises Unavailable (reason ``protocol``) if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise protocol_error("an answer that is not JSON") from None


def document(body: bytes, what: str) -> dict[str, Any]:
    """A JSON object of the daemon. Raises Unavailable (reason ``protocol``) for what is none."""
    found = parse_json(body)
    if not isinstance(found, dict):
        raise protocol_error(f"{what} that is no object")
    return found


def protocol_error(what: str) -> errors.Unavailable:
    """The error for a peer that does not speak this API."""
    return errors.Unavailable(
        f"what listens on the socket does not speak the sandboxd API: {what}", reason="protocol"
    )


def lost(what: str, **details: Any) -> errors.Unavailable:
    """The error for a connection that ended in the middle; ``details["reason"]`` is ``lost``."""
    return errors.Unavailable(
        f"the connection to the daemon ended {what}; see its log, then ask again", reason="lost", **details
    )


def timed_out(seconds: float | None) -> errors.Unavailable:
    """The error for an answer that did not come in time; ``details["reason"]`` is ``timeout``."""
    return errors.Unavailable(f"the daemon did not answer within {seconds:g} s", reason="timeout")


class Lines:
    """Cuts a stream of bytes into lines, holding at most ``MAX_DOCUMENT`` bytes of an unfinished one."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that ``data`` completes, without their newline; empty ones are left out."""
        *complete, rest = data.split(b"\n")
        for line in complete:
            whole = b"".join([*self._parts, line])
            self._parts, self._size = [], 0
            if whole.strip():
                yield whole
        self._size += len(rest)
        if self._size > MAX_DOCUMENT:
            raise protocol_error(f"a line of more than {MAX_DOCUMENT} bytes")
        if rest:
            self._parts.append(rest)

    def finish(self) -> None:
        """Raises Unavailable (reason ``lost``) if a line was left unfinished."""
        if self._size:
            raise lost("in the middle of an event")
