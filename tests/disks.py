"""A state directory on a disk that fails when a test says so: the other end of ``faultfs``."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemons import until

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["GROWING", "Disk", "Syncing", "mounted"]

SYNC = "user.faultfs.sync"  # as ``faultfs`` has it

GROWING = ["grow", "create", "mkdir", "link", "symlink"]
"""What a full disk refuses."""


@dataclass(frozen=True)
class Disk:
    """What is mounted ``at``; ``behind`` it is where the files are."""

    at: Path
    behind: Path
    control: Path

    def fail(self, *on: str, do: str, path: str = "", after: int = 1, times: int = 1 << 60) -> None:
        """Let operations on paths go wrong from now on, and nothing else."""
        rule = {"on": on, "path": path, "do": do, "after": after, "times": times}
        self._rules([rule])

    def fill(self) -> None:
        """Let there be no room."""
        self.fail(*GROWING, do="ENOSPC")

    def mend(self) -> None:
        """Let everything go well from now on."""
        self._rules([])

    def _rules(self, rules: list[dict[str, Any]]) -> None:
        new = self.control / "rules.new"
        new.write_text(json.dumps(rules))
        new.replace(self.control / "rules")

    def record(self) -> list[tuple[Any, ...]]:
        """All that was done, once it is mounted no more: the monotonic time in nanoseconds, and what."""
        found = []
        with (self.control / "record").open("rb") as file:
            while True:
                try:
                    found.append(pickle.load(file))
                except EOFError:
                    return found


@dataclass
class Syncing:
    """The C library for who calls syncfs(2): the kernel would not tell the file system of it."""

    disk: Disk
    libc: ctypes.CDLL = field(default_factory=lambda: ctypes.CDLL(None, use_errno=True))

    def syncfs(self, fd: int) -> int:
        try:
            os.setxattr(self.disk.at, SYNC, b"")
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1
        return int(self.libc.syncfs(fd))


@contextmanager
def mounted(directory: Path) -> Iterator[Disk]:
    """A disk of a directory's own."""
    disk = Disk(directory / "disk", directory / "behind", directory / "control")
    for path in (disk.at, disk.behind, disk.control):
        path.mkdir(parents=True)
    disk.mend()
    program = [sys.executable, str(Path(__file__).parent / "faultfs.py")]
    program += [str(path) for path in (disk.behind, disk.at, disk.control)]
    with (directory / "faultfs.log").open("wb") as log:
        process = subprocess.Popen(program, stdout=log, stderr=log)
    try:
        until(lambda: disk.at.is_mount() or process.poll() is not None, "the file system is there")
        assert disk.at.is_mount(), (directory / "faultfs.log").read_text()
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk.at], check=False)
        process.terminate()  # a daemon of somebody else may have got the mount with all others, and keep it
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
