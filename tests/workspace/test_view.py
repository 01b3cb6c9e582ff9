"""A view shows what the kernel shows of the same layers."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from layered import HISTORIES, PATHS, Stacked, shown, shown_by_kernel, viewed

from sandboxd import errors
from sandboxd.digests import Digests
from sandboxd.workspace.tree import remove_tree
from sandboxd.workspace.view import OPAQUE, Lent, View

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.kernel.rights import Rights


@given(HISTORIES)
def test_shows_what_the_kernel_shows(histories: list[list[tuple[str, bytes, bytes]]]) -> None:
    with tempfile.TemporaryDirectory(prefix="sandboxd-view") as place:
        stacked = Stacked(Path(place))
        for operations in histories:
            stacked.turn(operations)
        assert viewed(stacked.layers) == shown(stacked.layers)


@given(HISTORIES, PATHS)
def test_finds_what_a_walk_comes_to(histories: list[list[tuple[str, bytes, bytes]]], other: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="sandboxd-view") as place:
        stacked = Stacked(Path(place))
        for operations in histories:
            stacked.turn(operations)
        with View(stacked.layers) as view:
            walked = {entry.path: entry for entry in view.walk()}
            assert {path: view.find(path) for path in walked} == walked
            assert view.find(other) == walked.get(other)


def test_a_walk_is_in_the_order_of_names(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", path, b"") for path in (b"b/2", b"b.txt", b"a", b"b/1/x", b"\xff")])
    with View(stacked.layers) as view:
        paths = [entry.path for entry in view.walk()]
    assert paths == [b"a", b"b", b"b/1", b"b/1/x", b"b/2", b"b.txt", b"\xff"]


def test_parts_of_a_file(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"f", data)])
    with View(stacked.layers) as view:
        entry = view.find(b"f")
        assert entry is not None
        for start, length in ((0, 0), (0, 1), (1 << 20, 2 << 20), (5, len(data) - 5), (len(data) - 1, 1)):
            assert b"".join(view.content(entry, start, length)) == data[start : start + length]
        assert b"".join(view.content(entry, 7)) == data[7:]
        with pytest.raises(errors.HostFailed, match="lost its end"):
            list(view.content(entry, 1, len(data)))


def test_digests_of_large_files_are_known_but_not_of_those_that_are_lent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3 << 20)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"f", data), ("write", b"small", data[:9])])
    (tmp_path / "lent").mkdir()
    (tmp_path / "lent" / "g").write_bytes(data)
    root = os.open(tmp_path / "lent", os.O_PATH | os.O_DIRECTORY)
    read, pread = [0], os.pread

    def counting(fd: int, size: int, at: int) -> bytes:
        read[0] += len(found := pread(fd, size, at))
        return found

    monkeypatch.setattr(os, "pread", counting)
    known = Digests()
    lent = Lent(root, cast("Rights", Anybody()))

    def digested(path: bytes) -> tuple[str, int]:
        read[0] = 0
        with View([*stacked.layers, lent], digests=known) as view:
            entry = view.find(path)
            assert entry is not None
            return view.digest(entry), read[0]

    try:
        assert [digested(b"f") for _ in range(3)] == [(digest, len(data)), (digest, 0), (digest, 0)]
        assert [digested(b"g") for _ in range(2)] == [(digest, len(data))] * 2
        assert [digested(b"small")[1] for _ in range(2)] == [9, 9]
        file = stacked.layers[0] / "f"
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert digested(b"f")[0] != digest
        file.write_bytes(data)
        assert digested(b"f") == (digest, len(data))
    finally:
        os.close(root)


class Anybody:
    """Rights to all."""

    @contextmanager
    def held(self) -> Iterator[None]:
        yield


def test_marks_that_only_a_crafted_layer_has(tmp_path: Path) -> None:
    """Whiteouts over nothing, in an opaque directory, below a file; an opaque root and an opaque bottom."""
    bottom, middle, top = (tmp_path / name for name in ("bottom", "middle", "top"))
    for layer in (bottom, middle, top):
        (layer / "d" / "e").mkdir(parents=True)
        (layer / "d" / layer.name).write_text(layer.name)
        os.setxattr(layer, OPAQUE, b"y")
    os.setxattr(bottom / "d", OPAQUE, b"y")
    os.setxattr(middle / "d" / "e", OPAQUE, b"y")
    os.setxattr(top / "d" / "e", OPAQUE, b"n")
    (bottom / "d" / "e" / "hidden").touch()
    (middle / "d" / "e" / "seen").touch()
    os.mknod(top / "gone", stat.S_IFCHR, 0)
    os.mknod(middle / "d" / "e" / "nothing", stat.S_IFCHR, 0)
    (bottom / "was-file").touch()
    os.mknod(middle / "was-file", stat.S_IFCHR, 0)
    (top / "was-file").mkdir()
    (bottom / "mixed").mkdir()
    (bottom / "mixed" / "x").touch()
    (middle / "mixed").touch()
    (top / "mixed").mkdir()
    layers = [top, middle, bottom]
    assert viewed(layers) == shown(layers)
    assert b"d/e/seen" in viewed(layers)
    assert b"d/bottom" in viewed(layers)


def test_content_and_digest(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn(
        [("write", b"f", b"old"), ("symlink", b"l", b"f"), ("fifo", b"p", b""), ("mkdir", b"d", b"\1")]
    )
    stacked.turn([("write", b"f", b"newer")])
    with View(stacked.layers) as view:
        entry = view.find(b"f")
        assert entry is not None
        assert view.digest(entry) == f"sha256:{hashlib.sha256(b'newer').hexdigest()}"
        with pytest.raises(errors.TooLarge) as error:
            view.digest(entry, most=4)
        assert error.value.details["limit"] == 4
        for path in (b"l", b"p", b"d"):
            other = view.find(path)
            assert other is not None
            with pytest.raises(errors.StateConflict, match=r"is no file"):
                view.digest(other)
        assert view.find(b"f/below") is None
        assert view.find(b"l/below") is None
        for bad in (b"/f", b"../f", b"d/../f", b"./f", b"f/", b"a\0b", b"x" * 256, b"y/" * 2048):
            with pytest.raises(errors.InvalidRequest):
                view.find(bad)


def test_no_link_is_followed_out_of_a_layer(tmp_path: Path) -> None:
    """A directory of the lower layer that is a link in the upper one, and the other way round."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    lower.mkdir()
    upper.mkdir()
    (lower / "a").symlink_to(tmp_path / "secret")
    (upper / "a").mkdir()
    (upper / "b").symlink_to(tmp_path / "secret")
    (lower / "b").mkdir()
    (lower / "b" / "mine").touch()
    with View([upper, lower]) as view:
        assert view.find(b"a/key") is None
        assert view.find(b"b/key") is None
        assert [entry.path for entry in view.walk()] == [b"a", b"b"]
    assert viewed([upper, lower]) == shown([upper, lower])


def test_deeper_than_a_path_can_say(tmp_path: Path) -> None:
    """A tree of 3,000 levels, 40 times longer than PATH_MAX is, in two layers."""
    name, levels = b"a-name-of-fifty-bytes-".ljust(50, b"x"), 3000
    stacked = Stacked(tmp_path / "stack")
    for number in range(2):
        with stacked.change() as root:
            here = os.open(".", os.O_RDONLY, dir_fd=root)
            for _ in range(levels):
                if number == 0:
                    os.mkdir(name, dir_fd=here)
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
                os.close(here)
                here = below
            os.close(os.open(b"file%d" % number, os.O_CREAT | os.O_WRONLY, dir_fd=here))
            os.close(here)
    with View(stacked.layers) as view:
        entries = list(view.walk())
        assert len(entries) == levels + 2
        deepest = entries[-1]
        assert deepest.name == b"file1"
        assert view.digest(deepest).startswith("sha256:e3b0c442")
    parent = os.open(tmp_path, os.O_RDONLY)
    remove_tree(parent, b"stack")
    remove_tree(parent, b"stack")
    os.close(parent)
    assert not (tmp_path / "stack").exists()


def test_a_stack_of_nothing() -> None:
    with View([]) as view:
        assert list(view.walk()) == []
        assert view.find(b"a") is None


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.HostFailed, match="layer gone"), View([tmp_path / "gone"]):
        pass


def test_the_comparison_sees_differences(tmp_path: Path) -> None:
    """What the other tests compare is not empty, and differs where files do."""
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"d/f", b"1")])
    before = viewed(stacked.layers)
    stacked.turn([("write", b"d/f", b"2")])
    with stacked.change() as root:
        assert shown_by_kernel(root) == viewed(stacked.layers) != before
