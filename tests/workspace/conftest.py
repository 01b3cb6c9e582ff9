"""An upper layer as a call has one, and a place for those that are taken of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from sandboxd.kernel import mounts
from sandboxd.workspace.store import LayerStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path)


@pytest.fixture
def upper(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs, as the upper layer of a call is one."""
    at = tmp_path / "upper"
    at.mkdir()
    mount = mounts.new_mount("tmpfs", {"size": "64m", "mode": "0755"})
    mounts.attach(mount, at)
    os.close(mount)
    try:
        yield at
    finally:
        mounts.detach(at)
