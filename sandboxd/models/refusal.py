"""What is wrong with a value that a model refuses, in words for whoever gave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["OVER", "place_of", "said_of"]

MAX_TEXT = 300  # characters of one message
OVER = {"too_long", "string_too_long", "bytes_too_long"}
"""What pydantic calls a value that is over its bound."""
UNDER = {"too_short", "string_too_short", "bytes_too_short"}
COUNTED: dict[type, str] = {str: "characters", bytes: "bytes", dict: "members"}
"""What the bound of a value counts, by its type; of a list it is items."""
FORMS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "begins with a letter or digit and goes on with those, '.', '_' and '-'",
    r"^sha256:[0-9a-f]{64}$": "is a digest: sha256: and 64 hexadecimal digits in lower case",
    "^[^=]+=": "has the form NAME=VALUE",
    "^[^=]+$": "has no '='",
}
"""What patterns of our models mean."""


def place_of(error: ErrorDetails) -> str:
    """The path of the field."""
    # one of several types that a value may have is a step of pydantic's, not of the request's
    steps = [str(step)[:128] for step in error["loc"]]
    return ".".join(step for step in steps if not step.startswith("function-"))


def said_of(error: ErrorDetails) -> str:
    """One message without the words that only somebody who knows our models understands."""
    kind, known = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return "there is no such field"
    if kind == "missing":
        return "it is missing"
    counted = COUNTED.get(type(error["input"]), "items")
    if kind in OVER:
        return f"has more than {known['max_length']} {counted}"
    if kind in UNDER:
        least = known["min_length"]
        return "is empty" if least == 1 else f"has fewer than {least} {counted}"
    if kind == "string_pattern_mismatch":
        form = FORMS.get(known["pattern"], f"matches {known['pattern']}")
        return f"{str(error['input'])[:128]!r} is not of the form that is asked for: it {form}"
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return "is no object"
    return error["msg"].removeprefix("Value error, ").replace("Input should", "should")[:MAX_TEXT]
