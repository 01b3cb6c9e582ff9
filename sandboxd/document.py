"""Strict YAML documents whose every value knows its line and column.

Theory of operation. ``load`` walks the events of ruamel's YAML 1.2 parser, never its composer or its
constructor, and builds plain data (dict, list, str, int, float, bool, None) beside two maps from the
path of a value to where it stands. The walk is a loop with an explicit stack, so depth, size and the
number of values are bounded before anything is built: the parser is quadratic in nesting (100,000
open brackets cost it minutes). What YAML allows and a configuration must not contain is a problem
with its position: duplicate keys, keys that are no text, anchors and aliases (a "billion laughs"),
merge keys, tags other than the caller's own, a second document. All problems of a document are
collected. ``validate`` lays a pydantic model over the data and words its errors the same way, with
the nearest valid word.

Scalars follow the YAML 1.2 core schema, so ``yes``, ``on`` and ``12:30`` are text. One departure: a
number with a leading zero, such as ``0660``, stays text, because half of its readers mean octal.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from sandboxd.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path as FilePath

__all__ = ["Document", "Path", "Position", "Problem", "Tagged", "load", "nearest", "read_text", "validate"]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_PROBLEMS = 100
MAX_SHOWN = 80  # characters of a value that a message repeats

Path = tuple[str | int, ...]
"""Keys and indices from the root of a document; the root is ``()``."""

Model = TypeVar("Model", bound=BaseModel)

_STR_TAG = "tag:yaml.org,2002:str"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{0,17})?|\.[0-9]{1,17})(?:[eE][-+]?[0-9]{1,2})?"
)
_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None,
              "true": True, "True": True, "TRUE": True,
              "false": False, "False": False, "FALSE": False}  # fmt: skip


class Position(NamedTuple):
    """Where something stands; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """One error of a document; the fields are those of ``models.PolicyProblem``, its form on the wire."""

    file: str
    line: int
    column: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


@dataclass(frozen=True)
class Tagged:
    """A value under one of the local tags that the caller of ``load`` allowed, such as ``!remove X``."""

    tag: str
    value: Any


@dataclass
class Document:
    """Plain data, where each part of it stands, and the problems found so far."""

    file: str
    data: Any = None
    values: dict[Path, Position] = field(default_factory=dict)
    keys: dict[Path, Position] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def at(self, path: Path, *, key: bool = False) -> Position:
        """Where the value (or its key) at a path stands; of a path that is not there, its nearest parent."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, Position(1, 1))

    def problem(self, path: Path, code: str, message: str, *, key: bool = False) -> Problem:
        """A problem at a path, to be put into ``problems`` or not by whoever found it."""
        where = self.at(path, key=key)
        return Problem(self.file, where.line, where.column, code, message)

    def add(self, where: Position, code: str, message: str) -> None:
        """Record a problem at a position; after ``MAX_PROBLEMS`` of them no more are kept."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(self.file, where.line, where.column, code, message))


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word of ``words`` that ``word`` was most likely meant to be, or None."""
    found = difflib.get_close_matches(word[:MAX_SHOWN], list(words), n=1, cutoff=0.6)
    return found[0] if found else None


def read_text(path: FilePath, *, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text of a file of at most ``limit`` bytes.

    Raises OSError, and InvalidRequest (with a sentence to show) when it is too large or not UTF-8.
    """
    with path.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise InvalidRequest(f"the file is larger than {limit} bytes", limit=limit)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the file is not UTF-8 (byte {error.start})") from None


class _Stop(Exception):  # control flow, not an error: the document is past its bounds
    pass


@dataclass
class _Open:
    """A collection whose end has not been seen yet."""

    path: Path
    data: dict[str, Any] | list[Any]
    tag: str | None = None
    key: str | None = None
    waiting: bool = False
    """Whether a mapping has its next key and waits for the value."""
    skip: bool = False
    """Whether the value that comes is dropped, because its key is wrong."""


class _Builder:
    def __init__(self, document: Document, tags: Collection[str]) -> None:
        self.document = document
        self.tags = tags
        self.stack: list[_Open] = []
        self.count = 0
        self.documents = 0

    def feed(self, event: Any) -> None:
        match event:
            case events.ScalarEvent():
                self._node(event)
                self._scalar(event)
            case events.MappingStartEvent() | events.SequenceStartEvent():
                self._node(event)
                self._start(event)
            case events.MappingEndEvent() | events.SequenceEndEvent():
                ended = self.stack.pop()
                self._place(Tagged(ended.tag, ended.data) if ended.tag else ended.data)
            case events.AliasEvent():
                self._node(event)
                self.document.add(_where(event), "alias", "aliases (*name) are not allowed; write the value")
                self._wrong_or_value(None)
            case events.DocumentStartEvent():
                self.documents += 1
                if self.documents > 1:
                    self.document.add(_where(event), "documents", "only one YAML document is allowed")
                    raise _Stop

    def _node(self, event: Any) -> None:
        self.count += 1
        if self.count > MAX_VALUES:
            self.document.add(_where(event), "too_large", f"more than {MAX_VALUES} values")
            raise _Stop
        if not isinstance(event, events.AliasEvent) and event.anchor is not None:
            self.document.add(_where(event), "anchor", "anchors (&name) are not allowed")

    def _expects_key(self) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1].data, dict) and not self.stack[-1].waiting

    def _scalar(self, event: Any) -> None:
        if self._expects_key():
            self._key(event)
            return
        self._here(event)
        tag = event.tag
        plain = tag is None and event.implicit[0]
        value = _resolve(event.value) if plain else event.value
        if tag in {None, _STR_TAG, "!"}:
            self._place(value)
        elif tag in self.tags:
            self._place(Tagged(tag, _resolve(event.value) if event.style is None else event.value))
        else:
            self._unknown_tag(event, tag)
            self._place(value)

    def _key(self, event: Any) -> None:
        top, where, name = self.stack[-1], _where(event), event.value
        top.key, top.waiting, top.skip = name, True, False
        if event.tag not in {None, _STR_TAG, "!"}:
            self._unknown_tag(event, event.tag)
        if name == "<<" and event.implicit[0]:
            self.document.add(where, "merge_key", "merge keys (<<) are not allowed")
            top.skip = True
        elif name in top.data:
            first = self.document.keys[*top.path, name]
            self.document.add(where, "duplicate_key",
                              f"duplicate key {_show(name)}, first on line {first.line}")  # fmt: skip
            top.skip = True
        else:
            self.document.keys[*top.path, name] = where

    def _start(self, event: Any) -> None:
        if len(self.stack) >= MAX_DEPTH:
            self.document.add(_where(event), "too_deep", f"nested deeper than {MAX_DEPTH} levels")
            raise _Stop
        mapping = isinstance(event, events.MappingStartEvent)
        if self._expects_key():
            self.document.add(_where(event), "key", "a key must be a text")
            path: Path = (*self.stack[-1].path, "?")
        else:
            path = self._here(event)
        allowed = {None, "!", f"tag:yaml.org,2002:{'map' if mapping else 'seq'}"}
        tag = None if event.tag in allowed else event.tag
        if tag is not None and tag not in self.tags:
            self._unknown_tag(event, tag)
            tag = None
        self.stack.append(_Open(path, {} if mapping else [], tag))

    def _unknown_tag(self, event: Any, tag: str) -> None:
        message = f"the tag {_show(tag)} is not allowed here"
        if self.tags:
            message += f"; the allowed one is {', '.join(sorted(self.tags))}"
        self.document.add(_where(event), "tag", message)

    def _here(self, event: Any) -> Path:
        """The path of the value that starts; its position is recorded."""
        path: Path = ()
        if self.stack:
            top = self.stack[-1]
            path = (*top.path, len(top.data) if isinstance(top.data, list) else top.key or "")
            if top.skip:
                return path
        self.document.values[path] = _where(event)
        return path

    def _wrong_or_value(self, value: Any) -> None:
        if self._expects_key():
            self.stack[-1].waiting = self.stack[-1].skip = True
        else:
            self._place(value)

    def _place(self, value: Any) -> None:
        if not self.stack:
            self.document.data = value
            return
        top = self.stack[-1]
        if isinstance(top.data, list):
            top.data.append(value)
        elif not top.waiting:  # a collection that stood where a key should
            top.waiting = top.skip = True
        else:
            if not top.skip:
                top.data[top.key or ""] = value
            top.waiting = top.skip = False


def load(text: str, file: str, *, tags: Collection[str] = ()) -> Document:
    """Plain data of a YAML text with positions; ``tags`` are the local tags that become ``Tagged``.

    Never raises for bad input: look at ``problems``. The data of a document with problems is what
    could be understood, for finding the rest of the problems, and not for use.
    """
    document = Document(file)
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        document.add(Position(1, 1), "too_large", f"larger than {MAX_BYTES} bytes")
        return document
    builder = _Builder(document, tags)
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.feed(event)
    except _Stop:
        pass
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Position(mark.line + 1, mark.column + 1) if mark is not None else Position(1, 1)
        words = [part for part in (error.context, error.problem) if part]
        document.add(where, "yaml", "not valid YAML: " + ", ".join(words))
    except ReaderError as error:
        before = text[: error.position]
        where = Position(before.count("\n") + 1, error.position - before.rfind("\n"))
        document.add(
            where, "yaml", f"a character that YAML does not allow (U+{ord(text[error.position]):04X})"
        )
    except (YAMLError, ValueError, OverflowError) as error:
        # The scanner turns escapes such as "\UFFFFFFFF" into characters without a check of its own.
        document.add(Position(1, 1), "yaml", f"not valid YAML: {str(error)[:200]}")
    return document


def _where(event: Any) -> Position:
    return Position(event.start_mark.line + 1, event.start_mark.column + 1)


def _resolve(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def validate(document: Document, model: type[Model]) -> Model | None:
    """The document's data as ``model``, or None with every error added to ``document.problems``.

    An empty document is an empty mapping. Unknown keys and wrong words name the nearest valid one.
    """
    data = {} if document.data is None else document.data
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            path = _present(found["loc"], data)
            code, message = _word(found, model)
            document.add(document.at(path, key=code == "unknown_key"), code, message)
    return None


def _present(loc: tuple[str | int, ...], data: Any) -> Path:
    """The path of the part of ``loc`` that is in the data: pydantic adds names of union members."""
    path: Path = ()
    for step in loc:
        known = (
            step in data if isinstance(data, dict) else isinstance(data, list) and step in range(len(data))
        )
        if known:
            path, data = (*path, step), data[step]
    return path


def _word(found: Any, model: type[BaseModel]) -> tuple[str, str]:
    """The code and the sentence for one error of pydantic."""
    loc, context = found["loc"], found.get("ctx", {})
    name = ".".join(str(step) for step in loc) or "the document"
    match found["type"]:
        case "extra_forbidden":
            words = _names(model, loc[:-1])
            return "unknown_key", f"unknown key {_show(str(loc[-1]))}" + _meant(str(loc[-1]), words)
        case "missing":
            return "missing_key", f"{name} is missing"
        case "literal_error" | "enum":
            words = re.findall(r"'([^']*)'", str(context.get("expected", "")))
            given = _show(found["input"])
            return "bad_value", f"{name}: {given} is not one of {', '.join(words)}" + _meant(
                str(found["input"]), words, listed=True
            )
        case "value_error":
            return "bad_value", f"{name}: {context.get('error', found['msg'])}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "bad_type", f"{name} must be a mapping"
        case "list_type" | "tuple_type":
            return "bad_type", f"{name} must be a list"
        case kind:
            given = "" if isinstance(found["input"], dict | list) else f", not {_show(found['input'])}"
            message = found["msg"].replace("Input should be", "must be")
            return "bad_type" if kind.endswith("_type") else "bad_value", f"{name} {message}{given}"


def _meant(word: str, words: Collection[str], *, listed: bool = False) -> str:
    best = nearest(word, words)
    if best is not None:
        return f"; did you mean {best!r}?"
    return "" if listed or not words else f"; the keys here are {', '.join(sorted(words))}"


def _names(model: type[BaseModel], loc: Iterable[str | int]) -> list[str]:
    """The keys that the model at ``loc`` below ``model`` has."""
    models: set[type[BaseModel]] = {model}
    for step in loc:
        below: set[type[BaseModel]] = set()
        for each in models:
            fields: Mapping[str, Any] = {info.alias or key: info for key, info in each.model_fields.items()}
            if step in fields:
                below |= _models_in(fields[str(step)].annotation)
        models = below or models  # an index, a key of a dict or a union member: the model stays
    return sorted({info.alias or key for each in models for key, info in each.model_fields.items()})


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in _models_in(part)}
