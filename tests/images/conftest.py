"""A store of its own per test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.images import ImageStore

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    """A store; nothing half-made is left in it, whatever the test did."""
    made = ImageStore(tmp_path / "images")
    yield made
    assert list((tmp_path / "images" / "tmp").iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
