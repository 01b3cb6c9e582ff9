"""Conditions and ranges of RFC 9110 on what has a digest: files of sessions, artifacts, streams."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memoryfiles import CONTENT
from starlette.requests import Request

from sandboxd import canonical, errors
from sandboxd.api.conditions import condition_of, is_unchanged
from sandboxd.workspace.edit import Condition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DIGEST = canonical.digest_bytes(CONTENT)
ETAG, OTHER = f'"{DIGEST}"', f'"sha256:{"0" * 64}"'
FILE = "/v1/sessions/s/files/digits"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def asking(*headers: tuple[str, str]) -> Request:
    raw = [(name.lower().encode(), text.encode("latin-1")) for name, text in headers]
    return Request({"type": "http", "method": "GET", "path": "/", "headers": raw})


# what a server must do: If-Match first, then If-None-Match, then the range (RFC 9110, 13.2.2)
@pytest.mark.parametrize(
    ("headers", "status", "body"),
    [
        ({}, 200, CONTENT),
        ({"If-None-Match": ETAG}, 304, b""),
        ({"If-None-Match": f"W/{ETAG}"}, 304, b""),
        ({"If-None-Match": "*"}, 304, b""),
        ({"If-None-Match": f'{OTHER}, "a,b" ,, W/{ETAG}'}, 304, b""),
        ({"If-None-Match": OTHER}, 200, CONTENT),
        ({"If-None-Match": ETAG, "Range": "bytes=99-"}, 304, b""),
        ({"If-None-Match": OTHER, "Range": "bytes=2-4"}, 206, b"234"),
        ({"If-Match": ETAG}, 200, CONTENT),
        ({"If-Match": "*"}, 200, CONTENT),
        ({"If-Match": f"{OTHER},{ETAG}", "Range": "bytes=-1"}, 206, b"9"),
        ({"If-Match": OTHER}, 412, None),
        ({"If-Match": f"W/{ETAG}"}, 412, None),
        ({"If-Match": OTHER, "If-None-Match": ETAG}, 412, None),
        ({"If-Match": ETAG, "If-None-Match": ETAG}, 304, b""),
        ({"If-Match": OTHER, "Range": "bytes=99-"}, 412, None),
        ({"Range": "bytes=0-0"}, 206, b"0"),
        ({"Range": "bytes=99-"}, 416, None),
        ({"Range": "bytes=0-0", "If-Range": ETAG}, 206, b"0"),
        ({"Range": "bytes=0-0", "If-Range": f"W/{ETAG}"}, 200, CONTENT),
        ({"Range": "bytes=0-0", "If-Range": OTHER}, 200, CONTENT),
        ({"Range": "bytes=99-", "If-Range": OTHER}, 200, CONTENT),
        ({"Range": "bytes=0-0,2-3"}, 200, CONTENT),
        ({"Range": "lines=0-0"}, 200, CONTENT),
        ({"If-Modified-Since": "Sat, 28 Nov 2026 00:00:00 GMT"}, 200, CONTENT),
        ({"If-Match": DIGEST}, 400, None),
        ({"If-None-Match": f"{ETAG} {OTHER}"}, 400, None),
    ],
)
def test_a_file_is_got_on_conditions_and_in_ranges(
    server: Any, headers: dict[str, str], status: int, body: bytes | None
) -> None:
    got, found, answer = server.ask("GET", FILE, headers=headers)
    assert got == status
    until(lambda: server.service.files.open == 0)
    if body is None:
        codes = {400: "invalid_request", 412: "precondition_failed", 416: "range_not_satisfiable"}
        assert found["code"] == codes[status]
        if status == 412:
            assert found["details"]["digest"] == DIGEST
        return
    assert found == body
    assert answer["etag"] == ETAG
    assert (answer["content-range"] is not None) is (status == 206)
    if status != 304:
        assert answer["accept-ranges"] == "bytes"
        assert answer["content-length"] == str(len(body))
        assert answer["content-disposition"] == "attachment"
    else:
        assert answer["content-length"] is None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Range": "bytes=2-4"}, 200),  # RFC 9110, 14.2: ranges are of GET
        ({"Range": "bytes=99-"}, 200),
        ({"If-None-Match": ETAG}, 304),
        ({"If-Match": OTHER}, 412),
        ({"If-Match": DIGEST}, 400),
    ],
)
def test_the_head_of_a_file_is_that_of_all_of_it(server: Any, headers: dict[str, str], status: int) -> None:
    got, found, answer = server.ask("HEAD", FILE, headers=headers)
    until(lambda: server.service.files.open == 0)
    assert (got, found) == (status, b"")
    if status == 200:
        whole = server.ask("GET", FILE)[2]
        for name in ("content-length", "etag", "accept-ranges", "content-disposition", "content-type"):
            assert answer[name] == whole[name]
        assert answer["content-range"] is None


def test_a_connection_goes_on_after_an_answer_without_a_body(server: Any) -> None:
    connection = server.connect()
    for headers, status, body in (
        ({"If-None-Match": ETAG}, 304, b""),
        ({"Range": "bytes=1-2"}, 206, b"12"),
        ({"If-None-Match": "*"}, 304, b""),
        ({}, 200, CONTENT),
    ):
        connection.request("GET", FILE, headers=headers)
        response = connection.getresponse()
        assert (response.status, response.read()) == (status, body)
    connection.close()


def test_what_cannot_be_read_is_told_before_the_head(server: Any) -> None:
    for headers in ({}, {"Range": "bytes=1-2"}):
        status, problem, _ = server.ask("GET", "/v1/sessions/s/files/broken", headers=headers)
        assert (status, problem["code"]) == (500, "host")
    until(lambda: server.service.files.open == 0)


def test_artifacts_and_streams_are_got_on_conditions_too(server: Any) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["true"]})
    target = "/v1/invocations/call-0/artifacts/out/a%20b%25FF"
    _, data, answer = server.ask("GET", target)
    assert data == b"12345678"
    assert server.ask("GET", target, headers={"If-None-Match": answer["etag"]})[0] == 304
    assert server.ask("GET", target, headers={"If-Match": OTHER})[0] == 412
    assert server.ask("GET", target, headers={"If-Match": answer["etag"], "Range": "bytes=-2"})[:2] == (
        206, b"78",
    )  # fmt: skip
    stream = "/v1/invocations/call-0/stdout"
    assert server.ask("GET", stream, headers={"If-Match": OTHER})[0] == 412


@pytest.mark.parametrize("header", ["", "Range: bytes=1-2\r\n"])
def test_nobody_reads_on_for_a_peer_that_has_gone(server: Any, header: str) -> None:
    """What comes before the first byte may take long, and whoever asks for it need not wait."""
    server.ask("POST", "/v1/invocations", {"argv": ["true"]})
    with server.raw() as sock:
        target = "/v1/invocations/call-0/artifacts/out/slow"
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
        time.sleep(0.2)
        assert server.service.closed_streams == 0
    until(lambda: server.service.closed_streams == 1)


@pytest.mark.parametrize(("method", "query"), [("PUT", ""), ("PUT", "?directory=1"), ("DELETE", "")])
def test_conditions_of_changes(server: Any, method: str, query: str) -> None:
    target = FILE + query
    for headers, condition in (
        ({}, Condition()),
        ({"If-Match": "*"}, Condition(match="*")),
        ({"If-None-Match": "*"}, Condition(unlike="*")),
        ({"If-Match": f"{ETAG} , {OTHER}"}, Condition(match=frozenset({DIGEST, OTHER.strip('"')}))),
        ({"If-Match": f"W/{ETAG}"}, Condition(match=frozenset())),
        ({"If-Match": f"W/{ETAG},{OTHER}"}, Condition(match=frozenset({OTHER.strip('"')}))),
        ({"If-None-Match": f"W/{ETAG}", "If-Match": '"x"'}, Condition(frozenset("x"), frozenset({DIGEST}))),
    ):
        server.ask(method, target, b"x" if method == "PUT" else None, headers)
        assert server.service.files.conditions[-1] == condition
    count = len(server.service.files.conditions)
    for name in ("If-Match", "If-None-Match"):
        for text in (
            "x",
            '"x',
            'x"',
            "W/x",
            'w/"x"',
            '"a" "b"',
            "*,*",
            f"*, {ETAG}",
            '"a b"',
            ",",
            "",
            '"a"b',
        ):
            status, problem, _ = server.ask(method, target, b"x" if method == "PUT" else None, {name: text})
            assert (status, problem["code"], problem["details"]["field"]) == (400, "invalid_request", name), (
                text
            )
            assert name in problem["detail"]
    assert len(server.service.files.conditions) == count


def test_an_import_stands_on_a_checkpoint(server: Any) -> None:
    target = "/v1/sessions/s/import"
    for headers, match in (
        ({}, None),
        ({"If-Match": "*"}, None),
        ({"If-Match": ETAG}, frozenset({DIGEST})),
        ({"If-Match": f"W/{ETAG}"}, frozenset()),
    ):
        server.ask("POST", target, b"", headers)
        assert server.service.files.matches[-1] == match
    status, problem, _ = server.ask("POST", target, b"", {"If-None-Match": "*"})
    assert (status, problem["details"]["field"]) == (400, "If-None-Match")


TAGS = st.tuples(
    st.booleans(), st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters='"\x7f'))
).filter(lambda one: not any(0x7F <= ord(c) < 0xA0 for c in one[1]))
SPACE = st.sampled_from(["", " ", "\t", "  "])


@given(st.lists(TAGS, min_size=1), st.data())
def test_lists_are_read_as_they_are_written(tags: Sequence[tuple[bool, str]], data: st.DataObject) -> None:
    """Over several lines, with empty elements and blanks, as RFC 9110, 5.6.1.2, has a recipient take them."""
    lines: list[list[str]] = [[]]
    for weak, tag in tags:
        if data.draw(st.booleans()):
            lines.append([])
        before, after = data.draw(SPACE), data.draw(SPACE)
        lines[-1] += data.draw(st.lists(SPACE, max_size=2))
        lines[-1].append(f'{before}{"W/" if weak else ""}"{tag}"{after}')
    headers = [",".join(line) for line in lines]
    for name in ("If-Match", "If-None-Match"):
        found = condition_of(asking(*((name, text) for text in headers)))
        expected = frozenset(tag for weak, tag in tags if name == "If-None-Match" or not weak)
        assert (found.match if name == "If-Match" else found.unlike) == expected


@given(st.text(st.characters(max_codepoint=0xFF), max_size=40))
def test_whatever_comes_is_a_list_or_refused(text: str) -> None:
    found = None
    with contextlib.suppress(errors.InvalidRequest):
        found = condition_of(asking(("If-None-Match", text)))
    assert found is None or found.unlike


def test_long_lists_take_no_longer_than_they_are() -> None:
    for text in (
        '"' + " " * 60_000,
        " " * 60_000 + "x",
        ',"' * 30_001,
        '"a",' * 16_000 + "x",
        "\t,\t" * 20_000,
    ):
        with pytest.raises(errors.InvalidRequest):
            condition_of(asking(("If-Match", text)))


def test_a_content_that_still_grows_has_no_tag() -> None:
    assert not is_unchanged(asking(("If-None-Match", ETAG)), None)
    assert is_unchanged(asking(("If-None-Match", "*")), None)
    assert not is_unchanged(asking(("If-Match", "*")), None)
    with pytest.raises(errors.PreconditionFailed, match="no digest yet"):
        is_unchanged(asking(("If-Match", ETAG)), None)
