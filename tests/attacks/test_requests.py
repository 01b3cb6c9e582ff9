"""Requests that are small to send and dear to take: the daemon refuses them before they cost anything."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE

from sandboxd import canonical, errors
from sandboxd.api import body
from sandboxd.models import Input, Request
from sandboxd.narrowing import MAX_COMMAND, make_plan
from sandboxd.plan import ImageRef, Plan, make_shape
from sandboxd.policy import load_policies, shipped_policies

if TYPE_CHECKING:
    from daemons import Daemon

SHIPPED = load_policies([shipped_policies()])
MEBI = 2**20


def plan(request: Request, policy: str = "default") -> Plan:
    found = SHIPPED.get(policy)
    return make_plan(found, make_shape(found, ImageRef("base", canonical.digest_bytes(b""))), request)


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("value", [b"[],", b"{},", b"0,", b'"",', b'[{"":['], ids=repr)
def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(value: bytes) -> None:
    text = b"[" + value * (24 * MEBI // len(value))
    before, began = peak(), time.monotonic()
    with pytest.raises(errors.InvalidRequest, match="values"):
        body.parse_json(text)
    assert time.monotonic() - began < 1.0 * PATIENCE
    assert peak() - before < 4 * len(text)


@pytest.mark.parametrize(
    "text",
    [b'["' + b'[{,\\\\\\"' * MEBI + b'"]', b'{"a":"' + b",[{" * MEBI + b'","b":"\\\\"}'],
    ids=["a", "b"],
)
def test_what_stands_in_a_string_is_no_value(text: bytes) -> None:
    assert body.parse_json(text)


def test_an_escaped_quote_hides_no_values() -> None:
    with pytest.raises(errors.InvalidRequest, match="values"):
        body.parse_json(b'["\\\\", ' + b"[]," * 200_000 + b'"\\""]')


def test_thousands_of_deep_input_paths_do_not_become_millions_of_directories() -> None:
    deep = "/x" * 2000
    content = {"text": ""}
    inputs = [Input.model_validate({"path": f"{number}{deep}", "content": content}) for number in range(4096)]
    request = Request(argv=["true"], inputs=inputs)
    before, began = peak(), time.monotonic()
    with pytest.raises(errors.RequestTooWide, match="inodes"):
        plan(request)
    assert time.monotonic() - began < 2.0 * PATIENCE
    assert peak() - before < 64 * MEBI


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b")])
def test_an_input_is_given_once_and_is_a_file_or_a_directory(paths: tuple[str, str]) -> None:
    inputs = [Input.model_validate({"path": path, "content": {"text": "x"}}) for path in paths]
    with pytest.raises(errors.InvalidRequest, match=r"inputs\.1\.path"):
        plan(Request(argv=["true"], inputs=inputs))


@pytest.mark.parametrize(
    "patterns",
    [["**/a/" * 31 + "x"], ["a/" * 64 + "a"], ["[z-a]"], ["*a" * 100 + str(number) for number in range(64)]],
    ids=["stars", "parts", "range", "total"],
)
def test_patterns_that_are_dear_or_wrong_are_refused_before_anything_runs(patterns: list[str]) -> None:
    with pytest.raises((errors.InvalidRequest, errors.TooLarge)) as caught:
        plan(Request(argv=["true"], artifacts=patterns), "shell")
    assert str(caught.value.details["field"]).startswith("artifacts")


def test_a_command_that_no_kernel_takes_is_refused() -> None:
    with pytest.raises(errors.TooLarge, match="argv and env"):
        plan(Request(argv=["true", *["x" * 100_000] * 80]))
    with pytest.raises(errors.TooLarge, match="argv and env"):
        plan(Request(argv=["true"], env={f"A{number}": "x" * 100_000 for number in range(80)}))


def test_the_largest_command_that_is_taken_ends_in_the_kernels_own_words(daemon: Daemon) -> None:
    room = MAX_COMMAND - 4096
    done = daemon.run("true", *["x" * 100_000] * (room // 100_001))
    assert done.outcome is not None
    assert (done.outcome.cause, done.outcome.errno) == ("exec_failed", "E2BIG")
