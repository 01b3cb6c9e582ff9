"""Canonical JSON is RFC 8785 whichever way it is written."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import canonical

SAFE = st.integers(-(2**53) + 1, 2**53 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
KEYS = st.one_of(st.text(st.characters(max_codepoint=127)), TEXT)
SCALARS = st.one_of(st.none(), st.booleans(), SAFE, TEXT, st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner, max_size=8)
    ),
    max_leaves=20,
)


class Colour(StrEnum):
    RED = "red"


@given(VALUES)
def test_it_is_the_encoding_of_the_reference_implementation(value: Any) -> None:
    assert canonical.canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize(
    "value",
    [
        {"\U0001f600": 1, "\uffff": 2},  # in the order of UTF-16, not of code points
        {"b": 1, "a": {"d": 1, "c": '\x7f\x1f\x00"\\/\u2028'}},
        [1.0, 1e21, -0.0, 1e-7],
        {"colour": Colour.RED},
        2**53 - 1,
        [],
        {},
    ],
)
def test_what_is_special_is_that_of_the_reference_implementation(value: Any) -> None:
    assert canonical.canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [2**53, "\ud800", {"\ud800": 1}, float("nan"), {1: 2}, b"x"])
def test_what_has_no_encoding_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical.canonical(value)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_an_object_is_joined_of_its_encoded_members(value: dict[str, Any]) -> None:
    encoded = {key: canonical.canonical(member) for key, member in value.items()}
    assert canonical.joined(encoded) == rfc8785.dumps(value)
