"""Layers that are merged show, alone or with those below them, exactly what they showed."""

# ruff: noqa: PTH208  -- directories are descriptors here

from __future__ import annotations

import os
import random
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.kernel import mounts
from sandboxd.workspace import layer
from sandboxd.workspace.merge import Merged, merge
from sandboxd.workspace.store import LayerStore
from sandboxd.workspace.tree import step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Shown = dict[str, tuple[int, int, bytes]]


class Line:
    """A line of layers, each what one change by overlayfs itself left."""

    def __init__(self, directory: Path) -> None:
        self.store = LayerStore(directory / "store")
        self.layers: list[Path] = []
        self.figures = layer.Figures("", 0, 0)
        """Of the newest merge."""
        self.made = Merged(0, 0, 0, 0)
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

    def merged(self, layers: Sequence[Path], below: Sequence[Path] = (), *, lent: bool = False) -> Path:
        """One layer of several."""

        def fill(into: int, scratch: int) -> layer.Figures:
            self.made = made = merge(layers, into, below=below, scratch=scratch, lent=lent)
            assert not os.listdir(scratch)
            return layer.Figures("", made.size, made.inodes)

        name, self.figures = self.store.add(fill)
        return self.store.path(name)

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
            fd = step(fd, name)
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
        fd = step(fd, f"directory-{number:010}")
    assert sorted(os.listdir(fd)) == ["leaf0", "leaf1", "leaf2"]
    os.close(fd)


def test_what_a_merged_layer_takes_for_itself_is_told(line: Line) -> None:
    """Its directories, and no file: those it shares with the layers that it was made of."""

    def first(root: Path) -> None:
        for number in range(5):
            (root / f"d{number}" / "below").mkdir(parents=True)
            (root / f"d{number}" / "file").write_bytes(b"x" * 100_000)

    def second(root: Path) -> None:
        (root / "d0" / "file").write_bytes(b"y" * 50_000)

    line.change(first)
    line.change(second)
    one = line.merged(line.layers)
    directories = [path for path in one.rglob("*") if path.is_dir()]
    assert len(directories) == line.made.own_inodes == 10
    assert line.made.own_size == 11 * layer.BLOCK  # the root too, which is no entry
    assert line.made.size > 450_000
    assert all(path.stat().st_nlink > 1 for path in one.rglob("file"))


@pytest.mark.parametrize("kind", ["file", "link", "fifo"])
def test_a_file_of_too_many_names_is_copied(line: Line, kind: str) -> None:
    """ext4 has room for 65,000 names of one file; a layer that has more than half as many is merged."""
    fd = os.open(line.store.path(line.store.add(lambda _, __: layer.Figures("", 0, 0))[0]), layer.DIRECTORY)
    try:
        if kind == "link":
            os.symlink("somewhere", "0", dir_fd=fd)
        elif kind == "fifo":
            os.mkfifo("0", dir_fd=fd)
        else:
            file = os.open("0", os.O_WRONLY | os.O_CREAT, 0o640, dir_fd=fd)
            os.pwrite(file, b"begin", 0)
            os.pwrite(file, b"end", 1 << 30)
            os.setxattr(file, "user.what", b"kept")
            os.close(file)
        for number in range(1, 40_000):
            os.link("0", str(number), src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
        line.layers.insert(0, Path(f"/proc/self/fd/{fd}").readlink())
    finally:
        os.close(fd)
    line.change(lambda root: (root / "new").touch())
    one = line.merged(line.layers)
    found = [one / str(number) for number in range(40_000)]
    assert len({entry.lstat().st_ino for entry in found}) in {1, 2}  # a file system may have no such limit
    assert line.figures.inodes <= 3
    assert line.figures.size < 8 << 20
    (before, after) = (line.layers[1] / "0").lstat(), found[-1].lstat()
    for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_blocks"):
        assert getattr(before, field) == getattr(after, field)
    if kind == "link":
        assert str(found[-1].readlink()) == "somewhere"
    elif kind == "file":
        assert os.getxattr(found[-1], "user.what") == b"kept"
        with found[-1].open("rb") as opened:
            assert opened.read(6) == b"begin\0"
            opened.seek(1 << 30)
            assert opened.read() == b"end"
    again = line.merged([one, line.layers[1]])
    assert len(os.listdir(again)) == 40_001


def test_what_hides_files_of_a_directory_that_changes_stays(line: Line, tmp_path: Path) -> None:
    """Layers are merged while the files that they hide are not there: they stay hidden when they are back."""
    lent, away = tmp_path / "lent", tmp_path / "away"
    (lent / "d" / "in").mkdir(parents=True)
    for name in ("x", "d/y", "d/in/z", "d/stays"):
        (lent / name).write_text(name)
    line.layers.append(lent)
    line.change(lambda root: (root / "d" / "y").unlink())
    line.change(lambda root: (root / "x").unlink())

    def again(root: Path) -> None:
        shutil.rmtree(root / "d" / "in")
        (root / "d" / "in").mkdir()
        (root / "d" / "temporary").touch()

    line.change(again)
    line.change(lambda root: (root / "d" / "temporary").unlink())
    expected = line.shown(line.layers)
    assert set(expected) == {"d", "d/in", "d/stays"}
    shutil.move(lent / "d", away)
    (lent / "x").rename(tmp_path / "x")
    one = line.merged(line.layers[:-1], lent=True)
    assert set(line.shown([one, lent])) == {"d", "d/in"}  # and no whiteout
    shutil.move(away, lent / "d")
    (tmp_path / "x").rename(lent / "x")
    shown = line.shown([one, lent])
    assert set(shown) == set(expected)
    (lent / "d" / "temporary").touch()
    assert set(line.shown([one, lent])) == set(expected)
    twice = line.merged([one, line.layers[-2]], lent=True)
    assert set(line.shown([twice, lent])) == set(expected)
