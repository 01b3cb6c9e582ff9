"""What a caller may say of a request in Python, and the request that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias, TypedDict

from sandboxd import errors, models
from sandboxd.client.calls.call import valid

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Argv", "RequestFields", "documents", "request"]

Argv: TypeAlias = models.Request | Sequence[str | bytes]
"""What to run: the arguments, or a request that is ready."""


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


def request(argv: Argv, fields: RequestFields) -> models.Request:
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
    return valid(models.Request, plain)


def documents(asked: Iterable[Argv | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each as JSON: a Request, an argv, or the JSON of a request, which the daemon judges."""
    return [
        dict(each)
        if isinstance(each, Mapping)
        else request(each, {}).model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        for each in asked
    ]


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
