"""Conditions of HTTP, without HTTP."""

from __future__ import annotations

import time
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.httprule import HttpRequest, HttpRule, ambiguous


def request(target: str | bytes, *headers: tuple[str, str], method: str = "GET") -> HttpRequest:
    """A request for a path."""
    said = tuple((name.encode(), value.encode("latin-1")) for name, value in headers)
    return HttpRequest(method, target.encode() if isinstance(target, str) else target, said)


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("/", "/", True),
        ("/", "/a", False),
        ("/", "*", False),
        ("/**", "/", True),
        ("/**", "/a/b", True),
        ("/a/**", "/a", False),
        ("/a/**", "/a/", True),
        ("/a/**", "/ab/c", False),
        ("/a/*", "/a/b", True),
        ("/a/*", "/a/b/c", False),
        ("/a/*", "/a/b?x=/c/d", True),
        ("/a/*/c", "/a/%62/c", True),
        ("/a", "/%61", True),
        ("/a", "/A", False),
        ("/repos/*/issues/**", "/repos/x/issues/1/comments", True),
        ("/v[12]/x", "/v2/x", True),
        ("/v[12]/x", "/v3/x", False),
        ("/a", "/a/", False),
        ("/\u00e9", "/%C3%A9", True),
    ],
)
def test_paths(glob: str, path: str, matches: bool) -> None:  # noqa: FBT001
    assert HttpRule(paths=(glob,)).matches(request(path)) is matches


@pytest.mark.parametrize(
    ("glob", "values", "matches"),
    [
        ("a*", ["abc"], True),
        ("a*", ["a"], True),
        ("a*c", ["abc"], True),
        ("a*b*c", ["a1b2b3c"], True),
        ("a*b*c", ["acb"], False),
        ("a?c", ["abc"], True),
        ("a?c", ["ac"], False),
        ("*", [""], True),
        ("a.c", ["abc"], False),
        ("a*", ["ab", "b"], False),
        ("a*", [], False),
        ("[a]", ["a"], False),
        ("[a]", ["[a]"], True),
    ],
)
def test_headers_all_have_to_match(glob: str, values: list[str], matches: bool) -> None:  # noqa: FBT001
    asked = request("/", *(("x-a", value) for value in values), ("x-b", "zzz"))
    assert HttpRule(headers=(("X-A", glob),)).matches(asked) is matches


def test_what_denies_matches_where_servers_may_differ() -> None:
    paths = HttpRule(paths=("/admin", "/private/*"))
    for target in ("/admin/", "/private/x/"):
        assert paths.matches(request(target), denies=True)
        assert not paths.matches(request(target))
    headers = HttpRule(headers=(("x-m", "DELETE"),))
    for values in (["DELETE", "z"], ["z", "DELETE"], ["z, DELETE"], ["DELETE,z"]):
        asked = request("/", *(("x-m", value) for value in values))
        assert headers.matches(asked, denies=True)
        assert not headers.matches(asked)
    assert not headers.matches(request("/"), denies=True)


@pytest.mark.parametrize(
    "target",
    [
        "/a/../b", "/a/./b", "/..", "/.", "/a/..", "/a/..;x/b", "/a/.;/b", "/%2e%2e/b", "/a/%2E./b", "/a//b",
        "//b", "/a/", "/a%2fb", "/a%2Fb", "/a%5cb", "/a\\b", "/a%00",
        "/a%0a", "/a%7f", "/a%25b", "/a%zz", "/a%2",
        "/a#b",
        "/caf\u00e9", "/a b", "/a\tb", "/a;b", "/a%3bb", "/;/a", "/%c0%af", "/a%ff",
    ],
)  # fmt: skip
def test_what_servers_read_in_different_ways_is_ambiguous(target: str) -> None:
    assert bool(ambiguous(target.encode())) is (target != "/a/")


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5), st.booleans())
def test_an_unambiguous_path_is_the_same_however_often_it_is_decoded(parts: list[str], whole: bool) -> None:  # noqa: FBT001
    target = ("/" + "/".join(quote(part, safe="" if whole else "/%.;") for part in parts)).encode()
    if ambiguous(target) is None:
        once = unquote_to_bytes(target)
        assert unquote_to_bytes(once) == once
        assert not {b"", b".", b".."} & set(once.split(b"/")[1:-1])
        assert once.split(b"/")[-1] not in (b".", b"..")
        assert b"\\" not in once
        assert b"\0" not in once


def test_no_pattern_takes_long() -> None:
    begun = time.monotonic()
    HttpRule(paths=("/" + "a*" * 50 + "b",)).matches(request("/" + "a" * 30_000))
    HttpRule(headers=(("x", "*a" * 200 + "b"),)).matches(request("/", ("x", "a" * 30_000)))
    HttpRule(paths=("/**/a/**/b/**/c/**/d",)).matches(request("/a" * 10_000))
    assert time.monotonic() - begun < 10  # not a figure: backtracking would take years
