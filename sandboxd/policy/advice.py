"""What a policy file may say and had better not: for ``sandboxd policy check``; no problem of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.policy.explain import ENV_NOTE
from sandboxd.policy.source import MappingNode, ScalarNode, SequenceNode, parse

if TYPE_CHECKING:
    from sandboxd.models import PolicyProblem

__all__ = ["advice"]


def advice(text: str, file: str) -> list[PolicyProblem]:
    """Notes on what this text says itself, in the form of problems, with the code ``discouraged``."""
    tree, _ = parse(text, file)
    secrets = None if tree is None else tree.get("secrets")
    found = []
    for item in secrets.items if isinstance(secrets, SequenceNode) else ():
        how = item.get("as") if isinstance(item, MappingNode) else None
        if isinstance(how, ScalarNode) and how.text == "env":
            found.append(how.at.problem("discouraged", f"note: as: env is {ENV_NOTE}"))
    isolation = None if tree is None else tree.get("isolation")
    if isinstance(isolation, ScalarNode) and isolation.text == "session":
        said = "note: calls of a session share a container: what one leaves running can meddle with others"
        found.append(isolation.at.problem("discouraged", said))
    return found
