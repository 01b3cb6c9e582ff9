"""What a schema model says about a tree, as problems with their place and the nearest valid word.

Foreign errors (pydantic's) enter the project here and go no further.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from sandboxd.policy.inherit import nearest
from sandboxd.policy.source import (
    MAX_PROBLEMS,
    MappingNode,
    Node,
    Origin,
    ScalarNode,
    SequenceNode,
    is_removal,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from sandboxd.models import PolicyProblem

__all__ = ["keys_at", "refusals", "validate"]

Model = TypeVar("Model", bound=BaseModel)

_TYPES = {
    "string_type": "must be text; put it in quotes",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list, such as [a, b]",
    "model_type": "must be a mapping, such as {key: value}",
    "dict_type": "must be a mapping, such as {key: value}",
}


def _place(tree: MappingNode, loc: tuple[int | str, ...], *, key: bool) -> tuple[Origin, str, Node]:
    """Where a pydantic location is in the tree, as far as it goes: its place, path and node."""
    node: Node = tree
    at = tree.at
    path: list[str] = []
    for step in loc:
        if isinstance(node, MappingNode) and str(step) in node.entries:
            entry = node.entries[str(step)]
            at, node = (entry.at if key else entry.node.at), entry.node
        elif isinstance(node, SequenceNode) and isinstance(step, int):
            # the model has not seen the items that only remove
            node = [item for item in node.items if not is_removal(item)][step]
            at = node.at
        else:
            break
        path.append(str(step))
    return at, ".".join(path), node


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _section(part)
        if found is not None:
            return found
    return None


def keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the mapping at a location may have."""
    here: type[BaseModel] | None = model
    for step in loc:
        if isinstance(step, int):
            continue
        fields = {field.alias or name: field for name, field in here.model_fields.items()} if here else {}
        here = _section(fields[step].annotation) if step in fields else None
    return [field.alias or name for name, field in here.model_fields.items()] if here else []


def _explain(model: type[BaseModel], tree: MappingNode, error: ErrorDetails) -> PolicyProblem:
    loc, kind = error["loc"], error["type"]
    at, path, node = _place(tree, loc, key=kind == "extra_forbidden" or loc[-1:] == ("[key]",))
    prefix = f"{path}: " if path else ""
    if kind == "extra_forbidden":
        where = ".".join(str(step) for step in loc[:-1])
        word = str(loc[-1])
        inside = f" in {where}" if where else ""
        said = f"unknown key {word!r}{inside}{nearest(word, keys_at(model, loc[:-1]))}"
        return at.problem("unknown_key", said)
    if kind == "missing":
        return at.problem("missing_key", f"{prefix}the key {str(loc[-1])!r} is missing")
    if kind == "literal_error":
        known = [word.strip(" '") for word in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        word = node.text if isinstance(node, ScalarNode) else "this"
        return at.problem("bad_value", f"{prefix}{word!r} is not allowed here{nearest(word, known)}")
    if kind in {"too_short", "too_long"}:
        bound = (
            f"at least {error['ctx']['min_length']}"
            if kind == "too_short"
            else f"at most {error['ctx']['max_length']}"
        )
        return at.problem("bad_value", f"{prefix}must have {bound} items")
    if kind in _TYPES:
        return at.problem("wrong_type", prefix + _TYPES[kind])
    said = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return at.problem("bad_value", prefix + said)


def _refused(error: ValidationError) -> list[ErrorDetails]:
    details = error.errors(include_url=False, include_input=False)
    # pydantic also counts a list as too short when an item of it is wrong
    inner = {detail["loc"][:-1] for detail in details}
    return [one for one in details if one["type"] != "too_short" or one["loc"] not in inner]


def refusals(model: type[BaseModel], tree: MappingNode) -> list[ErrorDetails]:
    """Everything of a tree that the model refuses, in pydantic's terms."""
    try:
        model.model_validate(tree.plain())
    except ValidationError as error:
        return _refused(error)
    return []


def validate(model: type[Model], tree: MappingNode) -> tuple[Model | None, list[PolicyProblem]]:
    """The model's value of a tree, or everything that is wrong with it."""
    try:
        return model.model_validate(tree.plain()), []
    except ValidationError as error:
        return None, [_explain(model, tree, detail) for detail in _refused(error)[:MAX_PROBLEMS]]
