"""Every call of the API as typed data: what to send, and how to decode what comes back.

Both clients perform these values, so a route, a body or a decoding is written once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NotRequired, TypedDict, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from sandboxd import errors, models
from sandboxd.client import wire

if TYPE_CHECKING:
    import signal as signals
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Call", "RequestFields"]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Stream = Literal["stdout", "stderr"]
_OCTETS = {"Content-Type": "application/octet-stream"}


class RequestFields(TypedDict):
    """The fields of ``models.Request`` beside ``argv``, in the forms that are convenient in Python.

    Durations are microseconds or a text with a unit (``"1.5s"``), sizes bytes or ``"64MiB"``.
    """

    policy: NotRequired[str]
    env: NotRequired[Mapping[str, str]]
    cwd: NotRequired[str]
    stdin: NotRequired[bytes | Literal["none", "stream"]]
    inputs: NotRequired[Mapping[str, bytes | str] | Sequence[models.Input]]
    tar: NotRequired[bytes]
    artifacts: NotRequired[Sequence[str]]
    limits: NotRequired[models.Narrowing | Mapping[str, Any]]
    deadline: NotRequired[int | str]
    labels: NotRequired[Mapping[str, str]]
    key: NotRequired[str]
    session: NotRequired[str]
    priority: NotRequired[int]
    callback: NotRequired[models.Callback | Mapping[str, str]]


@dataclass(frozen=True)
class Call(Generic[T]):
    """An exchange and the decoder of its body. ``decode`` raises Unavailable for a foreign answer."""

    exchange: wire.Exchange
    decode: Callable[[bytes], T]


def request(argv: models.Request | Sequence[str | bytes], fields: RequestFields) -> models.Request:
    """The request of an argv and fields, or the request itself. Raises InvalidRequest."""
    if isinstance(argv, models.Request):
        if fields:
            raise errors.InvalidRequest("give a Request or fields, not both", field=next(iter(fields)))
        return argv
    if isinstance(argv, str | bytes):
        raise errors.InvalidRequest("argv is a list of arguments, not one string", field="argv")
    plain: dict[str, Any] = {name: _plain(value) for name, value in fields.items()}
    plain["argv"] = [_bytes(item) for item in argv]
    inputs = plain.get("inputs")
    if isinstance(inputs, dict):
        plain["inputs"] = [{"path": path, "content": _content(content)} for path, content in inputs.items()]
    try:
        return models.Request.model_validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise errors.InvalidRequest(f"{where}: {first['msg']}", field=where) from None


def _plain(value: object) -> object:
    """A field in the form that validation takes."""
    if isinstance(value, bytes):
        return models.Bytes.of(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    return list(value)


def _bytes(value: str | bytes) -> str | models.Bytes:
    """An argument as the wire has it; surrogates of ``os.fsdecode`` become the bytes they stand for."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return models.Bytes.of(value.encode("utf-8", "surrogateescape"))
        return value
    return models.Bytes.of(value)


def _content(value: bytes | str) -> models.Bytes:
    return models.Bytes(text=value) if isinstance(value, str) else models.Bytes.of(value)


def _one(model: type[M]) -> Callable[[bytes], M]:
    def decode(body: bytes) -> M:
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            raise _foreign(model.__name__, error) from None

    return decode


def _many(model: type[M], name: str) -> Callable[[bytes], list[M]]:
    adapter = TypeAdapter(dict[str, list[model]])  # type: ignore[valid-type]

    def decode(body: bytes) -> list[M]:
        try:
            return list(adapter.validate_json(body).get(name, []))
        except ValidationError as error:
            raise _foreign(name, error) from None

    return decode


def _foreign(what: str, error: ValidationError) -> errors.Unavailable:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return wire.protocol_error(f"an answer that is no {what} ({where}: {first['msg']})")


event: Callable[[bytes], models.Event] = _one(models.Event)
"""Decodes one line of an event stream."""


class Events:
    """Decodes the lines of an event stream and knows whether it is whole.

    ``complete``: the stream has to end with ``ended``, else it was cut, and ``details["after"]`` of the
    error is the number to resume from.
    """

    def __init__(self, *, complete: bool) -> None:
        self._complete = complete
        self._ended = False
        self.after = 0

    def accept(self, line: bytes) -> models.Event:
        """The event of one line."""
        found = event(line)
        self.after = found.seq
        self._ended = found.type == "ended"
        return found

    def finish(self) -> None:
        """Raises Unavailable (reason ``lost``) if the stream was cut."""
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


def _none(_: bytes) -> None:
    return None


def _body(model: BaseModel) -> bytes:
    return model.model_dump_json(exclude_none=True, exclude_defaults=True).encode()


def run(asked: models.Request) -> Call[models.Invocation]:
    """Run and wait for the outcome."""
    exchange = wire.Exchange("POST", wire.target("invocations"), _body(asked), waits=True)
    return Call(exchange, _one(models.Invocation))


def start(asked: models.Request) -> Call[models.Invocation]:
    """Accept durably and answer at once."""
    headers = {"Prefer": "respond-async"}
    return Call(
        wire.Exchange("POST", wire.target("invocations"), _body(asked), headers), _one(models.Invocation)
    )


def stream(asked: models.Request) -> wire.Exchange:
    """Run and answer with events."""
    headers = {"Accept": "application/x-ndjson"}
    return wire.Exchange("POST", wire.target("invocations"), _body(asked), headers, waits=True)


def batch(
    requests: Iterable[models.Request | Sequence[str | bytes] | Mapping[str, Any]], parallel: int | None
) -> wire.Exchange:
    """Run many requests; each is a Request, an argv, or the JSON of a request, which the daemon judges."""
    documents: list[Any] = []
    for each in requests:
        if isinstance(each, Mapping):
            documents.append(dict(each))
        else:
            asked = request(each, {})
            documents.append(asked.model_dump(mode="json", exclude_none=True, exclude_defaults=True))
    body = {"requests": documents} | ({} if parallel is None else {"parallel": parallel})
    return wire.Exchange("POST", wire.target("batches"), json.dumps(body).encode(), waits=True)


batch_result: Callable[[bytes], models.BatchResult] = _one(models.BatchResult)
"""Decodes one line of the answer to a batch."""


def id_at(location: str) -> str | None:
    """The id of the invocation whose URL the daemon gave before its outcome."""
    return location.rpartition("/")[2] or None


def get(id: str) -> Call[models.Invocation]:  # noqa: A002 - the field's name, here and below
    """One invocation."""
    return Call(wire.Exchange("GET", wire.invocation_target(id)), _one(models.Invocation))


def callback(id: str) -> Call[models.CallbackState]:  # noqa: A002
    """What became of a call's callback."""
    return Call(wire.Exchange("GET", wire.invocation_target(id, "callback")), _one(models.CallbackState))


def page(
    *,
    policy: str | None,
    cause: str | None,
    state: str | None,
    label: str | None,
    before: str | None,
    limit: int | None,
) -> Call[models.InvocationList]:
    """A page of invocations, newest first."""
    target = wire.target(
        "invocations", policy=policy, cause=cause, state=state, label=label, before=before, limit=limit
    )
    return Call(wire.Exchange("GET", target), _one(models.InvocationList))


def events(id: str, after: int, *, follow: bool) -> wire.Exchange:  # noqa: A002
    """The events with a number above ``after``."""
    target = wire.invocation_target(id, "events", after=after, follow=int(follow))
    return wire.Exchange("GET", target, headers={"Accept": "application/x-ndjson"}, waits=follow)


def raw(id: str, name: Stream, offset: int, *, follow: bool) -> wire.Exchange:  # noqa: A002
    """The bytes of a stream from an offset on."""
    target = wire.invocation_target(id, name, offset=offset, follow=int(follow))
    return wire.Exchange("GET", target, headers={"Accept": "application/octet-stream"}, waits=follow)


def stdin(id: str, offset: int, *, eof: bool) -> Call[int]:  # noqa: A002
    """Bytes for standard input at an offset; decodes to the offset after them."""

    def decode(body: bytes) -> int:
        document = wire.parse_json(body)
        if not isinstance(document, dict) or not isinstance(document.get("offset"), int):
            raise wire.protocol_error("an answer to stdin that has no offset")
        return int(document["offset"])

    return Call(
        wire.Exchange("POST", wire.invocation_target(id, "stdin", offset=offset, eof=int(eof))), decode
    )


def signal(id: str, number: int | str | signals.Signals) -> Call[None]:  # noqa: A002
    """Send a signal to the tool."""
    value = number if isinstance(number, str) else int(number)
    body = json.dumps({"signal": value}).encode()
    return Call(wire.Exchange("POST", wire.invocation_target(id, "signal"), body), _none)


def cancel(id: str) -> Call[models.Invocation]:  # noqa: A002
    """End the call, whatever its state."""
    return Call(wire.Exchange("POST", wire.invocation_target(id, "cancel"), b""), _one(models.Invocation))


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
    return wire.Exchange(
        "GET", wire.artifact_target(id, path), headers={"Accept": "application/octet-stream"}
    )


def policies() -> Call[list[models.PolicyInfo]]:
    """The policies that this caller may use."""
    return Call(wire.Exchange("GET", wire.target("policies")), _many(models.PolicyInfo, "policies"))


def policy(name: str) -> Call[models.PolicyInfo]:
    """One policy with its resolved form."""
    return Call(wire.Exchange("GET", wire.target("policies", name)), _one(models.PolicyInfo))


def check_policy(text: str, name: str | None) -> Call[list[models.PolicyProblem]]:
    """The problems of the text of a policy file."""
    body = json.dumps({"text": text} if name is None else {"text": text, "name": name}).encode()
    exchange = wire.Exchange("POST", wire.target("policies", "check"), body)
    return Call(exchange, _many(models.PolicyProblem, "problems"))


def plan(asked: models.Request) -> Call[models.PlanDocument]:
    """What would run, and where each value came from; nothing runs."""
    return Call(wire.Exchange("POST", wire.target("plans"), _body(asked)), _one(models.PlanDocument))


def images() -> Call[list[models.ImageInfo]]:
    """The images of the daemon's store."""
    return Call(wire.Exchange("GET", wire.target("images")), _many(models.ImageInfo, "images"))


def slots() -> Call[list[models.SlotInfo]]:
    """The containers that the daemon holds."""
    return Call(wire.Exchange("GET", wire.target("slots")), _many(models.SlotInfo, "slots"))


def secrets() -> Call[list[models.SecretInfo]]:
    """The stored secrets."""
    return Call(wire.Exchange("GET", wire.target("secrets")), _many(models.SecretInfo, "secrets"))


def secret(name: str) -> Call[models.SecretInfo]:
    """One of them."""
    return Call(wire.Exchange("GET", wire.target("secrets", name)), _one(models.SecretInfo))


def set_secret(name: str, value: bytes) -> Call[models.SecretInfo]:
    """Store one."""
    exchange = wire.Exchange("PUT", wire.target("secrets", name), value, _OCTETS)
    return Call(exchange, _one(models.SecretInfo))


def rotate_secret(name: str, value: bytes) -> Call[models.SecretInfo]:
    """Give one a new value."""
    exchange = wire.Exchange("POST", wire.target("secrets", name, "rotate"), value, _OCTETS)
    return Call(exchange, _one(models.SecretInfo))


def remove_secret(name: str) -> Call[None]:
    """Forget one."""
    return Call(wire.Exchange("DELETE", wire.target("secrets", name)), _none)


def _session_fields(
    name: str | None,
    *,
    policy: str | None,
    labels: Mapping[str, str] | None,
    ttl: int | str | None,
    idle: int | str | None,
    size: int | str | None,
    inodes: int | str | None,
    checkout: str | None = None,
) -> dict[str, Any]:
    given = {"name": name, "policy": policy, "labels": labels and dict(labels), "ttl": ttl, "idle": idle}
    given["checkout"] = checkout
    quota = {key: value for key, value in (("size", size), ("inodes", inodes)) if value is not None}
    return {key: value for key, value in {**given, "quota": quota}.items() if value}


def _valid(model: type[M], fields: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise errors.InvalidRequest(f"{where}: {first['msg']}", field=where) from None


def create_session(name: str | None, **fields: Any) -> Call[models.SessionInfo]:
    """A new session."""
    asked = _valid(models.SessionRequest, _session_fields(name, **fields))
    return Call(wire.Exchange("POST", wire.target("sessions"), _body(asked)), _one(models.SessionInfo))


def fork_session(
    session: str, name: str | None, checkpoint: str | None, **fields: Any
) -> Call[models.SessionInfo]:
    """A new session that begins with a checkpoint of another."""
    given = _session_fields(name, **fields) | ({} if checkpoint is None else {"checkpoint": checkpoint})
    body = _body(_valid(models.SessionFork, given))
    return Call(
        wire.Exchange("POST", wire.target("sessions", session, "fork"), body), _one(models.SessionInfo)
    )


def sessions(before: str | None, limit: int | None) -> Call[models.SessionList]:
    """A page of sessions."""
    return Call(
        wire.Exchange("GET", wire.target("sessions", before=before, limit=limit)), _one(models.SessionList)
    )


def session(named: str) -> Call[models.SessionInfo]:
    """One of them."""
    return Call(wire.Exchange("GET", wire.target("sessions", named)), _one(models.SessionInfo))


def delete_session(named: str) -> Call[None]:
    """Remove one."""
    return Call(wire.Exchange("DELETE", wire.target("sessions", named)), _none)


def checkpoints(named: str, before: str | None, limit: int | None) -> Call[models.CheckpointList]:
    """A page of the checkpoints of one."""
    target = wire.target("sessions", named, "checkpoints", before=before, limit=limit)
    return Call(wire.Exchange("GET", target), _one(models.CheckpointList))


def rollback_session(named: str, checkpoint: str) -> Call[models.SessionInfo]:
    """Move one to a checkpoint."""
    body = _body(_valid(models.SessionRollback, {"checkpoint": checkpoint}))
    return Call(
        wire.Exchange("POST", wire.target("sessions", named, "rollback"), body), _one(models.SessionInfo)
    )


def checkpoint_session(named: str) -> Call[models.CheckpointInfo]:
    """Make a checkpoint of one's container."""
    return Call(
        wire.Exchange("POST", wire.target("sessions", named, "checkpoint"), b""), _one(models.CheckpointInfo)
    )


def end_session(named: str, *, discard: bool) -> Call[models.SessionInfo]:
    """End one's container."""
    body = _body(_valid(models.SessionEnd, {"discard": discard}))
    return Call(wire.Exchange("POST", wire.target("sessions", named, "end"), body), _one(models.SessionInfo))


def discard_session(named: str) -> Call[models.SessionInfo]:
    """Forget what one does not stand on."""
    return Call(
        wire.Exchange("POST", wire.target("sessions", named, "discard"), b""), _one(models.SessionInfo)
    )


def search(
    q: str,
    *,
    policy: str | None,
    uid: int | None,
    cause: str | None,
    image: str | None,
    since: int | None,
    until: int | None,
    before: int | None,
    limit: int | None,
) -> Call[models.SearchResults]:
    """A page of calls that fit."""
    target = wire.target(
        "search", q=q or None, policy=policy, uid=uid, cause=cause, image=image, since=since, until=until,
        before=before, limit=limit,
    )  # fmt: skip
    return Call(wire.Exchange("GET", target), _one(models.SearchResults))


def lineage(digest: str) -> Call[models.Lineage]:
    """Where a content comes from."""
    return Call(wire.Exchange("GET", wire.target("artifacts", digest, "lineage")), _one(models.Lineage))


def replay(id: str, policy: str | None) -> Call[models.Replay]:  # noqa: A002
    """Run a recorded call again."""
    body = json.dumps({} if policy is None else {"policy": policy}).encode()
    return Call(
        wire.Exchange("POST", wire.invocation_target(id, "replay"), body, waits=True), _one(models.Replay)
    )


def replay_session(session: str, policy: str | None, *, keep: bool) -> wire.Exchange:
    """Run the calls of a session again."""
    body = json.dumps(
        ({} if policy is None else {"policy": policy}) | ({"keep": True} if keep else {})
    ).encode()
    return wire.Exchange("POST", wire.target("sessions", session, "replay"), body, waits=True)


replay_event: Callable[[bytes], models.ReplayEvent] = _one(models.ReplayEvent)
"""Decodes one line of the answer to that."""


def prune(age: int | None, size: int | None) -> Call[models.Pruning]:
    """Remove the oldest bodies and files now."""
    body = json.dumps({k: v for k, v in (("age", age), ("size", size)) if v is not None}).encode()
    return Call(wire.Exchange("POST", wire.target("prune"), body, waits=True), _one(models.Pruning))


def health() -> Call[models.Health]:
    """Whether the daemon takes calls."""
    return Call(wire.Exchange("GET", wire.target("health")), _one(models.Health))
