"""What the host is, as far as results depend on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Host"]

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Host:
    """Facts of the host, for the report and for ``expected``."""

    kernel: str
    architecture: str
    python: str
    cpus: int
    memory: int
    """Bytes."""
    cgroup: str
    """``v1``, ``v1 hybrid`` or ``v2``."""

    @classmethod
    def look(cls) -> Host:
        """This one."""
        return cls(
            kernel=platform.release(),
            architecture=platform.machine(),
            python=platform.python_version(),
            cpus=len(os.sched_getaffinity(0)),
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            cgroup=_cgroup(),
        )

    def traits(self, images: Path | None) -> frozenset[str]:
        """Those that ``expected`` may name; ``images`` is where the images lie, if that is known."""
        found = {f"cgroup {self.cgroup.split(' ')[0]}"}
        if images is None or not os.major(images.stat().st_dev):
            found.add("no disk")
        return frozenset(found)


def _cgroup() -> str:
    if (CGROUP / "cgroup.controllers").exists():
        return "v2"
    return "v1 hybrid" if (CGROUP / "unified/cgroup.procs").exists() else "v1"
