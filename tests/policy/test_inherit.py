"""Merging a policy with its parent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.policy.inherit import combine
from sandboxd.policy.source import MappingNode, parse


def tree(text: str, file: str = "x.yaml") -> MappingNode:
    found, problems = parse(text, file)
    assert problems == []
    assert found is not None
    return found


def merged(child: str, parent: str) -> dict[str, Any]:
    result, problems = combine(tree(child), tree(parent))
    assert problems == []
    return result.plain()


@pytest.mark.parametrize(
    ("child", "parent", "result"),
    [
        ("a: 1", "a: 2\nb: 3", {"a": 1, "b": 3}),
        ("a: {x: 1}", "a: {y: 2}", {"a": {"y": 2, "x": 1}}),
        ("a: [x, y]", "a: [z, x]", {"a": ("z", "x", "y")}),
        ("a: [!remove x]", "a: [x, y]", {"a": ("y",)}),
        (
            "a: [!remove /x, {target: /x, n: 2}]",
            "a: [{target: /x, n: 1}]",
            {"a": ({"target": "/x", "n": 2},)},
        ),
        ("a: [!remove a.b]", "a: [{host: a.b, ports: [1]}, {host: a.b, ports: [2]}]", {"a": ()}),
        ("a: [!remove '80']", "a: [80]", {"a": ()}),
        ("a: !remove", "a: {x: 1}\nb: 1", {"b": 1}),
        ("a: {x: !remove , y: 2}", "a: {x: 1, y: 2}", {"a": {"y": 2}}),
        ("a: [1]", "a: 2", {"a": (1,)}),
        ("x: 1", "name: p\ndescription: d\nextends: q\nexamples: {}\nx: 2", {"x": 1}),
        (
            "limits: {stdout: 2MiB}",
            "limits: {stdout: {size: 1MiB, on_limit: kill}}",
            {"limits": {"stdout": {"size": "2MiB", "on_limit": "kill"}}},
        ),
        (
            "limits: {stdout: {on_limit: kill}}",
            "limits: {stdout: 1MiB}",
            {"limits": {"stdout": {"size": "1MiB", "on_limit": "kill"}}},
        ),
    ],
)
def test_merge(child: str, parent: str, result: dict[str, Any]) -> None:
    assert merged(child, parent) == result


@pytest.mark.parametrize(
    ("child", "parent", "line"),
    [
        ("a:\n- x\n- !remove q\n", "a: [quux, z]", 3),
        ("b: 1\na: !remove\n", "b: 2", 2),
        ("a: [!remove x]\n", "", 1),
        ("\na: {b: [!remove x]}\n", "c: 1", 2),
        ("a: [x, !remove x, !remove x]\n", "a: [y]", 1),
    ],
)
def test_removing_what_is_not_inherited_is_a_problem(child: str, parent: str, line: int) -> None:
    _, problems = combine(tree(child), tree(parent) if parent else None)
    assert [(problem.code, problem.line) for problem in problems] == [("bad_remove", line)]


def test_a_near_miss_is_offered() -> None:
    _, problems = combine(tree("a: [!remove /srv/dat]"), tree("a: [{target: /srv/data}]"))
    assert "did you mean '/srv/data'?" in problems[0].message


VALUES = st.recursive(
    st.integers(0, 3) | st.sampled_from(["x", "y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.sampled_from("pqr"), VALUES, max_size=3)


def expected(child: Any, parent: Any) -> Any:
    if isinstance(child, dict) and isinstance(parent, dict):
        both = {key: expected(child[key], parent[key]) for key in child.keys() & parent.keys()}
        return {**parent, **child, **both}
    if isinstance(child, list) and isinstance(parent, list):
        result = list(parent)
        for item in child:
            if not any(json.dumps(item, sort_keys=True) == json.dumps(one, sort_keys=True) for one in result):
                result.append(item)
        return result
    return child


@given(DOCUMENTS, DOCUMENTS)
def test_merge_is_that_of_the_documentation(child: dict[str, Any], parent: dict[str, Any]) -> None:
    result, problems = combine(tree(json.dumps(child)), tree(json.dumps(parent)))
    assert problems == []
    assert json.loads(json.dumps(result.plain())) == expected(child, parent)


@given(DOCUMENTS)
def test_a_policy_that_only_extends_is_its_parent(parent: dict[str, Any]) -> None:
    result, _ = combine(tree("{}"), tree(json.dumps(parent), "parent.yaml"))
    assert json.loads(json.dumps(result.plain())) == parent
    for key in parent:
        at = result.find(key)
        assert at is not None
        assert at.file == "parent.yaml"
