"""A container by an OCI runtime, from a bundle."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.engine.bundle import make_config
from sandboxd.engine.launch import Launch

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.engine.presented import SlotMounts
    from sandboxd.engine.runtime import Runtime
    from sandboxd.kernel.cgroup import Cgroup
    from sandboxd.kernel.userns import IdRange
    from sandboxd.plan import Shape

__all__ = ["BundledContainer"]


class BundledContainer(Launch):
    """Implements ``engine.berth.Container`` by ``crun``, ``runc`` or one with their command line."""

    def __init__(
        self, runtime: Runtime, directory: Path, ids: IdRange, cgroup: Cgroup, *, root: Path, control: int
    ) -> None:
        """``directory`` is the bundle, ``root`` the runtime's own directory. Raises OSError."""
        self._runtime = runtime
        self._directory = directory
        self._ids = ids
        self._cgroup = cgroup
        # runc places the container itself, by a path below its own cgroup: it stays in ours
        places = cgroup.procs_files if runtime.dialect == "crun" else ()
        super().__init__(
            runtime.name, runtime.command(root, directory, cgroup.name), control=control, places=places
        )

    def begin(self, shape: Shape, made: SlotMounts, timeout: float) -> None:
        """Write the bundle and let the runtime go. Raises OSError."""
        config = make_config(
            shape,
            made.attached(),
            userns=self._ids.path,
            id_map=(self._ids.base, self._ids.size),
            cgroup=self._cgroup.relative_path if self._runtime.dialect == "runc" else None,
        )
        (self._directory / "config.json").write_text(json.dumps(config))
        self.go(timeout)

    def started(self) -> tuple[int, int]:
        """PID 1 and a pidfd of it, once the runtime has ended. Raises EngineFailed."""
        self.finish()
        try:
            pid = int((self._directory / "pid").read_text())
        except (OSError, ValueError) as error:
            raise errors.EngineFailed(f"{self._runtime.name} wrote no pid: {error}") from error
        return pid, os.pidfd_open(pid)
