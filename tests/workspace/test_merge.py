"""Layers that are merged show, alone or with those below them, exactly what they showed."""

# ruff: noqa: PTH208  -- directories are descriptors here

from __future__ import annotations

import os
import random
import shutil
import stat
from typing import TYPE_CHECKING

import pytest

from sandboxd.kernel import mounts
from sandboxd.workspace import layer
from sandboxd.workspace.merge import merge
from sandboxd.workspace.store import LayerStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Shown = dict[str, tuple[int, int, bytes]]


class Line:
    """A line of layers, each what one change by overlayfs itself left."""

    def __init__(self, directory: Path) -> None:
        self.store = LayerStore(directory / "store")
        self.layers: list[Path] = []
        self._upper = directory / "tmpfs"
        self._merged = directory / "merged"
        self._upper.mkdir()
        self._merged.mkdir()

    def change(self, change: Callable[[Path], None]) -> None:
        """Make a layer of what ``change`` does to the files of all that there are."""
        tmpfs = mounts.new_mount("tmpfs", {"size": "64m", "mode": "0755"})
        mounts.attach(tmpfs, self._upper)
        os.close(tmpfs)
        try:
            upper, work = self._upper / "upper", self._upper / "work"
            upper.mkdir()
            work.mkdir()
            self._with_overlay(self.layers, lambda: change(self._merged), upper, work)
            fd = os.open(upper, layer.DIRECTORY)
            try:
                name, _ = self.store.take(fd, 0)
            finally:
                os.close(fd)
        finally:
            mounts.detach(self._upper)
        self.layers.insert(0, self.store.path(name))

    def shown(self, layers: Sequence[Path]) -> Shown:
        """All that layers show: kind and mode, time, and content, by path."""
        found: Shown = {}

        def look() -> None:
            for one in self._merged.rglob("*"):
                status = one.lstat()
                content = b""
                if stat.S_ISREG(status.st_mode):
                    content = one.read_bytes()
                elif one.is_symlink():
                    content = bytes(one.readlink())
                found[str(one.relative_to(self._merged))] = status.st_mode, status.st_mtime_ns, content

        self._with_overlay(layers, look)
        return found

    def merged(self, layers: Sequence[Path], below: Sequence[Path] = ()) -> Path:
        """One layer of several."""

        def fill(into: int, _: int) -> layer.Figures:
            size, inodes = merge(layers, into, below=below)
            return layer.Figures("", size, inodes)

        return self.store.path(self.store.add(fill)[0])

    def _with_overlay(
        self,
        layers: Sequence[Path],
        act: Callable[[], None],
        upper: Path | None = None,
        work: Path | None = None,
    ) -> None:
        options = {} if upper is None else {"upperdir": str(upper), "workdir": str(work)}
        lowers = [*map(str, layers), str(self.store.empty), *([] if upper else [str(self._upper)])]
        mount = mounts.new_overlay(lowers, options, self._merged)
        mounts.attach(mount, self._merged)
        os.close(mount)
        try:
            act()
        finally:
            mounts.detach(self._merged)


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def check(line: Line) -> None:
    """Merge every run of layers, and look at what all show then."""
    expected = line.shown(line.layers)
    count = len(line.layers)
    for first in range(count):
        for last in range(first + 2, count + 1):
            one = line.merged(line.layers[first:last], line.layers[last:])
            found = line.shown([*line.layers[:first], one, *line.layers[last:]])
            assert found == expected, f"layers {first} to {last} of {count}"
            if last == count:
                assert not any(layer.is_whiteout(entry.lstat()) for entry in one.rglob("*"))


def test_deleted_replaced_and_made_again(line: Line) -> None:
    def first(root: Path) -> None:
        for name in ("a/x", "a/y", "b/x", "c/d/e", "f"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        (root / "link").symlink_to("f")

    def second(root: Path) -> None:
        (root / "a" / "x").unlink()
        shutil.rmtree(root / "b")
        shutil.rmtree(root / "c")
        (root / "c").write_text("a file now")
        (root / "f").write_text("changed")

    def third(root: Path) -> None:
        (root / "b").mkdir()
        (root / "b" / "new").write_text("new")
        (root / "c").unlink()
        (root / "c").mkdir()
        (root / "c" / "g").write_text("g")
        (root / "link").unlink()
        (root / "a").chmod(0o700)

    def fourth(root: Path) -> None:
        shutil.rmtree(root / "a")
        (root / "b" / "new").unlink()
        (root / "f").unlink()
        (root / "f").mkdir()
        os.link(root / "c" / "g", root / "f" / "h")

    for change in (first, second, third, fourth):
        line.change(change)
    check(line)
    one = line.merged(line.layers)
    assert (one / "f" / "h").read_text() == "g"
    assert (one / "f" / "h").samefile(line.layers[0] / "f" / "h")


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_done(line: Line, seed: int) -> None:  # noqa: C901
    chance = random.Random(seed)
    names = ["a", "b", "c", "d"]

    def change(root: Path) -> None:
        for _ in range(12):
            at = root
            for _ in range(chance.randrange(3)):
                down = at / chance.choice(names)
                if down.is_symlink() or not down.is_dir():
                    break
                at = down
            one = at / chance.choice(names)
            there = one.is_symlink() or one.exists()
            match chance.randrange(5):
                case 0 if there and one.is_dir() and not one.is_symlink():
                    shutil.rmtree(one)
                case 1 if there and (one.is_symlink() or not one.is_dir()):
                    one.unlink()
                case 2 if not there:
                    one.mkdir()
                    (one / "in").write_text(str(chance.random()))
                case 3 if not there:
                    one.symlink_to(chance.choice(names))
                case _ if not one.is_symlink() and not one.is_dir():
                    one.write_text(str(chance.random()))

    for _ in range(5):
        line.change(change)
    check(line)


def test_a_deep_tree_and_few_descriptors(line: Line) -> None:
    def deep(root: Path) -> None:
        fd = os.open(root, layer.DIRECTORY)
        for number in range(300):
            name = f"directory-{number:010}"
            if name not in os.listdir(fd):
                os.mkdir(name, dir_fd=fd)
            fd = layer.step(fd, name)
        leaf = os.open(f"leaf{len(line.layers)}", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
        os.close(leaf)
        os.close(fd)

    for _ in range(3):
        line.change(deep)
    before = len(os.listdir("/proc/self/fd"))
    one = line.merged(line.layers)
    assert len(os.listdir("/proc/self/fd")) == before
    fd = os.open(one, layer.DIRECTORY)
    for number in range(300):
        fd = layer.step(fd, f"directory-{number:010}")
    assert sorted(os.listdir(fd)) == ["leaf0", "leaf1", "leaf2"]
    os.close(fd)
