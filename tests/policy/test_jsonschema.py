"""The shipped JSON Schema is that of the models, and the shipped policies are valid under it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from sandboxd.policy import shipped_policies
from sandboxd.policy.jsonschema import policy_schema, schema_text
from sandboxd.policy.source import parse

VALID = {"version": 1, "name": "x"}


def test_the_shipped_file_is_current() -> None:
    shipped = (shipped_policies() / "policy.schema.json").read_text()
    assert shipped == schema_text(), "run: python -m sandboxd.policy.jsonschema > policies/policy.schema.json"


def test_shipped_policies_are_valid_and_point_to_it() -> None:
    validator = jsonschema_rs.validator_for(policy_schema())
    for path in shipped_policies().glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# yaml-language-server: $schema=policy.schema.json\n")
        tree, _ = parse(text, str(path))
        assert tree is not None
        document = json.loads(json.dumps(tree.plain()))
        assert [error.message for error in validator.iter_errors(document)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"imge": "x"},
        {"limits": {"memory": 512}},
        {"limits": {"memory": "512 parsecs"}},
        {"limits": {"wall": None}},
        {"commit": "maybe"},
        {"mounts": [{"source": "/x"}]},
        {"network": {"mode": "all"}},
        {"retry": "some"},
        {"retry": {"exited": {"times": 2}}},
        {"retry": {"exited": {"codes": []}}},
        {"retry": {"exited": {"codes": [0]}}},
        {"retry": {"exited": {"codes": [256]}}},
        {"retry": {"signalled": {"signals": ["SEGV"]}}},
        {"retry": {"output": {"raise": {"stdout": 5}}}},
        {"process": {"umask": "999"}},
    ],
)
def test_what_the_loader_refuses_the_schema_refuses(wrong: dict[str, Any]) -> None:
    assert not jsonschema_rs.is_valid(policy_schema(), {**VALID, **wrong})


@pytest.mark.parametrize(
    "right",
    [
        {
            "limits": {
                "stdout": "1MiB",
                "stderr": {"size": "1MiB", "on_limit": "kill"},
                "cpus": 0.5,
                "pids": "1k",
            }
        },
        {"retry": "none"},
        {"retry": {"exited": {"codes": [1, 255]}, "signalled": {}, "output": {"raise": {"stderr": "2MiB"}}}},
        {"retry": {"signalled": {"signals": ["SIGSEGV", "SIGBUS"], "times": 3}}},
        {"retry": {"failed": 2, "memory": {"times": 1, "raise": {"memory": "1GiB"}}}},
        {"secrets": [{"name": "TOKEN", "as": "proxy"}]},
    ],
)
def test_what_the_loader_reads_the_schema_accepts(right: dict[str, Any]) -> None:
    assert jsonschema_rs.is_valid(policy_schema(), {**VALID, **right})


def test_every_section_and_most_keys_are_documented() -> None:
    schema = policy_schema()
    assert all("description" in section for section in schema["$defs"].values())
    limits = schema["$defs"]["Limits"]["properties"]
    assert all("description" in value for value in limits.values())
    assert limits["memory"]["default"] == "512MiB"
