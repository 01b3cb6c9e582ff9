"""Layers: what is taken of an upper layer is exactly what was there, and nothing put there for us."""

# ruff: noqa: PTH208  -- names as bytes, and descriptors

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

import pytest
from layered import opened

from sandboxd import errors
from sandboxd.kernel import mounts
from sandboxd.workspace import layer
from sandboxd.workspace.store import LayerStore
from sandboxd.workspace.tree import remove_tree, step

BASE = 1_000_000


def give(root: Path) -> None:
    """Everything belongs to the container's 1000."""
    for directory, names, files in os.walk(root, followlinks=False):
        for one in (directory, *(f"{directory}/{name}" for name in names + files)):
            mode = os.lstat(one).st_mode
            os.lchown(one, BASE + 1000, BASE + 1000)
            if not stat.S_ISLNK(mode):
                Path(one).chmod(stat.S_IMODE(mode))


def take(store: LayerStore, upper: Path) -> tuple[Path, layer.Figures]:
    with opened(upper) as fd:
        name, figures = store.take(fd, BASE)
    with opened(store.path(name)) as fd:
        assert layer.measure(fd) == figures
    assert not list(store._scratch.iterdir())
    return store.path(name), figures


def test_everything_that_a_tool_can_make_is_kept_exactly(store: LayerStore, upper: Path) -> None:
    (upper / "file").write_bytes(b"text\n")
    (upper / "empty").touch()
    (upper / "setuid").write_bytes(b"#!/bin/sh\n")
    (upper / "setuid").chmod(0o6755)
    (upper / "sub").mkdir()
    (upper / "sub").chmod(0o2751)
    (upper / "sub" / "link").symlink_to("../../../etc/passwd")
    (upper / "sub" / "sticky").mkdir()
    (upper / "sub" / "sticky").chmod(0o1777)
    os.link(upper / "file", upper / "sub" / "same")
    os.mkfifo(upper / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(upper / "socket"))
    name = os.fsencode(upper) + b"/\xff\n \\.wh.x"
    Path(os.fsdecode(name)).write_bytes(b"odd")
    os.setxattr(upper / "file", "user.colour", b"\0blue")
    (upper / "setuid").touch()
    os.utime(upper / "empty", ns=(1, 1_234_567_890_123_456_789))
    os.utime(upper / "sub" / "link", ns=(1, 987_654_321), follow_symlinks=False)
    give(upper)
    os.utime(upper / "sub", ns=(5, 5_000_000_007))
    made, figures = take(store, upper)
    assert (made / "file").read_bytes() == b"text\n"
    assert os.getxattr(made / "file", "user.colour") == b"\0blue"
    assert (made / "file").samefile(made / "sub" / "same")
    assert (made / "file").stat().st_nlink == 2
    assert stat.S_IMODE((made / "setuid").stat().st_mode) == 0o6755
    assert stat.S_IMODE((made / "sub").stat().st_mode) == 0o2751
    assert stat.S_IMODE((made / "sub" / "sticky").stat().st_mode) == 0o1777
    assert str((made / "sub" / "link").readlink()) == "../../../etc/passwd"
    assert (made / "sub" / "link").lstat().st_mtime_ns == 987_654_321
    assert (made / "empty").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (made / "sub").stat().st_mtime_ns == 5_000_000_007
    assert stat.S_ISFIFO((made / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((made / "socket").stat().st_mode)
    assert b"\xff\n \\.wh.x" in os.listdir(os.fsencode(made))
    for entry in (made / "file", made / "sub", made / "sub" / "link", made / "fifo", made / "socket"):
        assert (entry.lstat().st_uid, entry.lstat().st_gid) == (1000, 1000)
    assert figures.inodes == 9
    # three files with something in them, one with an attribute, and three directories
    assert figures.size == 4096 * (3 + 1 + 3)


def test_a_sparse_file_stays_one_and_its_digest_is_of_its_content(store: LayerStore, upper: Path) -> None:
    size = 10 << 30
    with (upper / "sparse").open("wb") as file:
        file.truncate(size)
        file.seek(5 << 30)
        file.write(b"x" * 10_000)
        file.seek(4096 * 100)
        file.write(bytes(4096 * 3) + b"tail" + bytes(100))
    give(upper)
    made, figures = take(store, upper)
    found = (made / "sparse").stat()
    assert found.st_size == size
    assert found.st_blocks * 512 < 64 * 1024
    assert figures.size < 32 * 1024
    with (made / "sparse").open("rb") as file:
        file.seek((5 << 30) - 1)
        assert file.read(10_002) == b"\0" + b"x" * 10_000 + b"\0"


@pytest.mark.parametrize("tail", [0, 1, 100, 4095])
def test_holes_and_zeros_have_one_digest(store: LayerStore, upper: Path, tail: int) -> None:
    def figures_of(*, holes: bool) -> layer.Figures:
        with (upper / "file").open("wb") as file:
            for content in (b"a" * 4096, None, b"b" * 5000, None, b"c", None):
                if content is not None:
                    file.write(content)
                    file.write(bytes(-len(content) % 4096))
                elif holes:
                    file.seek(3 * 4096, os.SEEK_CUR)
                else:
                    file.write(bytes(3 * 4096))
            file.truncate(file.tell() // 4096 * 4096 + tail)
            if tail and not holes:
                file.seek(-tail, os.SEEK_END)
                file.write(bytes(tail))
        give(upper)
        for one in (upper / "file", upper):
            os.utime(one, ns=(7, 7))
        found = take(store, upper)[1]
        (upper / "file").unlink()
        return found

    assert figures_of(holes=True) == figures_of(holes=False)


def test_every_difference_is_another_digest(store: LayerStore, upper: Path) -> None:
    seen: dict[str, str] = {}

    def note(what: str) -> None:
        give(upper)
        digest = take(store, upper)[1].digest
        assert digest not in seen, f"{what} is {seen.get(digest)}"
        seen[digest] = what

    def frozen() -> None:
        for one in (upper / "f", upper):
            os.utime(one, ns=(7, 7), follow_symlinks=False)

    (upper / "f").write_bytes(b"one")
    frozen()
    note("a file")
    (upper / "f").write_bytes(b"two")
    frozen()
    note("another content")
    os.utime(upper / "f", ns=(8, 8))
    note("another time")
    (upper / "f").chmod(0o600)
    note("another mode")
    os.setxattr(upper / "f", "user.a", b"1")
    note("an attribute")
    (upper / "f").rename(upper / "g")
    os.utime(upper, ns=(7, 7))
    note("another name")
    os.link(upper / "g", upper / "h")
    os.utime(upper, ns=(7, 7))
    note("a link to it")
    (upper / "h").unlink()
    (upper / "h").write_bytes(b"two")
    os.utime(upper, ns=(7, 7))
    note("a copy of it")
    (upper / "h").unlink()
    (upper / "h").symlink_to("g")
    os.utime(upper, ns=(7, 7))
    note("a symbolic link to it")


def test_a_layer_that_was_linked_from_elsewhere_has_its_digest(store: LayerStore, upper: Path) -> None:
    for name in ("a", "b", "d"):
        (upper / name).write_text(name)
    os.link(upper / "b", upper / "c")
    give(upper)
    made, figures = take(store, upper)
    elsewhere = store.layers / "merged"
    elsewhere.mkdir()
    for name in ("a", "b", "d"):
        os.link(made / name, elsewhere / name)
    with opened(made) as fd:
        assert layer.measure(fd) == figures


def test_whiteouts_and_opaque_directories_are_kept_and_nothing_else_of_overlayfs(
    store: LayerStore, tmp_path: Path, upper: Path
) -> None:
    """What overlayfs made of real deletions is in the layer, and shows the same files as a layer below."""
    lower, above, merged = tmp_path / "lower", upper / "upper", tmp_path / "merged"
    for directory in (lower / "gone", lower / "again", above, upper / "work", merged):
        directory.mkdir(parents=True)
    for file in ("gone/a", "again/b", "deleted", "changed", "kept"):
        (lower / file).write_text(file)
    options = {"lowerdir": str(lower), "upperdir": str(above), "workdir": str(upper / "work")}
    mount = mounts.new_mount("overlay", options)
    mounts.attach(mount, merged)
    os.close(mount)
    try:
        (merged / "deleted").unlink()
        (merged / "changed").write_text("new")
        os.setxattr(merged / "changed", "user.overlay.opaque", b"y")
        os.setxattr(merged / "changed", "user.overlay.whiteout", b"y")
        for name in ("gone/a", "again/b"):
            (merged / name).unlink()
        (merged / "gone").rmdir()
        (merged / "again").rmdir()
        (merged / "again").mkdir()
        (merged / "again" / "c").write_text("c")
        (merged / ".wh.kept").touch()
        (merged / ".wh..wh..opq").touch()
        shown = sorted(str(one.relative_to(merged)) for one in merged.rglob("*"))
    finally:
        mounts.detach(merged)
    give(above)
    made, _ = take(store, above)
    assert layer.is_whiteout((made / "deleted").lstat())
    assert layer.is_whiteout((made / "gone").lstat())
    assert os.getxattr(made / "again", layer.OPAQUE) == b"y"
    for one in made.rglob("*"):
        if one.is_file() or one.is_dir():
            overlay = [name for name in os.listxattr(one) if "overlay" in name]
            assert overlay == ([layer.OPAQUE] if one.name == "again" else [])
    mount = mounts.new_mount("overlay", {"lowerdir": f"{made}:{lower}"})
    mounts.attach(mount, merged)
    os.close(mount)
    try:
        assert sorted(str(one.relative_to(merged)) for one in merged.rglob("*")) == shown
        assert (merged / "changed").read_text() == "new"
        assert (merged / "kept").read_text() == "kept"
    finally:
        mounts.detach(merged)


def test_a_tree_that_no_path_reaches_is_kept_and_removed(store: LayerStore, upper: Path) -> None:
    depth = 3000  # names of 20 bytes: 60 KB of path, where the kernel takes 4 KB
    fd = os.open(upper, layer.DIRECTORY)
    try:
        for number in range(depth):
            name = f"directory-{number:010}"
            os.mkdir(name, dir_fd=fd)
            fd = step(fd, name)
            os.chown(fd, BASE, BASE)
        leaf = os.open("leaf", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
        os.write(leaf, b"deep")
        os.fchown(leaf, BASE, BASE)
        os.close(leaf)
    finally:
        os.close(fd)
    os.chown(upper, BASE, BASE)
    before = len(os.listdir("/proc/self/fd"))
    made, figures = take(store, upper)
    assert figures.inodes == depth + 1
    store.remove(made.name)
    assert not made.exists()
    assert len(os.listdir("/proc/self/fd")) == before
    with opened(upper.parent) as parent:  # for pytest, whose own way of removing it has no end
        for one in upper.iterdir():
            with opened(upper) as inside:
                remove_tree(inside, one.name)
        assert parent


@pytest.mark.parametrize("what", ["uid", "gid"])
def test_files_of_nobody_inside_are_not_kept(store: LayerStore, upper: Path, what: str) -> None:
    (upper / "file").touch()
    give(upper)
    os.chown(upper / "file", *((0, BASE) if what == "uid" else (BASE, BASE + layer.IDS)))
    with opened(upper) as fd, pytest.raises(errors.HostFailed, match="outside of the container"):
        store.take(fd, BASE)
    assert [one.name for one in store.layers.iterdir()] == ["empty"]


def test_a_device_is_not_kept(store: LayerStore, upper: Path) -> None:
    os.mknod(upper / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    give(upper)
    with opened(upper) as fd, pytest.raises(errors.WorkspaceUnfit, match="'null' is a device"):
        store.take(fd, BASE)
    assert [one.name for one in store.layers.iterdir()] == ["empty"]


def test_access_lists_get_the_ids_of_the_container(store: LayerStore, upper: Path) -> None:
    def acl(who: int) -> bytes:
        entries = [
            (1, 6, 0xFFFFFFFF),
            (2, 4, who),
            (4, 4, 0xFFFFFFFF),
            (16, 4, 0xFFFFFFFF),
            (32, 0, 0xFFFFFFFF),
        ]
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)

    (upper / "file").touch()
    give(upper)
    os.setxattr(upper / "file", layer.ACLS[0], acl(BASE + 7))
    made, _ = take(store, upper)
    assert os.getxattr(made / "file", layer.ACLS[0]) == acl(7)
    os.setxattr(upper / "file", layer.ACLS[0], acl(7))
    with opened(upper) as fd, pytest.raises(errors.WorkspaceUnfit, match="access list"):
        store.take(fd, BASE)


def test_a_full_disk_leaves_nothing(tmp_path: Path, upper: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = mounts.new_mount("tmpfs", {"size": "1m", "mode": "0700"})
    mounts.attach(mount, small)
    os.close(mount)
    try:
        store = LayerStore(small)
        (upper / "large").write_bytes(b"x" * (2 << 20))
        give(upper)
        with opened(upper) as fd, pytest.raises(errors.HostFailed, match="no space left"):
            store.take(fd, BASE)
        assert [one.name for one in store.layers.iterdir()] == ["empty"]
        assert os.statvfs(small).f_bavail > 200
    finally:
        mounts.detach(small)


def test_what_nothing_refers_to_is_removed_at_start(store: LayerStore, upper: Path) -> None:
    (upper / "file").touch()
    give(upper)
    kept, stray = take(store, upper)[0], take(store, upper)[0]
    (store.mounts / "left").mkdir()
    assert store.clean({kept.name}) == 1
    assert kept.exists()
    assert not stray.exists()
    assert store.empty.exists()
    assert not list(store.mounts.iterdir())


def test_what_a_layer_takes_on_disk_is_counted(store: LayerStore, upper: Path) -> None:
    for number in range(500):
        (upper / f"f{number}").write_bytes(b"x")
        (upper / f"d{number}").mkdir()
        (upper / f"s{number}").symlink_to("x" * 200)
        (upper / f"e{number}").touch()
        os.setxattr(upper / f"e{number}", "user.much", bytes(3500))
    give(upper)
    made, figures = take(store, upper)
    on_disk = sum(one.lstat().st_blocks * 512 for one in (made, *made.iterdir()))
    assert on_disk > 2000 * 4096
    assert on_disk <= figures.size <= on_disk * 1.1
    assert figures.inodes == 2000


@pytest.mark.parametrize("seconds", [2**34, 17_000_000_000, -10_000_000_000])
def test_a_time_of_any_year_is_kept(store: LayerStore, upper: Path, seconds: int) -> None:
    (upper / "file").touch()
    (upper / "link").symlink_to("file")
    (upper / "d").mkdir()
    give(upper)
    for name in ("file", "link", "d"):
        os.utime(upper / name, ns=(0, seconds * 10**9 + 7), follow_symlinks=False)
    made, figures = take(store, upper)  # its digest is that of what is on disk
    found = (made / "file").stat().st_mtime_ns
    assert found == (made / "d").stat().st_mtime_ns == (made / "link").lstat().st_mtime_ns
    os.utime(upper / "file", ns=(0, 0))
    assert take(store, upper)[1].digest != figures.digest
