"""Files in hostile directories, on a real tmpfs."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.kernel import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[int]:
    """A 1 MiB tmpfs of 64 inodes, unmounted but held by a descriptor, as after its container's end."""
    place = tmp_path / "ws"
    place.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64,nosuid,nodev", "tmpfs", place], check=True
    )
    fd = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    subprocess.run(["umount", "-l", place], check=True)
    yield fd
    os.close(fd)


def entries(root: int) -> list[str]:
    fd = files.open_directory(root)
    try:
        with os.scandir(fd) as found:
            return [entry.name for entry in found]
    finally:
        os.close(fd)


def descriptors() -> int:
    with os.scandir("/proc/self/fd") as found:
        return sum(1 for _ in found)


def read(root: int, path: bytes) -> bytes:
    fd, _ = files.open_regular(root, path)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def test_inputs_are_written_with_owner_mode_and_parents(workspace: int) -> None:
    files.write_inputs(
        workspace,
        [("a/b/c.txt", b"one", 0o640), ("a/b/d", b"two", 0o755), ("a/é\n%", b"", 0o600)],
        1234,
        1235,
    )
    fd, found = files.open_regular(workspace, b"a/b/c.txt")
    os.close(fd)
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 1235, 0o640)
    above = os.stat("a", dir_fd=workspace)
    assert (above.st_uid, above.st_gid, stat.S_IMODE(above.st_mode)) == (1234, 1235, 0o755)
    assert read(workspace, b"a/b/d") == b"two"
    assert read(workspace, "a/é\n%".encode()) == b""


@pytest.mark.parametrize(
    "path",
    ["", "/etc/x", "../x", "a/../x", "a//x", "./a", "a/", "a\0b", "n" * 256, "d/" * 2048 + "x", "\ud800"],
)
def test_bad_paths_are_refused(workspace: int, path: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        files.write_inputs(workspace, [(path, b"x", 0o644)], 0, 0)
    assert entries(workspace) == []


def test_longest_name_and_deep_path(workspace: int) -> None:
    deep = "/".join(["d"] * 40) + "/" + "n" * 255
    files.write_inputs(workspace, [(deep, b"x", 0o644)], 0, 0)
    assert read(workspace, deep.encode()) == b"x"


def test_the_same_path_twice(workspace: int) -> None:
    with pytest.raises(errors.InvalidRequest, match="given twice"):
        files.write_inputs(workspace, [("a", b"x", 0o644), ("a", b"y", 0o644)], 0, 0)
    with pytest.raises(errors.InvalidRequest, match="directory where a file"):
        files.write_inputs(workspace, [("a/b", b"y", 0o644)], 0, 0)


def test_a_full_workspace_is_too_large_and_says_its_size(workspace: int) -> None:
    with pytest.raises(errors.TooLarge, match="1MiB") as caught:
        files.write_inputs(workspace, [("big", bytes(2 << 20), 0o644)], 0, 0)
    assert caught.value.details["limit"] == 1 << 20


def test_no_inode_left_is_too_large(workspace: int) -> None:
    with pytest.raises(errors.TooLarge, match="64 files"):
        files.write_inputs(workspace, ((f"f{n}", b"", 0o644) for n in range(100)), 0, 0)


def test_nothing_is_written_or_read_through_links(workspace: int, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    os.symlink(outside, "out", dir_fd=workspace)
    os.symlink(outside / "secret", "file", dir_fd=workspace)
    os.symlink("/proc/self/root", "magic", dir_fd=workspace)
    with pytest.raises(errors.InvalidRequest, match="symbolic link"):
        files.write_inputs(workspace, [("out/new", b"x", 0o644)], 0, 0)
    with pytest.raises(errors.InvalidRequest):
        files.write_inputs(workspace, [("file", b"x", 0o644)], 0, 0)
    assert (outside / "secret").read_bytes() == b"secret"
    assert sorted(outside.iterdir()) == [outside / "secret"]
    with pytest.raises(files.NotRegular) as caught:
        files.open_regular(workspace, b"file")
    assert caught.value.is_link
    for path in (b"out/secret", b"magic/etc/passwd"):
        with pytest.raises(OSError, match="symbolic") as found:
            files.open_regular(workspace, path)
        assert found.value.errno == errno.ELOOP
    for path in (b"..", b"../x", b"/etc/passwd"):
        with pytest.raises(OSError) as found:
            files.open_regular(workspace, path)
        assert found.value.errno in {errno.EXDEV, errno.ENOENT}


def test_another_mount_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "in"], check=True)
    root = os.open(tmp_path, os.O_PATH)
    try:
        (tmp_path / "in" / "f").touch()
        with pytest.raises(OSError) as caught:
            files.open_regular(root, b"in/f")
        assert caught.value.errno == errno.EXDEV
    finally:
        os.close(root)
        subprocess.run(["umount", tmp_path / "in"], check=True)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (tmp_path / "dir").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        root = os.open(tmp_path, os.O_PATH)
        before = descriptors()
        kinds = {}
        for name in (b"fifo", b"null", b"dir", b"socket"):
            with pytest.raises(files.NotRegular) as caught:
                files.open_regular(root, name)
            kinds[name] = caught.value.kind
        assert descriptors() == before
        os.close(root)
    assert kinds == {b"fifo": "FIFO", b"null": "character device", b"dir": "directory", b"socket": "socket"}
