"""What tests of pulls share: a user's directory, what is in one, and the commands run in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

BIN = Path(sys.executable).parent
USER = 4243


def content(directory: Path) -> dict[str, str]:
    found = {}
    for one in sorted(directory.rglob("*")):
        name = str(one.relative_to(directory))
        if one.is_symlink():
            found[name] = f"-> {one.readlink()}"
        elif one.is_file():
            found[name] = one.read_text()
        else:
            found[name] = "directory"
    return found


def run(daemon: Daemon, program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"SANDBOXD_SOCKET": str(daemon.socket)}
    return subprocess.run(
        [BIN / program, *arguments],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of a user's, and one for what he knows of sessions."""
    top = Path(tempfile.mkdtemp(prefix="sandboxd-test-"))
    top.chmod(0o755)
    (top / "work" / "src").mkdir(parents=True)
    (top / "work" / "src" / "a").write_text("a\n")
    (top / "state").mkdir()
    for one in top.rglob("*"):
        os.chown(one, USER, USER)
    monkeypatch.setenv("XDG_STATE_HOME", str(top / "state"))
    try:
        yield top / "work"
    finally:
        shutil.rmtree(top)
