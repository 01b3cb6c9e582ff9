"""Test files that are programs too: what needs a mount namespace of its own runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from daemons import IMAGES, needs_containers

if TYPE_CHECKING:
    import pytest

__all__ = ["told_by"]


def told_by(file: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a test file prints as a program that is given a state directory with the tests' images."""
    needs_containers()
    state = tmp_path_factory.mktemp("state")
    (state / "images").symlink_to(IMAGES)
    done = subprocess.run(
        [sys.executable, file, str(state)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
