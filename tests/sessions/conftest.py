from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sessioned import daemon, session

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["daemon", "session"]


@pytest.fixture
def agreements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a push or a pull notes of a directory is the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
