"""The OpenAPI document: what each route takes and gives, from the models that decode and encode it.

Handlers decode for themselves, for speed and for strictness, so the document comes from ``Doc``.
Answers leave out members that are null.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic.json_schema import models_json_schema

from sandboxd.api.problem import MEDIA_TYPE
from sandboxd.api.queries import NoQuery
from sandboxd.models import Event, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import BaseModel

__all__ = ["ANY", "OCTETS", "Doc", "document"]

ANY = "*"
"""Stands for every method of a route."""
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")

OCTETS = "application/octet-stream"
NDJSON = "application/x-ndjson"
DESCRIPTION = "One container for each tool call, under a policy. Members that are null are left out."
_PREFIX = "#/components/schemas/"


@dataclass(frozen=True)
class Doc:
    """What the document says of one route."""

    summary: str
    query: type[BaseModel] = NoQuery
    body: type[BaseModel] | None = None
    raw_body: bool = False
    answer: type[BaseModel] | dict[str, Any] | None = None
    """A model, or a schema; None where the answer has no JSON."""
    raw_answer: bool = False
    text_answer: bool = False
    events: bool = False
    lines: type[BaseModel] | None = None
    """Of which each line of the answer is one."""
    status: int = 200
    also: dict[int, str] = field(default_factory=dict)
    """Other statuses with the answer's schema, and what they mean."""
    empty: dict[int, str] = field(default_factory=dict)
    """Other statuses without a body, and what they mean."""
    headers: tuple[tuple[str, str], ...] = ()
    """Request headers with what they do."""


def reference(model: type[BaseModel]) -> dict[str, Any]:
    """A reference to a model's schema."""
    return {"$ref": _PREFIX + model.__name__}


def document(
    version: str, routes: Sequence[tuple[str, str, Any, Doc]], models: set[type[BaseModel]]
) -> dict[str, Any]:
    """The whole document. A route is its method, path, handler and ``Doc``."""
    paths: dict[str, dict[str, Any]] = {}
    each = [
        (method, path, handler, doc)
        for given, path, handler, doc in routes
        for method in (METHODS if given == ANY else (given,))
    ]
    for method, path, handler, doc in each:
        plain = re.sub(r":\w+}", "}", path)
        name = re.sub(r"\W", "_", f"{handler.__name__}{plain}") + f"_{method.lower()}"
        paths.setdefault(plain, {})[method.lower()] = {
            "summary": doc.summary,
            "description": inspect.getdoc(handler),
            "operationId": name,
            **_operation(path, doc),
        }
    info = {
        "title": "sandboxd",
        "version": version,
        "description": DESCRIPTION,
    }
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": _components(models)}}


def _operation(path: str, doc: Doc) -> dict[str, Any]:
    """What a route takes and gives."""
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)(?::\w+)?}", path)
    ]
    properties = doc.query.model_json_schema().get("properties", {}) if doc.query.model_fields else {}
    whole = doc.query.model_json_schema()
    for name, schema in properties.items():
        parameters.append({"name": name, "in": "query", "required": False, "schema": _inline(schema, whole)})
    for name, what in doc.headers:
        parameters.append(
            {
                "name": name,
                "in": "header",
                "required": False,
                "description": what,
                "schema": {"type": "string"},
            }
        )
    content: dict[str, Any] = {}
    if doc.answer is not None:
        schema = doc.answer if isinstance(doc.answer, dict) else reference(doc.answer)
        content["application/json"] = {"schema": schema}
    if doc.events:
        content[NDJSON] = {"schema": reference(Event)}
    if doc.lines is not None:
        content[NDJSON] = {"schema": reference(doc.lines)}
    if doc.raw_answer:
        content[OCTETS] = {"schema": {"type": "string", "format": "binary"}}
    if doc.text_answer:
        content["text/plain"] = {"schema": {"type": "string"}}
    answer = {"description": "Success", **({"content": content} if content else {})}
    extra: dict[str, Any] = {
        "parameters": parameters,
        "responses": {
            str(doc.status): answer,
            **{str(status): answer | {"description": what} for status, what in doc.also.items()},
            **{str(status): {"description": what} for status, what in doc.empty.items()},
            "default": {
                "description": "A problem document (RFC 9457); `code` is stable",
                "content": {MEDIA_TYPE: {"schema": reference(Problem)}},
            },
        },
    }
    if doc.body is not None:
        content = {"application/json": {"schema": reference(doc.body)}}
        extra["requestBody"] = {"required": True, "content": content}
    elif doc.raw_body:
        extra["requestBody"] = {"content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}
    return extra


def _inline(schema: Any, whole: dict[str, Any]) -> Any:
    """A schema without references into ``whole``."""
    if isinstance(schema, list):
        return [_inline(each, whole) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    left_out = {"repeated"} | ({"default"} if schema.get("default", "") is None else set())
    return {key: _inline(value, whole) for key, value in schema.items() if key not in left_out}


def _components(models: set[type[BaseModel]]) -> dict[str, Any]:
    """The schemas of all models that the operations refer to."""
    ordered: list[tuple[Any, Literal["validation", "serialization"]]] = [
        (model, "validation") for model in sorted(models | {Event, Problem}, key=lambda each: each.__name__)
    ]
    _, schemas = models_json_schema(ordered, ref_template=_PREFIX + "{model}")
    found: dict[str, Any] = schemas["$defs"]
    return found
