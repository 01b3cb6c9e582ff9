"""Single changes from outside, as layers over a session's."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layered import HISTORIES, PATHS, Stacked, shown, viewed

from sandboxd import errors
from sandboxd.workspace import edit
from sandboxd.workspace.edit import Condition
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    from collections.abc import Callable

OWNER = (1000, 1001)
MOST = 1 << 20


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def change(stacked: Stacked, how: Callable[[View, int], object]) -> object:
    """Make a layer by a change and put it on the stack."""
    into = stacked.directory / f"edit{len(stacked.layers)}"
    into.mkdir(exist_ok=True)
    fd = os.open(into, os.O_RDONLY)
    try:
        with View(stacked.layers) as view:
            result = how(view, fd)
    finally:
        os.close(fd)
    stacked.layers.insert(0, into)
    return result


@given(HISTORIES, PATHS, st.sampled_from(["put", "mkdir", "remove", "remove all"]))
def test_a_change_is_what_a_program_would_do(
    histories: list[list[tuple[str, bytes, bytes]]], path: bytes, what: str
) -> None:
    """The same change, once made by a program in a mounted overlay: both are seen, or both refused."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-edit") as place:
        stacked = Stacked(Path(place))
        for operations in histories:
            stacked.turn(operations)
        before = shown(stacked.layers)
        kind = before.get(path, ("nothing",))[0]
        beneath = [one for one in before if one.startswith(path + b"/")]
        parents = [path[:at] for at in range(len(path)) if path[at : at + 1] == b"/"]
        way = all(before.get(one, ("directory",))[0] == "directory" for one in parents)
        expected = dict(before)
        if what in {"put", "mkdir"}:
            fits = way and kind in ({"file", "nothing"} if what == "put" else {"nothing"})
            for one in parents:
                expected.setdefault(one, ("directory", 0o755, *OWNER))
            old = before.get(path)
            if what == "mkdir":
                expected[path] = ("directory", 0o755, *OWNER)
            else:
                expected[path] = ("file", *(old[1:4] if old else (0o644, *OWNER)), b"new")
        else:
            fits = way and kind != "nothing" and (what == "remove all" or not beneath)
            for one in [path, *beneath]:
                expected.pop(one, None)
        with contextlib.suppress(errors.StateConflict, errors.NotFound):
            match what:
                case "put":
                    change(
                        stacked, lambda v, fd: edit.put(v, fd, path, [b"ne", b"w"], owner=OWNER, most=MOST)
                    )
                case "mkdir":
                    change(stacked, lambda v, fd: edit.make_directory(v, fd, path, owner=OWNER))
                case _:
                    whole = what == "remove all"
                    change(stacked, lambda v, fd: edit.remove(v, fd, path, recursive=whole))
            assert fits
            before = expected
        assert shown(stacked.layers) == viewed(stacked.layers) == before
        assert fits == (before is expected)


def test_conditional_writes(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"f", b"old"), ("mkdir", b"d", b"\1"), ("symlink", b"l", b"f")])
    old, new, other = (frozenset({digest(data)}) for data in (b"old", b"new", b"other"))

    def put(path: bytes, data: bytes, condition: Condition) -> object:
        return change(
            stacked, lambda v, fd: edit.put(v, fd, path, [data], owner=OWNER, most=MOST, condition=condition)
        )

    def remove(path: bytes, condition: Condition) -> None:
        change(stacked, lambda v, fd: edit.remove(v, fd, path, recursive=True, condition=condition))

    for path, condition, found in (
        (b"f", Condition(match=other), digest(b"old")),
        (b"f", Condition(match=other | new), digest(b"old")),
        (b"f", Condition(match=frozenset()), digest(b"old")),
        (b"f", Condition(unlike="*"), digest(b"old")),
        (b"f", Condition(unlike=other | old), digest(b"old")),
        (b"f", Condition(match="*", unlike="*"), digest(b"old")),
        (b"f", Condition(match=old, unlike="*"), digest(b"old")),
        (b"f", Condition(match="*", unlike=old), digest(b"old")),
        (b"new", Condition(match=old), None),
        (b"new", Condition(match="*"), None),
        (b"new", Condition(match="*", unlike=other), None),
        (b"d", Condition(match=old), None),
        (b"d", Condition(unlike="*"), None),
        (b"l", Condition(unlike="*"), None),
        (b"l", Condition(match=old), None),
        (b"f/beneath", Condition(match="*"), None),
    ):
        with pytest.raises(errors.PreconditionFailed) as error:
            put(path, b"x", condition)
        assert (error.value.details["digest"], error.value.status) == (found, 412)
        with pytest.raises(errors.PreconditionFailed) as error:
            remove(path, condition)
        assert error.value.details["digest"] == found
    assert put(b"f", b"new", Condition(match=other | old)) == edit.Written(digest(b"new"), 3, created=False)
    assert put(b"f", b"new", Condition(match="*", unlike=old)) == edit.Written(
        digest(b"new"), 3, created=False
    )
    assert put(b"g", b"", Condition(unlike="*")) == edit.Written(digest(b""), 0, created=True)
    assert put(b"h", b"", Condition(unlike=old)) == edit.Written(digest(b""), 0, created=True)
    assert shown(stacked.layers)[b"f"][-1] == b"new"
    for path, condition in (
        (b"d", Condition(match="*")),  # whatever it is
        (b"l", Condition(unlike=old)),  # what is no file has no digest
        (b"f", Condition(match=new)),
    ):
        remove(path, condition)
        assert path not in shown(stacked.layers)
    for path, condition, fits in (
        (b"e", Condition(match="*"), False),
        (b"h", Condition(unlike="*"), False),
        (b"e", Condition(unlike="*"), True),
    ):
        make = partial(edit.make_directory, path=path, owner=OWNER, condition=condition)
        with contextlib.nullcontext() if fits else pytest.raises(errors.PreconditionFailed):
            change(stacked, make)
    assert b"e" in shown(stacked.layers)
    with pytest.raises(errors.NotFound):
        remove(b"f", Condition(unlike=new))


def test_a_condition_that_fails_says_what_was_wanted(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"f", b"old")])
    many = frozenset(f"sha256:{number:064d}" for number in range(9))
    for condition, words in (
        (Condition(match=frozenset({"a"})), f"'f' should be a and is {digest(b'old')}"),
        (Condition(match=many), " or 6 others and is "),
        (Condition(match=frozenset()), "weak"),
        (Condition(unlike=frozenset({digest(b"old")})), "'f' should not be sha256:"),
        (Condition(unlike="*"), "'f' is there, as a file"),
    ):
        with View(stacked.layers) as view, pytest.raises(errors.PreconditionFailed) as error:
            condition.check(view, b"f", view.find(b"f"))
        assert words in str(error.value)
        assert len(str(error.value)) < 500
    with View(stacked.layers) as view, pytest.raises(errors.PreconditionFailed, match="'g' is not there"):
        Condition(match="*").check(view, b"g", None)


def test_modes(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"f", b"1"), ("chmod", b"f", b"\2"), ("chown", b"f", b"")])
    with stacked.change() as root:
        os.chmod("f", 0o4755, dir_fd=root)
    for mode, expected in ((None, 0o755), (0o600, 0o600), (0o6777, 0o777)):
        how = partial(edit.put, path=b"f", chunks=[b"2"], owner=(5, 5), most=MOST, mode=mode)
        change(stacked, how)
        assert shown(stacked.layers)[b"f"] == ("file", expected, 1000, 1001, b"2")


def test_bounds_and_bad_paths(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("symlink", b"out", b"/etc"), ("fifo", b"p", b"")])
    before = shown(stacked.layers)

    def put(path: bytes, chunks: list[bytes]) -> object:
        return change(stacked, lambda v, fd: edit.put(v, fd, path, chunks, owner=OWNER, most=4))

    with pytest.raises(errors.TooLarge) as error:
        put(b"f", [b"123", b"45"])
    assert error.value.details["limit"] == 4
    for path in (
        b"",
        b"/etc/passwd",
        b"../f",
        b"a//b",
        b"a/./b",
        b"f/",
        b"a\0",
        b"x" * 256,
        b"d/" * 2047 + b"long",
    ):
        with pytest.raises(errors.InvalidRequest):
            put(path, [])
    for path in (b"out/passwd", b"out", b"p", b"p/f"):
        with pytest.raises(errors.StateConflict):
            put(path, [])
    assert shown(stacked.layers) == before


def test_a_whiteout_is_all_that_a_removal_leaves(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"d/e/f", b"1")])
    change(stacked, lambda v, fd: edit.remove(v, fd, b"d/e", recursive=True))
    layer = stacked.layers[0]
    assert [path.name for path in (layer / "d").iterdir()] == ["e"]
    assert stat.S_ISCHR((layer / "d" / "e").lstat().st_mode)
