"""Collection from trees that a hostile tool made, on a real tmpfs."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import artifacts, errors
from sandboxd.blobs import BlobStore
from sandboxd.globs import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandboxd import models

ALL: list[tuple[str, int | None]] = [("**", None)]


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "ws"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=300k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # whatever a failed test still holds open


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def collect(
    tree: Path,
    store: BlobStore,
    rules: list[tuple[str, int | None]],
    narrowed: list[str] | None = None,
    **limits: int,
) -> tuple[list[models.Artifact], list[models.Withheld]]:
    fd = os.open(tree, os.O_PATH)
    before = sum(1 for _ in os.scandir("/proc/self/fd"))
    try:
        return artifacts.collect(
            fd,
            rules,
            narrowed,
            store,
            max_files=limits.get("max_files", artifacts.MAX_FILES),
            max_total=limits.get("max_total", artifacts.MAX_TOTAL),
        )
    finally:
        if threading.active_count() == 1:  # a thread of the test has descriptors of its own
            assert sum(1 for _ in os.scandir("/proc/self/fd")) == before
        assert list((store.root / "tmp").iterdir()) == []
        os.close(fd)


def reasons(withheld: list[models.Withheld]) -> dict[str, str]:
    return {each.path: each.reason for each in withheld}


def test_what_matches_is_released_by_digest(tree: Path, store: BlobStore) -> None:
    (tree / "out" / "deep").mkdir(parents=True)
    (tree / "out" / "a.txt").write_bytes(b"hello")
    (tree / "out" / "deep" / "b.txt").write_bytes(b"hello")
    (tree / "out" / "deep" / "run").write_bytes(b"#!/bin/sh\n")
    (tree / "out" / "deep" / "run").chmod(0o755)
    (tree / "other.txt").write_bytes(b"no")
    released, withheld = collect(tree, store, [("out/**", None)])
    assert withheld == []
    assert [(each.path, each.size, each.executable) for each in released] == [
        ("out/a.txt", 5, False),
        ("out/deep/b.txt", 5, False),
        ("out/deep/run", 10, True),
    ]
    digest = "sha256:" + hashlib.sha256(b"hello").hexdigest()
    assert released[0].digest == released[1].digest == digest
    with store.open(digest) as blob:
        assert blob.read() == b"hello"
    assert sum(1 for path in (store.root / "sha256").rglob("*") if path.is_file()) == 2


def test_a_request_narrows_and_never_widens(tree: Path, store: BlobStore) -> None:
    for name in ("a.txt", "b.txt", "c.png"):
        (tree / name).touch()
    assert [each.path for each in collect(tree, store, [("*.txt", None)], ["b*", "c*"])[0]] == ["b.txt"]
    assert collect(tree, store, [("*.txt", None)], []) == ([], [])
    assert collect(tree, store, []) == ([], [])
    with pytest.raises(errors.InvalidRequest):
        collect(tree, store, ALL, ["../*"])


def test_only_regular_files_are_released(tree: Path, store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "secret").write_bytes(b"secret")
    (tree / "link").symlink_to(tmp_path / "secret")
    (tree / "dirlink").symlink_to(tmp_path / "dir")
    (tree / "loop").symlink_to("loop")
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
        released, withheld = collect(tree, store, ALL)
    assert released == []
    assert reasons(withheld) == {
        "link": "symlink",
        "dirlink": "symlink",
        "loop": "symlink",
        "fifo": "not_regular",
        "null": "not_regular",
        "socket": "not_regular",
    }


def test_hard_links_are_released_under_each_name(tree: Path, store: BlobStore) -> None:
    (tree / "a").write_bytes(b"x")
    (tree / "b").hardlink_to(tree / "a")
    released, withheld = collect(tree, store, ALL)
    assert [(each.path, each.size) for each in released] == [("a", 1), ("b", 1)]
    assert withheld == []


def test_sizes_and_counts_are_bounded(tree: Path, store: BlobStore) -> None:
    for number in range(6):
        (tree / f"f{number}").write_bytes(bytes(100 * number))
    released, withheld = collect(tree, store, [("*", 300), ("f5", 500)])
    assert [each.path for each in released] == ["f0", "f1", "f2", "f3", "f5"]
    assert reasons(withheld) == {"f4": "too_large"}
    released, withheld = collect(tree, store, ALL, max_files=2)
    assert [each.path for each in released] == ["f0", "f1"]
    assert set(reasons(withheld).values()) == {"too_many"}
    released, withheld = collect(tree, store, ALL, max_total=650)
    assert [each.path for each in released] == ["f0", "f1", "f2", "f3"]
    assert reasons(withheld) == {"f4": "too_large", "f5": "too_large"}


def test_a_sparse_terabyte_is_refused_unread_and_a_sparse_file_stays_sparse(
    tree: Path, store: BlobStore
) -> None:
    with (tree / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with (tree / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.write(b"start")
    start = time.monotonic()
    released, withheld = collect(tree, store, ALL)
    assert time.monotonic() - start < 10
    assert reasons(withheld) == {"huge": "too_large"}
    assert released[0].size == 64 << 20
    found = store.path(released[0].digest).stat()
    assert found.st_size == 64 << 20
    assert found.st_blocks * 512 < 4 << 20


def test_names(tree: Path, store: BlobStore) -> None:
    names = [b"new\nline", b"bad\xff\xfe", b"100%.txt", b"%41", b"n" * 255, "é€".encode(), b" ", b"..."]
    for name in names:
        (tree / os.fsdecode(name)).touch()
    released, withheld = collect(tree, store, ALL)
    assert withheld == []
    paths = [each.path for each in released]
    assert sorted(artifacts.decode_path(path) for path in paths) == sorted(names)
    assert {"new\nline", "bad%FF%FE", "100%.txt", "%2541", "é€"} <= set(paths)


def nest(tree: Path, depth: int, name: str) -> None:
    """Directories one inside the other, deeper than any path can say, and a file in the deepest."""
    here = os.open(tree, os.O_PATH)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_PATH, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here))
    os.close(here)


def test_deep_trees(tree: Path, store: BlobStore) -> None:
    nest(tree, 1000, "d")
    released, withheld = collect(tree, store, ALL)
    assert [each.path for each in released] == ["d/" * 1000 + "file"]
    assert withheld == []
    nest(tree, 1000, "e" * 200)
    released, withheld = collect(tree, store, ALL)
    assert len(released) == 1
    assert [each.reason for each in withheld] == ["name"]
    assert len(withheld[0].path) < 2000
    subprocess.run(["rm", "-rf", tree / "d", tree / ("e" * 200)], check=True)


def test_a_tree_wider_than_the_walk_ends_and_says_so(
    tree: Path, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(tree, os.O_PATH)
    for number in range(210_000):
        os.mknod(f"{number:06}", dir_fd=fd)
    os.close(fd)
    start = time.monotonic()
    released, withheld = collect(tree, store, [("*", 0)])
    assert time.monotonic() - start < 30
    assert len(released) == artifacts.MAX_FILES
    assert len(withheld) <= artifacts.MAX_WITHHELD + 2
    assert withheld[-1].path == "."
    assert withheld[-1].reason == "too_many"
    released, withheld = collect(tree, store, [("x/*", None)])
    assert released == []
    assert [(each.path, each.reason) for each in withheld] == [(".", "too_many")]
    assert "200000" in withheld[0].detail


def test_a_collection_that_takes_too_long_ends_and_says_so(
    tree: Path, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "a").touch()
    monkeypatch.setattr(artifacts, "MAX_SECONDS", 0.0)
    released, withheld = collect(tree, store, ALL)
    assert released == []
    assert reasons(withheld) == {".": "too_many"}


def test_a_directory_out_of_reach_is_named(tree: Path, store: BlobStore) -> None:
    (tree / "mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree / "mounted"], check=True)
    try:
        (tree / "mounted" / "f").touch()
        released, withheld = collect(tree, store, ALL)
    finally:
        subprocess.run(["umount", tree / "mounted"], check=True)
    assert released == []
    assert reasons(withheld) == {"mounted": "unreadable"}


def test_files_that_are_swapped_while_collected(tree: Path, store: BlobStore, tmp_path: Path) -> None:
    """Somebody swaps a file, a link to a secret, and a FIFO under one name, without end."""
    (tmp_path / "secret").write_bytes(b"secret" * 100)
    secret = "sha256:" + hashlib.sha256(b"secret" * 100).hexdigest()
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for make in (
                lambda path: path.write_bytes(b"mine"),
                lambda path: path.symlink_to(tmp_path / "secret"),
                os.mkfifo,
            ):
                make(tree / ".new")
                (tree / ".new").rename(tree / "x")

    thread = threading.Thread(target=swap)
    thread.start()
    seen: set[str] = set()
    try:
        for _ in range(1500):
            released, withheld = collect(tree, store, [("x", None)])
            assert all(each.size == 4 for each in released)
            seen |= {each.reason for each in withheld} | {"released" for _ in released}
    finally:
        stop.set()
        thread.join()
    assert not store.has(secret)
    assert {"released"} < seen <= {"released", "symlink", "not_regular", "changed"}


def test_a_file_that_grows_while_it_is_copied(tree: Path, store: BlobStore) -> None:
    (tree / "log").write_bytes(bytes(8 << 20))
    program = (
        "import sys\nwith open(sys.argv[1], 'ab', 0) as f:\n while f.tell() < 50 << 20: f.write(b'x' * 99)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tree / "log"]) as grower:
        while (tree / "log").stat().st_size == 8 << 20:
            time.sleep(0.001)
        released, withheld = collect(tree, store, ALL)
        grower.kill()
    assert released == []
    assert reasons(withheld) == {"log": "changed"}


def test_a_full_store_is_the_hosts_failure(tree: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    try:
        (tree / "big").write_bytes(b"x" * 1_000_000)
        with pytest.raises(errors.HostFailed, match="no space"):
            collect(tree, BlobStore(place / "blobs"), ALL)
    finally:
        subprocess.run(["umount", place], check=True)


def test_blobs(store: BlobStore) -> None:
    digest = store.add(b"once", durable=True)
    assert store.add(b"once") == digest
    assert store.has(digest)
    store.path(digest).write_bytes(b"")  # as after a loss of power
    assert store.add(b"once") == digest
    assert store.path(digest).read_bytes() == b"once"
    store.path(digest).write_bytes(b"evil")
    assert store.add(b"once", durable=True) == digest
    assert store.path(digest).read_bytes() == b"once"
    zeros = store.add(bytes(1000))
    assert store.path(zeros).read_bytes() == bytes(1000)
    with pytest.raises(errors.NotFound):
        store.open("sha256:" + "0" * 64)
    for bad in ("", "sha256:../../etc/passwd", "md5:00", "sha256:" + "A" * 64):
        with pytest.raises(errors.InvalidRequest):
            store.path(bad)
    (store.root / "tmp" / "left").touch()
    assert store.clean() == 1


@given(st.binary(max_size=40))
def test_paths_are_told_exactly(path: bytes) -> None:
    text = artifacts.encode_path(path)
    assert artifacts.decode_path(text) == path
    text.encode()


@given(st.text(alphabet="%0aF4é", max_size=12))
def test_percent_signs_are_told_exactly(text: str) -> None:
    path = text.encode()
    assert artifacts.decode_path(artifacts.encode_path(path)) == path


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a.txt", ["a.txt"], ["b/a.txt", "a.txtx", "axtxt"]),
        ("*.txt", ["a.txt", ".txt", "a\n.txt"], ["a/b.txt", "a.txt\n"]),
        ("**/*.png", ["a.png", "x/y/a.png"], ["a.jpg"]),
        ("out/**", ["out/a", "out/x/y"], ["out", "other/a"]),
        ("**", ["a", "a/b"], []),
        ("a/**/b/**/c", ["a/b/c", "a/x/b/y/z/c"], ["a/c", "a/b", "b/c"]),
        ("?", ["a", "é", "😀"], ["ab", ""]),
        ("[a-c]x", ["bx"], ["dx", "x"]),
        ("[!a-c]x", ["dx", "éx"], ["bx"]),
        ("[]]", ["]"], ["["]),
        ("[x", ["[x"], ["x"]),
        ("a*b*c", ["abc", "aXbXbXc"], ["acb", "abcx"]),
        ("a**b", ["ab", "axxb"], ["a/b"]),
        ("a.+(b)", ["a.+(b)"], ["aabb"]),
        ("*[é-ü]", ["xñ"], ["xz"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    compiled = Pattern.of(pattern)
    assert [path for path in yes if not compiled.matches(path.encode())] == []
    assert [path for path in no if compiled.matches(path.encode())] == []


@pytest.mark.parametrize(
    "pattern", ["", "/a", "a//b", "../a", "a/./b", "a\0", "x" * 4096, "[z-a]", "a/", "a/" * 64 + "b"]
)
def test_patterns_that_match_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        Pattern.of(pattern)


def test_patterns_match_names_that_are_no_utf8() -> None:
    assert Pattern.of("a?c*").matches(b"a\xffc\xfe")


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*a" * 120 + "b", b"a" * 255),
        ("**/a/" * 4 + "b", b"a/" * 2000 + b"c"),
        ("*?" * 127 + "x", b"y" * 255),
        ("*[a-z]" * 400 + "!", b"z" * 255),
    ],
)
def test_no_pattern_takes_long(pattern: str, path: bytes) -> None:
    start = time.perf_counter()
    assert not Pattern.of(pattern).matches(path)
    assert time.perf_counter() - start < 3
