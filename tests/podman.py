"""A Podman of a test's own: its data, socket, containers, locks are nobody else's. The client is Docker's."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path

from dockerd import Dockerd, remove_cgroups

CONFIG = """
[engine]
lock_type = "file"
events_logger = "file"
cgroup_manager = "cgroupfs"
runtime = "runc"
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
"""  # more than its own limits it may not be able to give
REGISTRIES = """
[[registry]]
location = "127.0.0.1"
insecure = true
"""
PARENT = "libpod_parent"  # of every Podman's containers


class Podman(Dockerd):
    """The service by which Podman has an API; its containers go on without it."""

    containers_conf = ""
    """Further lines of the section ``containers`` of its configuration."""

    def start(self) -> None:
        """Start it, and wait until it answers."""
        environment = {"TMPDIR": str(self.directory)}
        config = CONFIG.format(
            files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            processes=Path("/proc/sys/kernel/pid_max").read_text().strip(),  # to which it lowers its own
        )
        config += self.containers_conf
        for name, text in {"CONTAINERS_CONF": config, "CONTAINERS_REGISTRIES_CONF": REGISTRIES}.items():
            file = self.directory / name.lower()
            file.write_text(text)
            environment[name] = str(file)
        at = {"root": "data", "runroot": "run", "tmpdir": "tmp"}
        command = [
            *self._before,
            "podman",
            *(f"--{option}={self.directory / name}" for option, name in at.items()),
        ]
        command += ["--storage-driver=overlay", *self._options]
        command += ["system", "service", "--time=0", f"unix://{self.socket}"]
        self.serve(command, os.environ | environment)

    @property
    def pid(self) -> int:
        """The service's process."""
        assert self.process is not None
        return self.process.pid

    def clear_away(self) -> None:
        """End what is left of it: its containers have cgroups among those of other Podmans."""
        for file in self.directory.rglob("pause.pid"):  # of a rootless one, which keeps its namespaces by it
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        ids = [path.name for path in (self.directory / "data" / "overlay-containers").glob("*")]
        super().clear_away()
        for parent in Path("/sys/fs/cgroup").glob(f"*/{PARENT}"):
            for one in ids:
                remove_cgroups(parent / f"libpod-{one}")
            for path in (parent / "conmon", parent):
                with suppress(OSError):  # not there, or another's containers are
                    path.rmdir()
