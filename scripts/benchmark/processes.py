"""Commands as plain processes: what every figure is held against."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from measure import Workload

__all__ = ["BarePython", "ForkExec", "Python", "chunks", "execute", "perform"]

CHUNK = bytes(2**20)


def chunks(size: int) -> Iterator[bytes]:
    """So many bytes, in pieces."""
    while size > 0:
        yield CHUNK[:size]
        size -= len(CHUNK)


def execute(argv: Sequence[str], *, status: int = 0, env: Mapping[str, str] | None = None) -> bytes:
    """Run a command with pipes for its stdio; returns its output. Raises RuntimeError.

    Pipes also because an OCI runtime gives its stdio to the container's root: ``/dev/null`` would be
    the host's.
    """
    done = subprocess.run(argv, input=b"", capture_output=True, check=False, env=env)
    if done.returncode != status:
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{Path(argv[0]).name} ended with {done.returncode}: {said}")
    return done.stdout


def perform(argv: Sequence[str], workload: Workload, env: Mapping[str, str] | None = None) -> None:
    """Run a command for a workload, with its bytes through it if it has any. Raises RuntimeError."""
    if not workload.stdin:
        execute(argv, env=env)
        return
    # communicate() writes in pieces of a page: it would be what is measured.
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, bufsize=0, env=env)
    with process:
        assert process.stdin is not None  # noqa: S101 - for mypy, as below
        assert process.stdout is not None  # noqa: S101
        feeder = threading.Thread(target=_feed, args=(process.stdin, workload.stdin))
        feeder.start()
        size = 0
        while data := process.stdout.read(len(CHUNK)):
            size += len(data)
        feeder.join()
    if process.returncode or size != workload.stdin:
        raise RuntimeError(f"{Path(argv[0]).name} ended with {process.returncode} after {size} bytes")


def _feed(target: Any, size: int) -> None:
    with contextlib.suppress(BrokenPipeError), target:
        for data in chunks(size):
            view = memoryview(data)
            while view:
                view = view[target.write(view) :]


class ForkExec:
    """The command itself, from the host's file system."""

    name = "fork+exec"
    note = "no isolation, the host's programs"

    def takes(self, workload: Workload) -> bool:
        """All of them."""
        return bool(workload.argv)

    def run(self, workload: Workload) -> None:
        """Run it."""
        # not a version manager's python3
        perform(workload.argv, workload, env={"PATH": "/usr/local/bin:/usr/bin:/bin"})


class Python(ForkExec):
    """The start of the interpreter that ``run-in-sandbox`` runs on."""

    name = "python3 -c pass"
    note = "the interpreter of the virtual environment"
    options: tuple[str, ...] = ()

    def takes(self, workload: Workload) -> bool:
        """Starts alone."""
        return not workload.argv

    def run(self, workload: Workload) -> None:
        """Start it."""
        del workload
        execute([sys.executable, *self.options, "-c", "pass"])


class BarePython(Python):
    """The same without ``site``, hence without the virtual environment's ``.pth`` files."""

    name = "python3 -I -S -c pass"
    note = "the same without its site-packages"
    options = ("-I", "-S")
