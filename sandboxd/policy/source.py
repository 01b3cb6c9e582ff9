"""The text of a policy as a tree of nodes that know where they were written.

The tree is built from the parser's events and not by a YAML constructor: nothing is ever
instantiated from a tag, anchors and aliases are refused before they could multiply, depth and size
are bounded while reading, and every duplicate key is reported, not only the first. Plain scalars are
resolved as in YAML 1.2's core schema, with one exception: a number with a leading zero stays text,
so that ``umask: 0022`` means what it says.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from sandboxd.models import PolicyProblem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "BUILT_IN",
    "Entry",
    "MappingNode",
    "Node",
    "Origin",
    "ScalarNode",
    "SequenceNode",
    "is_removal",
    "parse",
    "read",
]

MAX_SIZE = 2**20
MAX_DEPTH = 12  # the schema is 6 deep
MAX_NODES = 20_000
MAX_PROBLEMS = 100  # of one file: enough to work through, and a bound on what goes over the wire
MAX_MESSAGE = 600  # characters; a message may quote a value of the file
REMOVE = "!remove"

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})\.[0-9]{1,18}")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def _printable(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where something was written. Lines and columns count from 1; 0 is a default that nobody wrote."""

    file: str
    line: int
    column: int

    def problem(self, code: str, message: str) -> PolicyProblem:
        """A problem at this place. What a hostile text put into the message is harmless on a terminal."""
        said = message if message.isprintable() else "".join(map(_printable, message))
        if len(said) > MAX_MESSAGE:
            said = said[:MAX_MESSAGE] + "…"
        return PolicyProblem(file=self.file, line=self.line, column=self.column, code=code, message=said)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


BUILT_IN = Origin("(built-in default)", 0, 0)


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A leaf. ``removes`` is true for ``!remove X``."""

    value: str | int | float | bool | None
    text: str
    at: Origin
    removes: bool = False

    def plain(self) -> Any:
        """The value for the schema."""
        return self.value


@dataclass(frozen=True, slots=True)
class SequenceNode:
    """A list."""

    items: tuple[Node, ...]
    at: Origin

    def plain(self) -> tuple[Any, ...]:
        """The items for the schema, without those that only remove."""
        return tuple(item.plain() for item in self.items if not is_removal(item))


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of a mapping, and the place of its key."""

    at: Origin
    node: Node


@dataclass(frozen=True, slots=True)
class MappingNode:
    """A mapping with text keys, in the order they were written."""

    at: Origin
    entries: dict[str, Entry] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The entries for the schema, without those that only remove."""
        return {key: entry.node.plain() for key, entry in self.entries.items() if not is_removal(entry.node)}

    def get(self, key: str) -> Node | None:
        """The value of a key, or None."""
        entry = self.entries.get(key)
        return entry.node if entry else None

    def find(self, path: str) -> Origin | None:
        """The place of the key (or list item) that a dotted path names; None if nobody wrote it.

        Keys that hold dots themselves (of ``process.env``) are matched as the rest of the path.
        """
        node: Node = self
        at = self.at
        rest = path
        while rest:
            if isinstance(node, MappingNode):
                key = rest if rest in node.entries else rest.partition(".")[0]
                entry = node.entries.get(key)
                if entry is None:
                    return None
                at, node = entry.at, entry.node
                rest = rest[len(key) + 1 :]
            elif isinstance(node, SequenceNode):
                index, _, rest = rest.partition(".")
                if not index.isascii() or not index.isdigit() or int(index) >= len(node.items):
                    return None
                node = node.items[int(index)]
                at = node.at
            else:
                return None
        return at


Node = ScalarNode | SequenceNode | MappingNode


def is_removal(node: Node) -> bool:
    """Whether the node only removes something that was inherited."""
    return isinstance(node, ScalarNode) and node.removes


class _FatalError(Exception):
    """Reading cannot go on; carries the problem that says why."""

    def __init__(self, problem: PolicyProblem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _Builder:
    """Makes nodes of the parser's events; collects what is wrong but can be read past."""

    def __init__(self, events: Iterator[Any], file: str) -> None:
        self.events = events
        self.file = file
        self.problems: list[PolicyProblem] = []
        self.nodes = 0

    def at(self, event: Any) -> Origin:
        return Origin(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def document(self) -> Node | None:
        root: Node | None = None
        documents = 0
        for event in self.events:
            match event:
                case StreamStartEvent() | StreamEndEvent() | DocumentEndEvent():
                    continue
                case DocumentStartEvent():
                    documents += 1
                    if event.version or event.tags:
                        raise _FatalError(self.at(event).problem("syntax", "directives are not allowed"))
                    if documents > 1:
                        raise _FatalError(self.at(event).problem("syntax", "a file holds one document only"))
                case _:
                    root = self.node(event, 1)
        return root

    def node(self, event: Any, depth: int) -> Node:
        at = self.at(event)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise _FatalError(at.problem("too_large", f"a policy has at most {MAX_NODES} values"))
        if depth > MAX_DEPTH:
            raise _FatalError(at.problem("too_large", f"values are nested at most {MAX_DEPTH} deep"))
        if isinstance(event, AliasEvent) or event.anchor is not None:
            raise _FatalError(
                at.problem("syntax", "anchors and aliases are not allowed; write the value out")
            )
        tag = None if event.tag is None else str(event.tag)
        match event:
            case MappingStartEvent():
                self.refuse_tag(tag, at)
                return self.mapping(at, depth)
            case SequenceStartEvent():
                self.refuse_tag(tag, at)
                return self.sequence(at, depth)
            case ScalarEvent():
                if tag != REMOVE:
                    self.refuse_tag(tag, at)
                if not _is_unicode(event.value):
                    raise _FatalError(at.problem("syntax", "a lone surrogate is not a character"))
                plain = event.style is None or event.style == ""
                value = _resolve(event.value) if plain and tag is None else event.value
                return ScalarNode(value, event.value, at, removes=tag == REMOVE)
        raise _FatalError(at.problem("syntax", "a value was expected here"))

    def refuse_tag(self, tag: str | None, at: Origin) -> None:
        if tag is not None:
            what = "goes before a single word or an item's name" if tag == REMOVE else "is not allowed"
            self.problems.append(at.problem("syntax", f"the tag {tag} {what}; {REMOVE} is the only one"))

    def sequence(self, at: Origin, depth: int) -> SequenceNode:
        items: list[Node] = []
        for event in self.events:
            if isinstance(event, SequenceEndEvent):
                break
            item = self.node(event, depth + 1)
            if not self.is_empty(item, item.at):
                items.append(item)
        return SequenceNode(tuple(items), at)

    def mapping(self, at: Origin, depth: int) -> MappingNode:
        entries: dict[str, Entry] = {}
        for event in self.events:
            if isinstance(event, MappingEndEvent):
                break
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if not isinstance(key, ScalarNode) or key.removes:
                self.problems.append(key.at.problem("wrong_type", "a key must be a single word"))
            elif key.text in entries:
                first = entries[key.text].at
                self.problems.append(
                    key.at.problem("duplicate_key", f"{key.text!r} was set before, on line {first.line}")
                )
            elif not self.is_empty(value, key.at):
                entries[key.text] = Entry(key.at, value)
        return MappingNode(at, entries)

    def is_empty(self, node: Node, at: Origin) -> bool:
        empty = isinstance(node, ScalarNode) and node.value is None
        if empty:
            self.problems.append(
                at.problem("wrong_type", "a value is missing here; give one, or leave the key out")
            )
        return empty


def _is_unicode(text: str) -> bool:
    # an escape such as "\\ud800" makes half a character, which neither JSON nor a file name can hold
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _resolve(text: str) -> str | int | float | bool | None:
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _syntax(error: YAMLError, file: str) -> PolicyProblem:
    if isinstance(error, MarkedYAMLError) and (error.problem_mark or error.context_mark):
        mark = error.problem_mark or error.context_mark
        said = " ".join(str(part) for part in (error.context, error.problem) if part)
        return Origin(file, mark.line + 1, mark.column + 1).problem("syntax", said or "this is not YAML")
    said = str(error).splitlines()[0] if str(error) else "this is not YAML"
    return Origin(file, 1, 1).problem("syntax", said)


def parse(text: str, file: str) -> tuple[MappingNode | None, list[PolicyProblem]]:
    """The tree of a policy's text, and what is wrong with its YAML. Raises nothing on any text.

    There is no tree when reading could not go on to the end of the text.
    """
    start = Origin(file, 1, 1)
    if len(text) > MAX_SIZE:
        return None, [start.problem("too_large", f"a policy file has at most {MAX_SIZE} bytes")]
    builder = _Builder(iter(()), file)
    try:
        builder.events = YAML(typ="safe", pure=True).parse(text.removeprefix("\ufeff"))
        root = builder.document()
    except _FatalError as error:
        return None, [*builder.problems[:MAX_PROBLEMS], error.problem]
    except YAMLError as error:
        return None, [*builder.problems[:MAX_PROBLEMS], _syntax(error, file)]
    except (
        ValueError,
        IndexError,
        StopIteration,
        AttributeError,
        AssertionError,
        NotImplementedError,
    ) as error:
        # ruamel's scanner meets some malformed texts with these instead of an error of its own
        return None, [*builder.problems[:MAX_PROBLEMS], start.problem("syntax", f"this is not YAML: {error}")]
    problems = builder.problems[:MAX_PROBLEMS]
    if not isinstance(root, MappingNode):
        return None, [*problems, start.problem("wrong_type", "a policy is a mapping, such as 'version: 1'")]
    return root, problems


def read(path: Path) -> tuple[str | None, list[PolicyProblem]]:
    """The text of a policy file: a regular file of UTF-8 within the size, else problems that say why not."""
    start = Origin(str(path), 1, 1)
    try:
        # O_NONBLOCK: a FIFO in the directory must not hold up the daemon
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        # a directory cannot be made a file object, so the descriptor is closed here
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None, [start.problem("unreadable", "this is not a regular file")]
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_SIZE + 1)
        finally:
            os.close(fd)
    except OSError as error:
        return None, [start.problem("unreadable", f"cannot be read: {error.strerror}")]
    if len(data) > MAX_SIZE:
        return None, [start.problem("too_large", f"a policy file has at most {MAX_SIZE} bytes")]
    try:
        return data.decode(), []
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        return None, [Origin(str(path), line, column).problem("syntax", "this is not UTF-8")]
