"""Layers that share files with an earlier one: what they have is what was taken, whatever a tool has done."""

# ruff: noqa: PTH208  -- names as bytes, and descriptors

from __future__ import annotations

import mmap
import os
import random
import shutil
import stat
import struct
from typing import TYPE_CHECKING

import pytest
from layered import opened

from sandboxd import errors
from sandboxd.kernel import mounts
from sandboxd.workspace import layer, layershared
from sandboxd.workspace.store import LayerStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BASE = 1_000_000
WHEN = 1_700_000_000_123_456_789
SIZE = 3 * layershared.CHUNK + 5000
"""Of the large file: some runs, and a part of a block."""


def settle(root: Path, *, when: int = WHEN) -> None:
    """Everything is the container's 1000's, and no time says what was changed."""
    for directory, names, files in os.walk(root, topdown=False, followlinks=False):
        for one in (*(f"{directory}/{name}" for name in names + files), directory):
            if not layer.is_whiteout(os.lstat(one)):
                os.lchown(one, BASE + 1000, BASE + 1000)
                os.utime(one, ns=(1, when), follow_symlinks=False)


def make(upper: Path) -> None:
    chance = random.Random(1)
    (upper / "large").write_bytes(chance.randbytes(SIZE))
    (upper / "small").write_bytes(b"small")
    (upper / "empty").touch()
    with (upper / "holes").open("wb") as file:
        for at in (4096 * 3, 4096 * 400, 4096 * 900):
            file.seek(at)
            file.write(b"data")
        file.truncate(4096 * 1000 + 7)
    (upper / "sub" / "deep").mkdir(parents=True)
    (upper / "sub" / "deep" / "file").write_bytes(b"deep")
    (upper / "sub" / "file").write_bytes(b"in sub")
    os.setxattr(upper / "small", "user.colour", b"blue")
    settle(upper)


def take(store: LayerStore, upper: Path, earlier: Path | None = None) -> Path:
    """A layer, with all that has to be so of any."""
    before = len(os.listdir("/proc/self/fd"))
    with opened(upper) as fd:
        plain, expected = store.take(fd, BASE)
        name, figures = store.take(fd, BASE, None if earlier is None else earlier.name)
    assert figures == expected, "it counts, and its digest is, as if nothing were shared"
    with opened(store.path(name)) as fd:
        assert layer.measure(fd).digest == figures.digest
    store.remove(plain)
    assert not list(store._scratch.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before
    return store.path(name)


def shared(one: Path, other: Path) -> set[str]:
    """Files of a layer that are those of another."""
    return {
        str(file.relative_to(one))
        for file in one.rglob("*")
        if stat.S_ISREG(file.lstat().st_mode)
        and (there := other / file.relative_to(one)).exists()
        and there.lstat().st_ino == file.lstat().st_ino
    }


ALL = {"large", "small", "empty", "holes", "sub/deep/file", "sub/file"}


def test_what_has_not_changed_is_shared_and_takes_no_room(store: LayerStore, upper: Path) -> None:
    make(upper)
    first = take(store, upper)
    (upper / "new").write_bytes(b"new")
    (upper / "another" / "sub").mkdir(parents=True)  # before all others in the order of names
    (upper / "another" / "sub" / "file").write_bytes(b"deep in what the first has not")
    settle(upper)
    second = take(store, upper, first)
    assert shared(second, first) == ALL
    third = take(store, upper, second)
    assert shared(third, first) == ALL
    assert shared(third, second) == {*ALL, "new", "another/sub/file"}
    digest = measured(third)
    for one in (first, second):  # what goes leaves the others whole
        store.remove(one.name)
        assert not one.exists()
        assert measured(third) == digest
    assert (third / "large").stat().st_nlink == 1
    assert (third / "large").read_bytes() == (upper / "large").read_bytes()


def measured(path: Path) -> str:
    with opened(path) as fd:
        return layer.measure(fd).digest


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def mapped(path: Path) -> None:
    """Written through a mapping: tmpfs notes neither a time nor a change of it."""
    before = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[SIZE - 10] ^= 0xFF
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def emptied(path: Path) -> None:
    """A block of data becomes a hole."""
    content = path.read_bytes()
    with path.open("wb") as file:
        file.write(content[:4096])
        file.seek(8192)
        file.write(content[8192:])


def swapped(path: Path) -> None:
    """Other bytes of the same number in a file of another inode."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[::-1])


def access(path: Path, who: int) -> None:
    entries = [
        (1, 6, 2**32 - 1),
        (2, 4, BASE + who),
        (4, 4, 2**32 - 1),
        (16, 4, 2**32 - 1),
        (32, 0, 2**32 - 1),
    ]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
    os.setxattr(path, layer.ACLS[0], acl)


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "its first byte": ("large", lambda path: patch(path, 0, bytes([path.read_bytes()[0] ^ 1]))),
    "a byte of a later run": ("large", lambda path: patch(path, 2 * layershared.CHUNK + 9, b"\0")),
    "its last byte": ("large", lambda path: patch(path, SIZE - 1, bytes([path.read_bytes()[-1] ^ 1]))),
    "a mapped byte": ("large", mapped),
    "a block that is a hole now": ("large", emptied),
    "a block that is zeros now": ("large", lambda path: patch(path, 8192, bytes(4096))),
    "an end that is zeros now": ("large", lambda path: patch(path, SIZE - 5000, bytes(5000))),
    "another file": ("large", swapped),
    "a hole that has data now": ("holes", lambda path: patch(path, 4096 * 600, b"x")),
    "a hole at the beginning": ("holes", lambda path: patch(path, 0, b"x")),
    "a hole at the end": ("holes", lambda path: patch(path, 4096 * 1000 + 6, b"x")),
    "data that is a hole now": ("holes", lambda path: patch(path, 4096 * 400, bytes(4))),
    "the end that is cut off": ("holes", lambda path: os.truncate(path, 4096 * 1000)),
    "the end that is a hole": ("large", lambda path: os.truncate(path, SIZE + 4096)),
    "one that is not empty now": ("empty", lambda path: path.write_bytes(b"x")),
    "one that is empty now": ("small", lambda path: path.write_bytes(b"")),
    "a mode": ("small", lambda path: path.chmod(0o4711)),
    "a new attribute": ("large", lambda path: os.setxattr(path, "user.new", b"1")),
    "an attribute's value": ("small", lambda path: os.setxattr(path, "user.colour", b"red!")),
    "an attribute that is gone": ("small", lambda path: os.removexattr(path, "user.colour")),
    "an access list": ("large", lambda path: access(path, 7)),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_not_shared_whatever_its_times_say(
    store: LayerStore, upper: Path, what: str
) -> None:
    make(upper)
    first = take(store, upper)
    digest = measured(first)
    name, change = CHANGES[what]
    change(upper / name)
    settle(upper)
    second = take(store, upper, first)
    assert shared(second, first) == ALL - {name}
    assert (second / name).read_bytes() == (upper / name).read_bytes()
    assert measured(first) == digest != measured(second), "the earlier one is as it was"
    assert shared(take(store, upper, second), second) == ALL, "and the next one goes on from there"


@pytest.mark.parametrize("what", ["owner", "group", "time"])
def test_another_owner_or_time_is_not_shared(store: LayerStore, upper: Path, what: str) -> None:
    make(upper)
    first = take(store, upper)
    match what:
        case "owner":
            os.chown(upper / "large", BASE + 7, -1)
        case "group":
            os.chown(upper / "large", -1, BASE + 7)
        case _:
            os.utime(upper / "large", ns=(1, WHEN + 1))
    assert shared(take(store, upper, first), first) == ALL - {"large"}


def test_an_access_list_that_is_the_same_is_shared(store: LayerStore, upper: Path) -> None:
    make(upper)
    access(upper / "small", 7)
    settle(upper)
    first = take(store, upper)
    assert shared(take(store, upper, first), first) == ALL
    access(upper / "small", 8)
    settle(upper)
    assert shared(take(store, upper, first), first) == ALL - {"small"}


@pytest.mark.parametrize("kind", ["gone", "directory", "symlink", "fifo", "whiteout"])
def test_a_file_that_became_something_else_and_back(store: LayerStore, upper: Path, kind: str) -> None:
    make(upper)
    first = take(store, upper)
    content = (upper / "large").read_bytes()
    (upper / "large").unlink()
    match kind:
        case "directory":
            (upper / "large").mkdir()
            (upper / "large" / "file").write_bytes(b"in it")
        case "symlink":
            (upper / "large").symlink_to("small")
        case "fifo":
            os.mkfifo(upper / "large")
        case "whiteout":
            os.mknod(upper / "large", stat.S_IFCHR, os.makedev(0, 0))
    settle(upper)
    second = take(store, upper, first)
    assert shared(second, first) == ALL - {"large"}
    if kind == "directory":
        shutil.rmtree(upper / "large")
    else:
        (upper / "large").unlink(missing_ok=True)
    (upper / "large").write_bytes(content)
    settle(upper)
    third = take(store, upper, second)
    assert shared(third, second) == ALL - {"large"}
    assert (third / "large").read_bytes() == content


def test_directories_that_became_links_lead_nowhere(store: LayerStore, upper: Path) -> None:
    """Not even to a file that is the same: what is shared is at the same path, through directories alone."""
    make(upper)
    shutil.move(upper / "sub", upper / "elsewhere")
    (upper / "sub").symlink_to("elsewhere")
    (upper / "up").mkdir()
    (upper / "up" / "link").symlink_to("../elsewhere/file")
    settle(upper)
    first = take(store, upper)
    (upper / "sub").unlink()
    shutil.copytree(upper / "elsewhere", upper / "sub")
    (upper / "up" / "link").unlink()
    (upper / "up" / "link").write_bytes(b"in sub")
    settle(upper)
    second = take(store, upper, first)
    assert shared(second, first) == {
        "large",
        "small",
        "empty",
        "holes",
        "elsewhere/deep/file",
        "elsewhere/file",
    }
    for name in ("sub/file", "sub/deep/file", "up/link"):
        assert (second / name).stat().st_nlink == 1


def test_names_of_one_file_stay_those_and_no_others(store: LayerStore, upper: Path) -> None:
    """What was one file and is two now, of the same content, is two in the layer; and the other way."""
    (upper / "a").write_bytes(b"content")
    os.link(upper / "a", upper / "b")
    os.link(upper / "a", upper / "c")
    for name in ("x", "y"):
        (upper / name).write_bytes(b"content")
    settle(upper)
    first = take(store, upper)
    assert (first / "a").samefile(first / "c")
    for name in ("b", "y"):
        (upper / name).unlink()
    (upper / "b").write_bytes(b"content")
    os.link(upper / "x", upper / "y")
    settle(upper)
    second = take(store, upper, first)
    assert shared(second, first) == {"a", "c", "x"}
    assert [(second / one).samefile(second / other) for one, other in ("ab", "ac", "xy")] == [
        False,
        True,
        True,
    ]


def test_a_file_of_many_names_is_not_shared_until_it_has_no_room_for_more(
    store: LayerStore, upper: Path
) -> None:
    """Else a tool that gives a file as many as the disk has room for could be kept but once."""
    (upper / "file").write_bytes(b"content")
    for number in range(layershared.MOST_NAMES // 2):
        os.link(upper / "file", upper / f"name{number}")
    settle(upper)
    first = take(store, upper)
    second = take(store, upper, first)
    assert not shared(second, first)
    assert (second / "file").stat().st_nlink == layershared.MOST_NAMES // 2 + 1


def test_a_layer_that_is_gone_or_damaged_gives_nothing(store: LayerStore, upper: Path) -> None:
    make(upper)
    first = take(store, upper)
    for name in ("large", "sub/file"):  # as a disk changes them: nothing tells
        before = (first / name).stat()
        patch(first / name, 2, b"!")
        os.utime(first / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = take(store, upper, first)
    assert shared(second, first) == ALL - {"large", "sub/file"}
    assert (second / "large").read_bytes() == (upper / "large").read_bytes()
    store.remove(second.name)
    assert (take(store, upper, second) / "large").stat().st_nlink == 1


def test_a_disk_that_is_full_leaves_the_earlier_layer(tmp_path: Path, upper: Path) -> None:
    """Also where it is full in the middle of a file that had been the same so far."""
    small = tmp_path / "small"
    small.mkdir()
    mount = mounts.new_mount("tmpfs", {"size": "6m", "mode": "0700"})
    mounts.attach(mount, small)
    os.close(mount)
    try:
        store = LayerStore(small)
        make(upper)
        with opened(upper) as fd:
            first, figures = store.take(fd, BASE)
            again, _ = store.take(fd, BASE, first)  # shared: there is no room for another
            store.remove(again)
        patch(upper / "large", SIZE - 1, b"!")
        settle(upper)
        with opened(upper) as fd, pytest.raises(errors.HostFailed, match="no space left"):
            store.take(fd, BASE, first)
        assert {one.name for one in store.layers.iterdir()} == {"empty", first}
        assert not list(store._scratch.iterdir())
        assert measured(store.path(first)) == figures.digest
    finally:
        mounts.detach(small)


def plant(path: Path, chance: random.Random, depth: int = 0) -> None:
    """A tree by chance, of few names and few contents, so that much of two of them is the same."""
    for name in chance.sample("abcdef", chance.randint(1, 5)):
        at = path / name
        match chance.choice(["file", "file", "file", "again", "link", "whiteout", "directory", "directory"]):
            case "file":
                at.write_bytes(chance.choice([b"", b"one", b"two", bytes(5000), bytes(4096) + b"x"]))
                at.chmod(chance.choice([0o644, 0o600]))
            case "again":
                files = [one for one in path.iterdir() if stat.S_ISREG(one.lstat().st_mode)]
                if files:
                    os.link(chance.choice(files), at)
            case "link":
                at.symlink_to(chance.choice("abc"))
            case "whiteout":
                os.mknod(at, stat.S_IFCHR, os.makedev(0, 0))
            case _ if depth < 3:
                at.mkdir()
                plant(at, chance, depth + 1)


@pytest.mark.parametrize("seed", range(60))
def test_any_tree_after_any_other(store: LayerStore, upper: Path, seed: int) -> None:
    chance, earlier = random.Random(seed), None
    for _ in range(4):
        for one in list(upper.iterdir()):
            if chance.random() < 0.5:
                shutil.rmtree(one) if stat.S_ISDIR(one.lstat().st_mode) else one.unlink()
        fresh = upper / "fresh"
        fresh.mkdir()
        plant(fresh, chance)
        for one in list(fresh.iterdir()):
            if not (upper / one.name).is_symlink() and not (upper / one.name).exists():
                one.rename(upper / one.name)
        shutil.rmtree(fresh)
        settle(upper)
        earlier = take(store, upper, earlier)
