"""The pure half of the clients."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import errors
from sandboxd.client import location, wire

ID = "01930000-0000-7000-8000-0123456789ab"


@given(st.lists(st.binary(max_size=20)), st.randoms())
def test_lines_do_not_depend_on_how_bytes_arrive(lines: list[bytes], random: object) -> None:
    wanted = [line for line in b"\n".join(lines).split(b"\n") if line.strip()]
    data = b"\n".join([*lines, b""])
    cut = wire.Lines()
    found: list[bytes] = []
    while data:
        size = random.randint(1, len(data))  # type: ignore[attr-defined]
        found += cut.feed(data[:size])
        data = data[size:]
    cut.finish()
    assert found == wanted


def test_an_unfinished_line_is_a_cut_stream() -> None:
    lines = wire.Lines()
    assert list(lines.feed(b'{"a": 1}\n{"b"')) == [b'{"a": 1}']
    with pytest.raises(errors.Unavailable):
        lines.finish()


def test_a_line_without_end_is_not_collected_for_ever() -> None:
    lines = wire.Lines()
    block = b"x" * 2**22
    for _ in range(wire.MAX_DOCUMENT // len(block)):
        assert list(lines.feed(block)) == []
    with pytest.raises(errors.Unavailable, match="does not speak"):
        list(lines.feed(block))


@given(st.text(), st.integers(200, 599), st.binary(max_size=300))
def test_any_answer_becomes_an_error_of_ours(kind: str, status: int, body: bytes) -> None:
    for content_type in (kind, "application/problem+json; charset=utf-8"):
        assert isinstance(wire.error_of(status, content_type, body), errors.SandboxdError)


def test_a_deep_document_is_no_crash() -> None:
    found = wire.error_of(400, "application/problem+json", b"[" * 1_000_000)
    assert isinstance(found, errors.Unavailable)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_targets_are_one_line_of_ascii(path: str) -> None:
    target = wire.artifact_target(ID, path)
    assert target.isascii()
    assert not set(target) & set(" \r\n?#\t\0")


def test_candidates() -> None:
    environ = {"SANDBOXD_SOCKET": "/a", "XDG_RUNTIME_DIR": "/run/user/1"}
    assert location.candidates("/b", environ) == ("/b",)
    assert location.candidates(None, environ) == ("/a",)
    del environ["SANDBOXD_SOCKET"]
    assert location.candidates(None, environ) == (
        location.SYSTEM_SOCKET,
        "/run/user/1/sandboxd/sandboxd.sock",
    )
    assert location.candidates(None, {}) == (location.SYSTEM_SOCKET,)


def test_the_socket_that_is_there_is_the_one_that_is_spoken_of() -> None:
    absent, refused = FileNotFoundError(2, "x"), ConnectionRefusedError(111, "x")
    assert location.unavailable([("/a", absent), ("/b", refused)]).details["reason"] == "refused"
    both = location.unavailable([("/a", absent), ("/b", absent)])
    assert "/a or /b" in str(both)
    assert both.details["tried"] == ["/a", "/b"]
