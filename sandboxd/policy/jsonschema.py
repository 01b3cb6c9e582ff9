"""The JSON Schema of policy files, for editors. ``python -m sandboxd.policy.jsonschema`` prints it.

It is made of the models that the loader validates with, and shipped as
``policies/policy.schema.json``, where a line on top of each policy points to it. An editor cannot
know everything that the loader checks; what it does not know is checked when the file is loaded.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from sandboxd.policy.floor import FORMATS, limit
from sandboxd.policy.schema import Limits, PolicyFile

__all__ = ["policy_schema", "schema_text"]


def _tidy(value: Any) -> Any:
    """Without titles (they repeat the keys) and null (a key is left out, never empty)."""
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if not isinstance(value, dict):
        return value
    tidy = {key: _tidy(item) for key, item in value.items() if not _is_noise(key, item)}
    options = tidy.get("anyOf")
    if isinstance(options, list):
        left = [option for option in options if option != {"type": "null"}]
        if len(left) == 1:
            del tidy["anyOf"]
            # a field's own description is about more than that of its type
            tidy = {**left[0], **tidy}
        else:
            tidy["anyOf"] = left
    return tidy


def _is_noise(key: str, item: Any) -> bool:
    # defaults are in the units of memory, which nobody can write in a file; limits get theirs below
    return (key == "title" and isinstance(item, str)) or (
        key == "default" and not isinstance(item, str | bool)
    )


def policy_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of a policy file."""
    schema: dict[str, Any] = _tidy(PolicyFile.model_json_schema(by_alias=True))
    for path, show in FORMATS.items():
        value = limit(Limits(), path)
        *sections, key = path.split(".")
        model = type(getattr(Limits(), sections[0])) if sections else Limits
        if value is not None:
            schema["$defs"][model.__name__]["properties"][key]["default"] = show(value)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sandboxd policy", **schema}


def schema_text() -> str:
    """The text of the shipped file."""
    return json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
