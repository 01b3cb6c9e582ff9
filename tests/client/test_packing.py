"""Inputs: what is sent, and that nothing else is read."""

from __future__ import annotations

import base64
import io
import os
import socket
import tarfile
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors, models
from sandboxd.client import packing

if TYPE_CHECKING:
    from pathlib import Path


def members(packed: packing.Packed) -> dict[str, tarfile.TarInfo]:
    assert packed.tar is not None
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed.tar["base64"]))) as archive:
        return {member.name: member for member in archive}


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ü")
    (tmp_path / "b").write_bytes(b"\xff")
    (tmp_path / "b").chmod(0o4755)
    packed = packing.pack([f"{tmp_path}/a.txt", f"{tmp_path}/b:bin/tool"])
    assert packed.inputs == [
        {"path": "a.txt", "content": {"text": "ü"}, "mode": 0o644},
        {"path": "bin/tool", "content": {"base64": "/w=="}, "mode": 0o755},
    ]
    assert packed.tar is None
    models.Request.model_validate({"argv": ["x"], "inputs": packed.inputs})


def test_a_directory_becomes_a_tar_and_nothing_outside_is_read(tmp_path: Path) -> None:
    root = tmp_path / "src"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "f").write_text("x")
    (root / "sub" / "in").symlink_to("../top")
    (root / "top").write_text("y")
    (root / "abs").symlink_to("/etc/passwd")
    (root / "up").symlink_to("../secret")
    (tmp_path / "secret").write_text("z")
    os.mkfifo(root / "fifo")
    (root / os.fsdecode(b"n\xff")).write_text("")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(root / "sock"))
    packed = packing.pack([f"{root}:app"])
    found = members(packed)
    assert set(found) == {"app", "app/sub", "app/sub/f", "app/sub/in", "app/top", os.fsdecode(b"app/n\xff")}
    assert found["app/sub/in"].issym()
    assert (found["app/top"].uid, found["app/top"].uname) == (0, "")
    assert sorted(one.split(" ")[0] for one in packed.left_out) == [
        "app/abs",
        "app/fifo",
        "app/sock",
        "app/up",
    ]


def test_where_things_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d:e").write_text("")
    assert packing.split("d") == ("d", "d")
    assert packing.split("d/") == ("d/", "d")
    assert packing.split("d/.") == ("d/.", ".")
    assert packing.split(".") == (".", ".")
    assert packing.split("..") == ("..", tmp_path.parent.name)
    assert packing.split("d:x/y") == ("d", "x/y")
    assert packing.split("d:/workspace/x") == ("d", "x")
    assert packing.split("d:.") == ("d", ".")
    assert packing.split("d:e") == ("d:e", "d:e")
    for argument in ("d:/etc", "d:../x", "d:a/../../x", os.fsdecode(b"d:\xff")):
        with pytest.raises(errors.InvalidRequest):
            packing.split(argument)


def test_this_directory_goes_into_the_workspace_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("x")
    assert set(members(packing.pack(["."]))) == {"f"}


def test_what_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for argument in (f"{tmp_path}/none", f"{tmp_path}/fifo", "/dev/zero", "a\0b"):
        with pytest.raises(errors.InvalidRequest, match="--input"):
            packing.pack([argument])


def test_a_sparse_terabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with (tmp_path / "d" / "big").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(errors.TooLarge):
        packing.pack([f"{tmp_path}/d"])
    with pytest.raises(errors.TooLarge):
        packing.pack([f"{tmp_path}/d/big"])


def test_a_deep_tree(tmp_path: Path) -> None:
    current = os.open(tmp_path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 10, dir_fd=current)
        following = os.open("d" * 10, os.O_RDONLY, dir_fd=current)
        os.close(current)
        current = following
    os.close(current)
    assert len(members(packing.pack([f"{tmp_path}:t"]))) == 301
