"""Trees that tools made are removed, whatever they are like."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from layered import opened

from sandboxd.workspace.tree import remove_tree, step

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    with opened(tmp_path) as fd:
        yield fd


def test_whatever_its_names_are(tmp_path: Path, parent: int) -> None:
    """Also those that one who moves directories out of the way might take."""
    for number in range(50):
        for name in (f".sandboxd-removed-{number}", f"d{number}", f".sandboxd-removed-{99 - number}"):
            (tmp_path / "tree" / name / "in").mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / name / "in" / "file").touch()
    remove_tree(parent, b"tree")
    assert list(tmp_path.iterdir()) == []


def test_deeper_than_a_path_can_say(tmp_path: Path, parent: int) -> None:
    here = os.dup(parent)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        here = step(here, "d")
    os.close(here)
    before = len(list(Path("/proc/self/fd").iterdir()))
    remove_tree(parent, b"d")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list(tmp_path.iterdir()) == []


def test_a_file_a_link_and_nothing(tmp_path: Path, parent: int) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "file").touch()
    for name in (b"link", b"file", b"nothing"):
        remove_tree(parent, name)
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]
