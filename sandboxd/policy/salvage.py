"""What can still be judged of a file that has errors, so that all of them come at once.

Theory of operation. What the schema refuses is taken out of the tree, until the rest is a whole policy
that can be merged and checked like any other. The paths of what was taken out, and of what it may have
been meant for, are *doubtful*. Each check names the values that it reads (``Places.sure``) and is silent
where one of them is doubtful, since it might be reporting what nobody wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.policy.diagnosis import keys_at, refusals
from sandboxd.policy.inherit import closest
from sandboxd.policy.schema import PolicyFile
from sandboxd.policy.source import (
    MAX_PROBLEMS,
    Entry,
    MappingNode,
    Node,
    ScalarNode,
    SequenceNode,
    is_removal,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic_core import ErrorDetails

    from sandboxd.models import PolicyProblem

__all__ = ["ALL", "salvage", "section_at"]

ALL = frozenset({""})
"""Everything is doubtful: the path of the root."""
ROUNDS = 4  # a part that is taken out can leave its section without what it needs
STAND_INS: dict[str, str | int] = {"version": 1, "name": "unnamed"}  # without these no policy is whole

Steps = tuple[str | int, ...]


def salvage(tree: MappingNode) -> tuple[MappingNode | None, frozenset[str]]:
    """The tree without what the schema refuses, and the dotted paths that are doubtful now.

    None when nothing can be made of it, or when there are so many errors that no more would be shown.
    """
    doubtful: set[str] = set()
    for _ in range(ROUNDS):
        found = refusals(PolicyFile, tree)
        if not found:
            return tree, frozenset(doubtful)
        if len(found) > MAX_PROBLEMS:
            break
        wrong: set[Steps] = set()
        missing: dict[str, Entry] = {}
        for error in found:
            steps = _steps(tree, error["loc"])
            if steps:
                wrong.add(steps)
                doubtful.add(_doubt(error, steps))
            elif error["type"] == "missing":
                value = STAND_INS[str(error["loc"][0])]
                missing[str(error["loc"][0])] = Entry(tree.at, ScalarNode(value, str(value), tree.at))
            else:
                return None, ALL
        tree = MappingNode(tree.at, {**_without(tree, (), wrong).entries, **missing})
    return None, ALL


def section_at(tree: MappingNode, problem: PolicyProblem) -> str:
    """The top-level key whose value a problem of the same file stands in; empty if that cannot be told."""
    places = sorted((entry.at.line, entry.at.column, key) for key, entry in tree.entries.items())
    above = [key for line, column, key in places if (line, column) < (problem.line, problem.column)]
    # in a flow mapping a key that was dropped looks as if it were in the value before it
    block = any((line, column) == (tree.at.line, tree.at.column) for line, column, _ in places)
    return above[-1] if above and block and problem.column > tree.at.column else ""


def _steps(tree: MappingNode, loc: Iterable[int | str]) -> Steps:
    """A pydantic location in terms of the tree, as far as it goes."""
    node: Node = tree
    steps: list[str | int] = []
    for step in loc:
        if isinstance(node, MappingNode) and str(step) in node.entries:
            node = node.entries[str(step)].node
            steps.append(str(step))
        elif isinstance(node, SequenceNode) and isinstance(step, int):
            # the model has not seen the items that only remove
            index = [number for number, item in enumerate(node.items) if not is_removal(item)][step]
            node = node.items[index]
            steps.append(index)
        else:
            break
    return tuple(steps)


def _doubt(error: ErrorDetails, steps: Steps) -> str:
    path = list(steps)
    if error["type"] == "extra_forbidden":
        # the key that was meant; any of its section if none is near
        near = closest(str(path.pop()), keys_at(PolicyFile, error["loc"][:-1]))
        path += [near] if near else []
    items = [number for number, step in enumerate(path) if isinstance(step, int)]
    return ".".join(str(step) for step in (path[: items[0]] if items else path))


def _without(node: MappingNode, path: Steps, wrong: set[Steps]) -> MappingNode:
    entries = {
        key: Entry(entry.at, _kept(entry.node, (*path, key), wrong))
        for key, entry in node.entries.items()
        if (*path, key) not in wrong
    }
    return MappingNode(node.at, entries)


def _kept(node: Node, path: Steps, wrong: set[Steps]) -> Node:
    if isinstance(node, MappingNode):
        return _without(node, path, wrong)
    if isinstance(node, SequenceNode):
        items = tuple(
            _kept(item, (*path, number), wrong)
            for number, item in enumerate(node.items)
            if (*path, number) not in wrong
        )
        return SequenceNode(items, node.at)
    return node
