"""A policy and its parent become one tree.

Mappings are merged key by key, lists are added to, scalars are replaced. ``!remove X`` in a list
drops the inherited item that X names, and ``key: !remove`` drops an inherited key; removing what is
not inherited is a problem. Every node keeps the place where it was written, so an inherited value
still says which file set it. Name, description, parent and examples belong to one file and are not
inherited.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from sandboxd.policy.source import Entry, MappingNode, Node, ScalarNode, SequenceNode, is_removal

if TYPE_CHECKING:
    from sandboxd.models import PolicyProblem

__all__ = ["closest", "combine", "item_name", "nearest"]

OWN = frozenset({"name", "description", "extends", "examples"})
NAMES = ("target", "path", "name", "host", "cidr")
"""Which key of a list's item names it, for ``!remove``."""
STREAMS = frozenset({("limits", "stdout"), ("limits", "stderr")})


def closest(word: str, known: list[str]) -> str | None:
    """The known word that was probably meant."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def nearest(word: str, known: list[str]) -> str:
    """A phrase that offers the nearest known word, else a few of them; empty if none are known."""
    close = closest(word, known)
    if close:
        return f"; did you mean {close!r}?"
    if not known:
        return ""
    shown = ", ".join(known[:12])
    return f"; known: {shown}" + (", …" if len(known) > 12 else "")


def item_name(node: Node) -> str:
    """What ``!remove`` calls an item of a list."""
    if isinstance(node, ScalarNode):
        return node.text
    if isinstance(node, MappingNode):
        for key in NAMES:
            value = node.get(key)
            if isinstance(value, ScalarNode):
                return value.text
    return ""


def _same(one: Node, other: Node) -> bool:
    return one.plain() == other.plain() and type(one) is type(other)


class _Merge:
    def __init__(self) -> None:
        self.problems: list[PolicyProblem] = []

    def node(self, child: Node, parent: Node, path: tuple[str, ...]) -> Node:
        if path in STREAMS:
            child, parent = _as_stream(child), _as_stream(parent)
        if isinstance(child, MappingNode) and isinstance(parent, MappingNode):
            return self.mapping(child, parent, path)
        if isinstance(child, SequenceNode) and isinstance(parent, SequenceNode):
            return self.sequence(child, parent)
        return self.alone(child, path)

    def mapping(self, child: MappingNode, parent: MappingNode, path: tuple[str, ...]) -> MappingNode:
        entries = {key: entry for key, entry in parent.entries.items() if path or key not in OWN}
        for key, entry in child.entries.items():
            inherited = entries.get(key)
            if is_removal(entry.node):
                if inherited is None:
                    self.refuse(entry.node, key, list(entries))
                else:
                    del entries[key]
            elif inherited is None:
                entries[key] = Entry(entry.at, self.alone(entry.node, (*path, key)))
            else:
                entries[key] = Entry(entry.at, self.node(entry.node, inherited.node, (*path, key)))
        return MappingNode(child.at, entries)

    def sequence(self, child: SequenceNode, parent: SequenceNode) -> SequenceNode:
        items = list(parent.items)
        for item in child.items:
            if is_removal(item):
                name = item_name(item)
                left = [other for other in items if item_name(other) != name]
                if len(left) == len(items):
                    self.refuse(item, name, [item_name(other) for other in items])
                items = left
            elif not any(_same(item, other) for other in items):
                items.append(item)
        return SequenceNode(tuple(items), child.at)

    def alone(self, node: Node, path: tuple[str, ...]) -> Node:
        """A node with nothing to inherit from: whatever it removes cannot be there."""
        if isinstance(node, MappingNode):
            return self.mapping(node, MappingNode(node.at), path or ("",))
        if isinstance(node, SequenceNode):
            kept = []
            for item in node.items:
                if is_removal(item):
                    self.refuse(item, item_name(item), [])
                else:
                    kept.append(item if isinstance(item, ScalarNode) else self.alone(item, (*path, "")))
            return SequenceNode(tuple(kept), node.at)
        return node

    def refuse(self, node: Node, name: str, inherited: list[str]) -> None:
        said = f"{name!r} is not inherited, so it cannot be removed{nearest(name, inherited)}"
        self.problems.append(node.at.problem("bad_remove", said))


def _as_stream(node: Node) -> Node:
    # `stdout: 1MiB` is short for `stdout: {size: 1MiB}` and must not drop an inherited on_limit
    if isinstance(node, ScalarNode) and not node.removes:
        return MappingNode(node.at, {"size": Entry(node.at, node)})
    return node


def combine(child: MappingNode, parent: MappingNode | None) -> tuple[MappingNode, list[PolicyProblem]]:
    """The tree of a policy with what it inherits, and what its removals got wrong."""
    merge = _Merge()
    tree = merge.mapping(child, parent or MappingNode(child.at), ())
    return tree, merge.problems
