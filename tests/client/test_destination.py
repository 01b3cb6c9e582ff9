"""Saving files whose names a tool chose."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import errors
from sandboxd.client.destination import Destination, components

DATA = b"data"
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


def save(directory: Path, name: str, *, executable: bool = False) -> None:
    with Destination(directory) as to, to.incoming(name, len(DATA), DIGEST, executable=executable) as file:
        file.write(DATA)
        file.commit()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "a/",
        "./a",
        "a/.",
        "x\0y",
        "x" * 256,
        "d/" * 300 + "f",
    ],
)
def test_names_that_could_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        save(tmp_path / "d", name)
    assert [one.name for one in tmp_path.iterdir()] == ["d"]
    assert list((tmp_path / "d").iterdir()) == []


@given(st.text(max_size=40))
def test_components_never_hold_a_way_out(name: str) -> None:
    try:
        parts = components(name)
    except errors.InvalidRequest:
        return
    assert all(part not in {"", ".", ".."} and "/" not in part for part in parts)


def test_no_link_is_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "f").write_text("keep")
    (inside / "dir").symlink_to(outside)
    (inside / "file").symlink_to(outside / "f")
    with pytest.raises(errors.StateConflict):
        save(inside, "dir/f")
    save(inside, "file")  # the link itself is replaced
    assert (outside / "f").read_text() == "keep"
    assert not (inside / "file").is_symlink()
    assert [one.name for one in outside.iterdir()] == ["f"]


def test_a_directory_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(errors.StateConflict):
        save(tmp_path, "x")
    (tmp_path / "f").write_text("")
    with pytest.raises(errors.StateConflict):
        save(tmp_path, "f/g")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["f", "x"]


def test_modes_follow_the_umask_and_descriptors_are_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    old = os.umask(0o077)
    try:
        save(tmp_path / "new" / "d", "a/b/tool", executable=True)
        save(tmp_path / "new" / "d", "a/b/plain")
    finally:
        os.umask(old)
    for name, mode in (("tool", 0o700), ("plain", 0o600)):
        file = tmp_path / "new" / "d" / "a" / "b" / name
        assert file.read_bytes() == DATA
        assert file.stat().st_mode & 0o777 == mode
    with pytest.raises(errors.InvalidRequest):
        save(tmp_path, "../x")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_that_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    with Destination(tmp_path) as to:
        with to.incoming("f", 4, DIGEST) as file:
            file.write(b"da")
        with to.incoming("f", 4, DIGEST) as file, pytest.raises(errors.Unavailable):
            file.write(b"too much")
    assert list(tmp_path.iterdir()) == []


def test_the_directory_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(errors.SandboxdError, match="cannot save"):
        Destination(tmp_path / "f")
    with pytest.raises(errors.SandboxdError, match="cannot save"):
        Destination("/proc/nowhere")
