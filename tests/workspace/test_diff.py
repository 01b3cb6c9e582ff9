"""What differs between two stacks, against what the kernel shows of both."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from layered import HISTORIES, Shown, Stacked, shown

from sandboxd.workspace.diff import Change, compare
from sandboxd.workspace.textdiff import MAX_TEXT, text_diff
from sandboxd.workspace.view import View

Histories = list[list[tuple[str, bytes, bytes]]]


def differences(old: list[Path], new: list[Path]) -> list[Change]:
    with View(old) as before, View(new) as after:
        return list(compare(before, after))


def expected(old: Shown, new: Shown) -> dict[bytes, str]:
    found = {}
    for path in old.keys() | new.keys():
        if path not in new:
            found[path] = "removed"
        elif path not in old:
            found[path] = "added"
        elif old[path] != new[path]:
            found[path] = "changed"
    return found


@given(HISTORIES, HISTORIES)
def test_says_what_the_kernel_shows_as_different(first: Histories, second: Histories) -> None:
    """Between all stacks of one line, and to one of another line that stands on the same base."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-diff") as place:
        line = Stacked(Path(place) / "line")
        line.turn(first[0])
        fork = Stacked(Path(place) / "fork", list(line.layers))
        stacks = [list(line.layers)]
        for one, operations in [(line, turn) for turn in first[1:]] + [(fork, turn) for turn in second]:
            one.turn(operations)
            stacks.append(list(one.layers))
        seen = [shown(layers) for layers in stacks]
        for old, before in zip(stacks, seen, strict=True):
            for new, after in zip(stacks, seen, strict=True):
                changes = differences(old, new)
                assert {one.path: one.change for one in changes} == expected(before, after)
                paths = [one.path.split(b"/") if one.path else [] for one in changes]
                assert paths == sorted(paths)


def test_aspects(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn(
        [("write", path, b"1") for path in (b"content", b"mode", b"owner", b"kind", b"same", b"size")]
    )
    stacked.turn([("symlink", b"link", b"here"), ("write", b"gone/below", b"xy"), ("mkdir", b"dir", b"\1")])
    before = list(stacked.layers)
    stacked.turn([("write", b"content", b"2"), ("chmod", b"mode", b"\2"), ("chown", b"owner", b"")])
    stacked.turn([("remove", b"kind", b""), ("mkdir", b"kind", b"\1"), ("write", b"same", b"1")])
    stacked.turn([("remove", b"link", b""), ("symlink", b"link", b"there"), ("remove", b"gone", b"")])
    stacked.turn([("write", b"size", b"longer"), ("chmod", b"dir", b"\2"), ("write", b"new", b"abc")])
    changes = {one.path: one for one in differences(before, stacked.layers)}
    assert {path: one.aspects for path, one in changes.items()} == {
        b"content": ("content",),
        b"mode": ("mode",),
        b"owner": ("owner",),
        b"kind": ("kind",),
        b"link": ("target",),
        b"gone": (),
        b"gone/below": (),
        b"size": ("content",),
        b"dir": ("mode",),
        b"new": (),
    }
    new = changes[b"new"].new
    assert new is not None
    assert new.size == 3


def test_a_shared_layer_is_not_read(tmp_path: Path) -> None:
    """What both stacks have below is not opened: it could not be."""
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"shared/%d/f" % number, b"x") for number in range(50)])
    before = list(stacked.layers)
    stacked.turn([("write", b"shared/7/g", b"y")])
    for number in range(50):
        if number != 7:
            shutil.rmtree(stacked.layers[1] / "shared" / str(number))  # as if it were never looked at
    (stacked.layers[1] / "shared" / "0").touch()
    assert [one.path for one in differences(before, stacked.layers)] == [b"shared/7/g"]


def test_a_sparse_file_is_compared_without_reading_its_holes(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    huge = 1 << 43  # it would take hours
    for number in range(2):
        with stacked.change() as root:
            fd = os.open("huge", os.O_RDWR | os.O_CREAT, dir_fd=root)
            os.ftruncate(fd, huge)
            os.pwrite(fd, b"data", huge // 2)
            os.close(fd)
            os.chmod("huge", 0o600 + number, dir_fd=root)
    (copied,) = differences(stacked.layers[1:], stacked.layers)
    assert copied.aspects == ("mode",)


LINES = st.lists(
    st.sampled_from(["a\n", "b\n", "c\n", "d e\n", "\n", "-x\n", "\\ y\n", "é\r\n"]), max_size=30
)
ENDS = st.sampled_from(["", "", "end", "a"])


@given(LINES, ENDS, LINES, ENDS)
@example(["a\n"] * 5, "", [], "")
def test_patch_makes_the_new_text_of_the_old(
    old: list[str], old_end: str, new: list[str], new_end: str
) -> None:
    left, right = "".join(old) + old_end, "".join(new) + new_end
    diff = text_diff(b"f", left.encode(), right.encode(), most=1 << 20)
    assert diff.omitted is None
    assert bool(diff.text) == (left != right)
    if left == right:
        return
    with tempfile.TemporaryDirectory(prefix="sandboxd-diff") as place:
        file = Path(place) / "f"
        file.write_bytes(left.encode())
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        subprocess.run(command, input=diff.text.encode(), cwd=place, check=True)
        assert (file.read_bytes() if file.exists() else b"") == right.encode()


def test_a_small_change_in_a_large_text_is_a_small_diff() -> None:
    lines = [f"line {number}\n" for number in range(20_000)]
    changed = list(lines)
    for number in (3, 9_000, 19_998):
        changed[number] = "changed\n"
    diff = text_diff(b"f", "".join(lines).encode(), "".join(changed).encode())
    assert diff.omitted is None
    assert diff.text.count("\n@@") == 3
    assert diff.text.count("\n+") == 1 + 3


def test_texts_made_to_be_slow_are_bounded() -> None:
    old = "".join(f"{number % 7}\n" for number in range(200_000)).encode()
    new = "".join(f"{number * number % 11}\n" for number in range(200_000)).encode()
    diff = text_diff(b"f", old, new)
    assert diff.omitted == "truncated"
    assert len(diff.text.encode()) <= 64 << 10
    assert diff.text.startswith("--- a/f\n+++ b/f\n@@ -1")


def test_what_is_no_text_or_too_long_is_said_so() -> None:
    assert text_diff(b"f", b"a\0b", b"c").omitted == "binary"
    assert text_diff(b"f", b"a", b"\xff\xfe").omitted == "binary"
    assert text_diff(b"f", b"a", b"b" * (MAX_TEXT + 1)).omitted == "too_large"


def test_names_in_the_head_are_those_of_git() -> None:
    assert (
        text_diff(b"caf\xc3\xa9 x", None, b"1\n").text == "--- /dev/null\n+++ b/café x\n@@ -0,0 +1 @@\n+1\n"
    )
    assert (
        text_diff(b"a\nb\xff", b"1\n", None).text
        == '--- "a/a\\012b\\377"\n+++ /dev/null\n@@ -1 +0,0 @@\n-1\n'
    )
