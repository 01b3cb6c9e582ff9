"""Reading the YAML of policies: places, bounds, and everything that is refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.policy.source import MAX_NODES, MAX_SIZE, MappingNode, parse, read

if TYPE_CHECKING:
    from pathlib import Path


def tree_of(text: str) -> MappingNode:
    tree, problems = parse(text, "x.yaml")
    assert problems == []
    assert tree is not None
    return tree


def test_values_know_their_places() -> None:
    tree = tree_of("a: 1\nb:\n  - x\n  - {k.d: y}\n")
    assert tree.plain() == {"a": 1, "b": ("x", {"k.d": "y"})}
    for path, line, column in (("a", 1, 1), ("b", 2, 1), ("b.0", 3, 5), ("b.1", 4, 5), ("b.1.k.d", 4, 6)):
        found = tree.find(path)
        assert found is not None
        assert (found.line, found.column) == (line, column)
    assert tree.find("b.2") is None
    assert tree.find("a.x") is None
    assert tree.find("b.x") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0022", "0022"),
        ("12", 12),
        ("-3", -3),
        ("0.5", 0.5),
        ("yes", "yes"),
        ("true", True),
        ("'true'", "true"),
        ('"7"', "7"),
        ("1e3", "1e3"),
        ("9" * 30, "9" * 30),
    ],
)
def test_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    assert tree_of(f"k: {text}").plain() == {"k": value}


def test_every_duplicate_is_reported() -> None:
    _, problems = parse("a: 1\na: 2\nb: 1\na: 3\nb: 2\n", "x.yaml")
    assert [(problem.line, problem.code) for problem in problems] == [
        (2, "duplicate_key"),
        (4, "duplicate_key"),
        (5, "duplicate_key"),
    ]


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("a: &x [1]\nb: *x\n", "syntax", 1),
        ("a: 1\nb: *x\n", "syntax", 2),
        ("a: !!python/object:os.system x", "syntax", 1),
        ("a: !secret x", "syntax", 1),
        ("a: !remove [x]", "syntax", 1),
        ("%YAML 1.1\n---\na: 1\n", "syntax", 2),
        ("a: 1\n---\nb: 2\n", "syntax", 2),
        ("a:\nb: 1\n", "wrong_type", 1),
        ("a: [x, ]\nb: [~]\n", "wrong_type", 2),
        ("? [a]\n: b\n", "wrong_type", 1),
        ("a: {b: [c}\n", "syntax", 1),
        ("\ta: 1\n", "syntax", 1),
        ("a: \x00\n", "syntax", 1),
        ("", "wrong_type", 1),
        ("just text", "wrong_type", 1),
        ("[" * 200_000, "too_large", 1),
        ("a: " + "{b: " * 50, "too_large", 1),
        ("[" + "a," * (MAX_NODES + 1), "too_large", 1),
        ("#" * (MAX_SIZE + 1), "too_large", 1),
    ],
)
def test_what_is_no_policy_is_a_problem(text: str, code: str, line: int) -> None:
    _, problems = parse(text, "x.yaml")
    assert [(problem.code, problem.line) for problem in problems] == [(code, line)]


@given(st.text(alphabet=st.sampled_from("ab:-{}[]!&*'\"|>%#?,~ \n\t\0\u2028\ud800"), max_size=60))
def test_any_text_is_read_or_has_problems(text: str) -> None:
    tree, problems = parse(text, "x.yaml")
    assert tree is not None or problems
    assert all(problem.line >= 1 and problem.column >= 1 for problem in problems)


def test_read_says_why_not(tmp_path: Path) -> None:
    assert read(tmp_path / "none.yaml")[1][0].code == "unreadable"
    assert read(tmp_path)[1][0].code == "unreadable"
    os.mkfifo(tmp_path / "fifo.yaml")
    assert read(tmp_path / "fifo.yaml")[1][0].message == "this is not a regular file"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    assert (read(latin)[1][0].line, read(latin)[1][0].column) == (2, 4)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_SIZE + 1))
    assert read(large)[1][0].code == "too_large"
