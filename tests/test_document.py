"""Strict YAML: positions, everything that is refused, and documents that attack the parser."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from sandboxd import document
from sandboxd.document import Position, Tagged
from sandboxd.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path


def codes(text: str, **options: tuple[str, ...]) -> list[tuple[int, int, str]]:
    return [(p.line, p.column, p.code) for p in document.load(text, "f", **options).problems]


def test_data_and_positions() -> None:
    found = document.load("a: 1\nb:\n  - x\n  - {c: 0.5, d: null}\n", "f")
    assert found.problems == []
    assert found.data == {"a": 1, "b": ["x", {"c": 0.5, "d": None}]}
    assert found.at(("b", 1, "c")) == Position(4, 9)
    assert found.at(("b", 1, "c"), key=True) == Position(4, 6)
    assert found.at(("b", 1, "missing")) == Position(4, 5)
    assert str(found.problem(("a",), "bad", "no")) == "f:1:4: no"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"), ("on", "on"), ("12:30", "12:30"), ("0660", "0660"), ("0", 0), ("-7", -7),
        ("0.5", 0.5), ("1e3", 1000.0), ("'1'", "1"), ("true", True), ("~", None), ("", None),
        ("1e999", "1e999"), (".5", 0.5), (".", "."), ("60s", "60s"), ("9" * 40, "9" * 40),
        ("!!str 5", "5"), ("|\n  text\n", "text\n"),
    ],
)  # fmt: skip
def test_scalars_are_yaml_1_2_core(text: str, value: object) -> None:
    found = document.load(f"k: {text}\n", "f")
    assert found.problems == []
    assert found.data == {"k": value}
    assert type(found.data["k"]) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", [(3, 1, "duplicate_key")]),
        ("a: &x 1\nb: *x\n", [(1, 4, "anchor"), (2, 4, "alias")]),
        ("a: {x: 1}\n<<: {y: 1}\n", [(2, 1, "merge_key")]),
        ("? [a, b]\n: 1\nc: 2\n", [(1, 3, "key")]),
        ("a: !!python/object:os.system x\n", [(1, 4, "tag")]),
        ("a: !!int '3'\n", [(1, 4, "tag")]),
        ("a: !wat {b: 1}\n", [(1, 4, "tag")]),
        ("a: 1\n---\nb: 2\n", [(2, 1, "documents")]),
        ("a: [1\n", [(2, 1, "yaml")]),
        ("a:\n\tb: 1\n", [(2, 1, "yaml")]),
        ("a: 1\nb: \0\n", [(2, 4, "yaml")]),
        ('a: "\\UFFFFFFFF"\n', [(1, 1, "yaml")]),
        ("a: 1\na: 2\nb: 1\nb: 2\nc: *x\n", [(2, 1, "duplicate_key"), (4, 1, "duplicate_key"),
                                                 (5, 4, "alias")]),
    ],
)  # fmt: skip
def test_refused_with_its_position(text: str, expected: list[tuple[int, int, str]]) -> None:
    assert codes(text) == expected


def test_tags_that_the_caller_allows() -> None:
    found = document.load("a: [!remove x, !remove {b: 1}, y]\n", "f", tags=("!remove",))
    assert found.problems == []
    assert found.data == {"a": [Tagged("!remove", "x"), Tagged("!remove", {"b": 1}), "y"]}
    assert codes("a: !delete x\n", tags=("!remove",)) == [(1, 4, "tag")]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{a: " * 50_000, "- " * 100_000, "x" * 300_000, "- a\n" * 60_000, "{" * 33, "? " * 5_000],
    ids=["brackets", "braces", "dashes", "large", "many", "deep", "question marks"],
)
def test_bombs_end_quickly(text: str) -> None:
    begun = time.monotonic()
    assert document.load(text, "f").problems
    assert time.monotonic() - begun < 10


def test_the_number_of_problems_is_bounded() -> None:
    assert len(codes("a: 1\n" * 1000)) == document.MAX_PROBLEMS


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!?|>'\"\n\t #%,0\\\x00é"), max_size=60))
def test_no_text_raises(text: str) -> None:
    found = document.load(text, "f")
    assert all(p.line >= 1 and p.column >= 1 for p in found.problems)


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 0
    kind: Literal["small", "large"] = "small"


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: list[Inner] = []


def test_validate_gives_every_error_with_the_nearest_word() -> None:
    found = document.load("nmae: x\ninner:\n  - {siez: 1}\n  - {kind: smal}\n  - {size: many}\n", "f")
    assert document.validate(found, Outer) is None
    lines = sorted(str(p) for p in found.problems)
    assert len(lines) == 5
    assert lines[0].startswith("f:1:1: name is missing")
    assert lines[1] == "f:1:1: unknown key 'nmae'; did you mean 'name'?"
    assert lines[2] == "f:3:6: unknown key 'siez'; did you mean 'size'?"
    assert lines[3].startswith(
        "f:4:12: inner.1.kind: 'smal' is not one of small, large; did you mean 'small'?"
    )
    assert lines[4].startswith("f:5:12: inner.2.size must be a valid integer")


def test_validate_accepts() -> None:
    found = document.load("name: x\n", "f")
    assert document.validate(found, Outer) == Outer(name="x")


def test_read_text_is_bounded_and_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        document.read_text(file)
    file.write_bytes(b"a" * 11)
    with pytest.raises(InvalidRequest, match="larger than 10"):
        document.read_text(file, limit=10)
    assert document.read_text(file) == "a" * 11
