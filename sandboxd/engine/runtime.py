"""What can make a container: the built-in runtime, and OCI runtimes with their command lines."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sandboxd import errors
from sandboxd.init import CONTAINER

__all__ = ["Runtime", "find_runtimes"]


@dataclass(frozen=True)
class Runtime:
    """The built-in runtime, or an OCI runtime: ``dialect`` says whose command line it understands."""

    path: str
    dialect: Literal["builtin", "crun", "runc"]

    @property
    def name(self) -> str:
        """The name that a receipt shows."""
        return "builtin" if self.dialect == "builtin" else Path(self.path).name

    def command(self, root: Path, slot: Path, name: str) -> list[str]:
        """The argv that makes and starts a container and then exits."""
        options = ["--cgroup-manager=disabled"] if self.dialect == "crun" else []
        return [
            self.path,
            "--root",
            str(root),
            *options,
            "run",
            "--detach",
            "--preserve-fds",
            "1",
            "--pid-file",
            str(slot / "pid"),
            "--bundle",
            str(slot),
            name,
        ]


def find_runtimes(wanted: str) -> list[Runtime]:
    """The runtimes to try, best first: ``auto``, ``builtin``, ``crun``, ``runc``, or a path.

    Raises HostUnsupported.
    """
    builtin = Runtime(str(CONTAINER), "builtin")
    if wanted == "auto":
        others: tuple[Literal["crun", "runc"], ...] = ("crun", "runc")
        found = [builtin, *(Runtime(path, kind) for kind in others if (path := shutil.which(kind)))]
    elif wanted == "builtin":
        found = [builtin]
    elif path := shutil.which(wanted):
        found = [Runtime(path, "crun" if "crun" in Path(path).name else "runc")]
    else:
        found = []
    if not found:
        raise errors.HostUnsupported(f"no OCI runtime ({wanted}) on PATH; install crun or runc")
    return found
