"""What the bench installs for itself: peers from PyPI and npm, and matplotlib, below a cache directory.

Nothing of it gets into the project's own environment. What cannot be had is a sentence for the report, with
the last line of what the installer said. Debian packages are ``scripts/bench``'s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["Installation"]

PATIENCE = 300.0


class Installation:
    """A directory with a virtual environment and npm's modules."""

    def __init__(self) -> None:
        """The directory is made when something is installed."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.directory = home / "sandboxd-bench"
        self.python = self.directory / "venv" / "bin" / "python"

    def from_pypi(self, project: str, check: str) -> Path:
        """Install a project unless ``check`` (a statement) runs; returns the scripts' directory.

        Raises RuntimeError.
        """
        if not self.python.exists():
            venv.create(self.directory / "venv", with_pip=True, clear=True)
        if self._fails([str(self.python), "-c", check]):
            pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
            if said := self._fails([*pip, "install", project]):
                raise RuntimeError(f"pip install {project}: {said}")
            if said := self._fails([str(self.python), "-c", check]):
                raise RuntimeError(f"{project} is installed and does not work: {said}")
        return self.python.parent

    def from_npm(self, package: str, command: str) -> Path:
        """Install a package; returns its command. Raises RuntimeError."""
        found = self.directory / "node" / "node_modules" / ".bin" / command
        if not found.exists():
            if shutil.which("npm") is None:
                raise RuntimeError("no npm on PATH (Debian package npm)")
            directory = self.directory / "node"
            directory.mkdir(parents=True, exist_ok=True)
            npm = ["npm", "--prefix", str(directory), "install", "--no-audit", "--no-fund", package]
            if said := self._fails(npm):
                raise RuntimeError(f"npm install {package}: {said}")
        return found

    @staticmethod
    def _fails(argv: list[str]) -> str:
        """Nothing if it succeeds, else the last line that it wrote."""
        print(f"  {' '.join(argv[:6])}", file=sys.stderr)
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        lines = [*done.stderr.splitlines(), *done.stdout.splitlines()]
        return "" if done.returncode == 0 else next(iter(lines[::-1]), f"status {done.returncode}")
