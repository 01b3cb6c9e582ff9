"""The calls of the API that are about invocations."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from sandboxd import errors, models
from sandboxd.client import wire
from sandboxd.client.calls.call import BYTES_OUT, Call, body_of, nothing, one
from sandboxd.client.calls.request import documents
from sandboxd.client.unanswered import Unanswered

if TYPE_CHECKING:
    import signal as signals
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, Unpack

    from sandboxd.client.calls.request import Argv

__all__ = [
    "Events",
    "PageFields",
    "artifact",
    "batch",
    "batch_result",
    "callback",
    "cancel",
    "connect",
    "connect_session",
    "ended",
    "event",
    "events",
    "get",
    "id_at",
    "last",
    "page",
    "ports",
    "raw",
    "run",
    "session_ports",
    "signal",
    "start",
    "stdin",
    "stream",
]

Stream = Literal["stdout", "stderr"]


class PageFields(TypedDict):
    """Which calls a page has: of a policy, with a cause or in a state, with a ``label`` (``KEY=VALUE``).

    With a ``key``, the caller's own call that this stands for.
    ``before`` is the ``next`` of the page before; ``limit`` is how many a page has.
    """

    policy: NotRequired[str | None]
    cause: NotRequired[str | None]
    state: NotRequired[str | None]
    key: NotRequired[str | None]
    label: NotRequired[str | None]
    before: NotRequired[str | None]
    limit: NotRequired[int | None]


event: Callable[[bytes], models.Event] = one(models.Event)
"""Decodes one line of an event stream."""


class Events:
    """Decodes the lines of an event stream and knows whether it is whole.

    ``complete``: the stream has to end with ``ended``, else it was cut, and ``details["after"]`` of the
    error is the number to resume from.
    """

    def __init__(self, *, complete: bool, after: int = 0) -> None:
        self._complete = complete
        self._ended = False
        self._begun = False
        self.after = after
        self.is_empty = False
        """Whether the answer came to its own end and had no event: a daemon that stops, or the last event
        has a number that is not above ``after``."""

    def accept(self, line: bytes) -> models.Event:
        """The event of one line."""
        found = event(line)
        self._begun = True
        self.after = found.seq
        self._ended = found.type == "ended"
        return found

    def finish(self) -> None:
        """The answer came to its own end. Raises Unavailable (reason ``lost``) if ``ended`` did not come."""
        self.is_empty = not self._begun
        if self._complete and not self._ended:
            raise self.cut()

    def cut(self) -> errors.Unavailable:
        """The error for a stream that ended too early."""
        return wire.lost("before the call did", after=self.after)

    def decode(self, lines: Iterable[bytes]) -> Iterator[models.Event]:
        """The events of lines."""
        try:
            for line in lines:
                yield self.accept(line)
        except errors.Unavailable as error:
            error.details.setdefault("after", self.after)
            raise
        self.finish()


def ended(event: models.Event, id: str) -> models.Invocation | None:  # noqa: A002 - the field's name
    """The invocation that an event ends a call with. Raises HostFailed where that is not told yet."""
    if event.type == "unrecorded":
        raise errors.HostFailed(event.error.message if event.error else "its outcome is not on disk", id=id)
    return event.invocation


def last(done: models.Invocation, after: int) -> models.Event:
    """The end of a call whose events after this number were pruned meanwhile."""
    return models.Event(seq=after + 1, at=done.times.ended or 0, type="ended", invocation=done)


def run(asked: models.Request) -> Call[models.Invocation]:
    """Run and wait for the outcome."""
    exchange = wire.Exchange("POST", wire.target("invocations"), body_of(asked), waits=True)
    return Call(exchange, one(models.Invocation))


def start(asked: models.Request) -> Call[models.Invocation]:
    """Accept durably and answer at once."""
    headers = {"Prefer": "respond-async"}
    return Call(
        wire.Exchange("POST", wire.target("invocations"), body_of(asked), headers), one(models.Invocation)
    )


def stream(asked: models.Request) -> wire.Exchange:
    """Run and answer with events."""
    headers = {"Accept": "application/x-ndjson"}
    return wire.Exchange("POST", wire.target("invocations"), body_of(asked), headers, waits=True)


def batch(requests: Iterable[Argv | Mapping[str, Any]], parallel: int | None) -> Unanswered:
    """Run many requests, so many at a time."""
    return Unanswered(documents(requests), parallel)


_result: Callable[[bytes], models.BatchResult] = one(models.BatchResult)


def batch_result(line: bytes, left: Unanswered) -> models.BatchResult | None:
    """One line of the answer to a batch, by the caller's number; None if it has to be asked again."""
    found = _result(line)
    index = left.told(found.index, None if found.problem is None else found.problem.code)
    return None if index is None else found.model_copy(update={"index": index})


def id_at(location: str) -> str | None:
    """The id of the invocation whose URL the daemon gave before its outcome."""
    return location.rpartition("/")[2] or None


def get(id: str) -> Call[models.Invocation]:  # noqa: A002 - the field's name, here and below
    """One invocation."""
    return Call(wire.Exchange("GET", wire.invocation_target(id)), one(models.Invocation))


def callback(id: str) -> Call[models.CallbackState]:  # noqa: A002
    """What became of a call's callback."""
    return Call(wire.Exchange("GET", wire.invocation_target(id, "callback")), one(models.CallbackState))


def page(**fields: Unpack[PageFields]) -> Call[models.InvocationList]:
    """A page of invocations, newest first."""
    return Call(wire.Exchange("GET", wire.target("invocations", **fields)), one(models.InvocationList))


def events(id: str, after: int, *, follow: bool) -> wire.Exchange:  # noqa: A002
    """The events with a number above ``after``."""
    target = wire.invocation_target(id, "events", after=after, follow=follow)
    return wire.Exchange("GET", target, headers={"Accept": "application/x-ndjson"}, waits=follow)


def raw(id: str, name: Stream, offset: int, *, follow: bool) -> wire.Exchange:  # noqa: A002
    """The bytes of a stream from an offset on."""
    target = wire.invocation_target(id, name, offset=offset, follow=follow)
    return wire.Exchange("GET", target, headers=BYTES_OUT, waits=follow)


def stdin(id: str, offset: int, *, eof: bool) -> Call[int]:  # noqa: A002
    """Bytes for standard input at an offset; decodes to the offset after them."""

    def decode(body: bytes) -> int:
        document = wire.parse_json(body)
        if not isinstance(document, dict) or not isinstance(document.get("offset"), int):
            raise wire.protocol_error("an answer to stdin that has no offset")
        return int(document["offset"])

    return Call(wire.Exchange("POST", wire.invocation_target(id, "stdin", offset=offset, eof=eof)), decode)


def signal(id: str, number: int | str | signals.Signals) -> Call[None]:  # noqa: A002
    """Send a signal to the tool."""
    value = number if isinstance(number, str) else int(number)
    body = json.dumps({"signal": value}).encode()
    return Call(wire.Exchange("POST", wire.invocation_target(id, "signal"), body), nothing)


def cancel(id: str) -> Call[models.Invocation]:  # noqa: A002
    """End the call, whatever its state."""
    return Call(wire.Exchange("POST", wire.invocation_target(id, "cancel"), b""), one(models.Invocation))


def ports(id: str) -> Call[list[int]]:  # noqa: A002
    """The ports inside that can be reached."""
    return _ports(wire.invocation_target(id, "ports"))


def session_ports(session: str) -> Call[list[int]]:
    """The same of what runs in a session."""
    return _ports(wire.target("sessions", session, "ports"))


def _ports(target: str) -> Call[list[int]]:
    def decode(body: bytes) -> list[int]:
        document = wire.parse_json(body)
        found = document.get("ports") if isinstance(document, dict) else None
        if not isinstance(found, list) or not all(isinstance(port, int) for port in found):
            raise wire.protocol_error("an answer that lists no ports")
        return found

    return Call(wire.Exchange("GET", target), decode)


def connect(id: str, port: int) -> wire.Exchange:  # noqa: A002
    """A connection to a port inside."""
    return _tunnel(wire.invocation_target(id, "ports", str(port)))


def connect_session(session: str, port: int) -> wire.Exchange:
    """The same of what runs in a session."""
    return _tunnel(wire.target("sessions", session, "ports", str(port)))


def _tunnel(target: str) -> wire.Exchange:
    return wire.Exchange("GET", target, headers={"Connection": "Upgrade", "Upgrade": "tcp"})


def artifact(id: str, path: str) -> wire.Exchange:  # noqa: A002
    """The bytes of an artifact."""
    return wire.Exchange("GET", wire.artifact_target(id, path), headers=BYTES_OUT)
