"""A directory that users of every uid come to: pytest's is closed whenever another session begins."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def place(claims: set[str]) -> Iterator[Path]:
    """A directory of a test's own."""
    path = Path(tempfile.mkdtemp(prefix="sandboxd-crash-"))
    path.chmod(0o711)
    claims.add(f"{path}/")
    try:
        yield path
    finally:
        shutil.rmtree(path)
