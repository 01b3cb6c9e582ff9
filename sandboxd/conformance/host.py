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
    container: bool
    """Whether this host is itself a container."""

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
            container=_in_container(),
        )

    def traits(self, images: Path | None) -> frozenset[str]:
        """Those that ``expected`` may name; ``images`` is where the images lie, if that is known."""
        found = {f"cgroup {self.cgroup.split(' ')[0]}"}
        if self.container:
            found.add("container")
        if images is None or not os.major(images.stat().st_dev):
            found.add("no disk")
        return frozenset(found)


def _cgroup() -> str:
    if (CGROUP / "cgroup.controllers").exists():
        return "v2"
    return "v1 hybrid" if (CGROUP / "unified/cgroup.procs").exists() else "v1"


def _in_container() -> bool:
    # systemd.exec(5): the manager of a container tells PID 1 so; Docker leaves a file instead.
    marks = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")
    return any(Path(mark).exists() for mark in marks)
