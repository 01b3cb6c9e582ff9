"""Commands as plain processes: what every figure is held against."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from measure import Workload

__all__ = ["BarePython", "ForkExec", "Python", "execute"]


def execute(argv: Sequence[str], *, status: int = 0, env: Mapping[str, str] | None = None) -> bytes:
    """Run a command with pipes for its stdio; returns its output. Raises RuntimeError.

    Pipes also because an OCI runtime gives its stdio to the container's root: ``/dev/null`` would be
    the host's.
    """
    done = subprocess.run(argv, input=b"", capture_output=True, check=False, env=env)
    if done.returncode != status:
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{argv[0]} ended with {done.returncode}: {said}")
    return done.stdout


class ForkExec:
    """The command itself, from the host's file system."""

    name = "fork+exec"
    note = "no isolation, the host's programs"

    def run(self, workload: Workload) -> None:
        """Run it."""
        execute(workload.argv, env={"PATH": "/usr/local/bin:/usr/bin:/bin"})  # not a version manager's


class Python:
    """The start of the interpreter that ``run-in-sandbox`` runs on."""

    name = "python3 -c pass"
    note = "the interpreter of the virtual environment"

    def run(self, workload: Workload) -> None:
        """Start it."""
        del workload
        execute([sys.executable, "-c", "pass"])


class BarePython:
    """The same without ``site``, hence without the virtual environment's ``.pth`` files."""

    name = "python3 -I -S -c pass"
    note = "the same without its site-packages"

    def run(self, workload: Workload) -> None:
        """Start it."""
        del workload
        execute([str(Path(sys.executable)), "-I", "-S", "-c", "pass"])
