"""A Docker Engine of a test's own: its data, socket, containers and cgroups are nobody else's.

It has no bridge and touches neither the host's network nor its firewall. The engine that a host runs is
never asked anything.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from archives import docker_save

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

READY_SECONDS = 60.0
FIRST = 3_000_000_000
ACCOUNT = """
set -e
for file in subuid subgid; do
  echo sandboxd-remap:{first}:65536 >{at}/$file
  [ -e /etc/$file ] || : >/etc/$file
  mount --bind {at}/$file /etc/$file
done
cp /etc/passwd /etc/group {at}
echo sandboxd-remap:x:2999:2999::/:/bin/false >>{at}/passwd
echo sandboxd-remap:x:2999: >>{at}/group
for file in passwd group; do mount --bind {at}/$file /etc/$file; done
"""
"""Makes an account whose ids an engine remaps to, which only its own mount namespace has."""


class Dockerd:
    """One engine; ``start`` after ``stop`` or ``kill`` has the same data."""

    def __init__(self, directory: Path, *options: str, before: Sequence[str] = ()) -> None:
        """``before`` is a command that executes what is appended to it."""
        self.directory = directory
        self.socket = directory / "docker.sock"
        self.parent = f"test{directory.name}"
        self._options = options
        self._before = before
        self.process: subprocess.Popen[bytes] | None = None
        self._containerd: subprocess.Popen[bytes] | None = None

    def _start_containerd(self) -> Path:
        """A containerd that outlives the engine, as the service of a host does; returns its socket."""
        address = self.directory / "containerd.sock"
        if self._containerd is None:
            config = self.directory / "containerd.toml"
            config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
            command = ["containerd", "--config", str(config), "--address", str(address)]
            command += ["--root", str(self.directory / "images"), "--state", str(self.directory / "state")]
            with (self.directory / "containerd.log").open("ab") as log:
                self._containerd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return address

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # with mounts of its own it has to have a containerd of its own, which sees them
        containerd = [] if self._before else ["--containerd", str(self._start_containerd())]
        command = [*self._before, "dockerd", "-H", f"unix://{self.socket}", "-p", str(self.directory / "pid")]
        command += ["--data-root", str(self.directory / "data"), "--exec-root", str(self.directory / "exec")]
        command += ["--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"]
        command += ["--cgroup-parent", f"/{self.parent}", *containerd, *self._options]
        (self.directory / "pid").unlink(missing_ok=True)
        self.serve(command, os.environ)

    def serve(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a service, and wait until it answers."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.directory
            )
        until = time.monotonic() + READY_SECONDS
        while self.docker("version", check=False).returncode:
            said = (self.directory / "log").read_text(errors="replace")[-2000:]
            assert self.process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        """The engine's process."""
        assert self.process is not None
        return int((self.directory / "pid").read_text())

    def stop(self) -> None:
        """Stop it as its service does: its containers end with it."""
        assert self.process is not None
        os.kill(self.pid, signal.SIGTERM)
        self.process.wait(timeout=60)

    def kill(self) -> None:
        """Kill it: its containers go on, and its containerd is left."""
        assert self.process is not None
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(timeout=60)

    def docker(
        self, *arguments: str, check: bool = True, data: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """The client's command line."""
        return subprocess.run(
            ["docker", "-H", f"unix://{self.socket}", *arguments],
            input=data,
            capture_output=True,
            check=check,
        )

    def containers(self, *options: str) -> list[str]:
        """Names of all containers."""
        return self.docker("ps", "-a", "--format", "{{.Names}}", *options).stdout.decode().split()

    def volumes(self) -> list[str]:
        """Names of all volumes."""
        return self.docker("volume", "ls", "-q").stdout.decode().split()

    def inspect(self, name: str) -> dict[str, Any]:
        """What the engine says of an image or container."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", name).stdout)
        return found[0]

    def load(self, rootfs: bytes, tag: str, config: dict[str, Any] | None = None) -> None:
        """An image as a registry could give it: one layer and a configuration that is anything."""
        self.docker("load", data=docker_save(rootfs, tag=tag, settings=config))

    def clear_away(self) -> None:
        """End what is left of it: processes of its directory, mounts, cgroups, files."""
        if self._containerd is not None:
            self._containerd.terminate()
            self._containerd.wait(timeout=60)
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.directory) in word for word in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    process.wait(60)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if f"{self.directory}/" in line.split(" ")[4]:
                subprocess.run(["umount", "-l", line.split(" ")[4]], check=False, capture_output=True)
        for top in (*Path("/sys/fs/cgroup").glob(f"*/{self.parent}"), Path("/sys/fs/cgroup", self.parent)):
            remove_cgroups(top)
        shutil.rmtree(self.directory, ignore_errors=True)


def remove_cgroups(top: Path) -> None:
    """Kill what is in a cgroup and those below it, and remove them; there may be none."""
    for path, _, _ in os.walk(top, topdown=False):
        _remove_cgroup(Path(path))


def _remove_cgroup(path: Path) -> None:
    until = time.monotonic() + 10
    while True:
        for pid in (path / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


@contextmanager
def own_engine(
    *options: str,
    before: Sequence[str] = (),
    under: Path = Path("/var/tmp"),
    kind: type[Dockerd] = Dockerd,
) -> Iterator[Dockerd]:
    """An engine that runs; ``under`` is on a file system that overlayfs can stand on."""
    directory = Path(tempfile.mkdtemp(prefix="sandboxd-dockerd-", dir=under))
    directory.chmod(0o711)
    engine = kind(directory, *options, before=before)
    try:
        engine.start()
        yield engine
        for name in engine.containers() if engine.process and engine.process.poll() is None else ():
            engine.docker("rm", "-f", name, check=False)
        if engine.process and engine.process.poll() is None:
            engine.stop()
    finally:
        engine.clear_away()


@contextmanager
def remapping(at: Path) -> Iterator[Dockerd]:
    """An engine that has ids of its own for all its containers; ``at`` is a directory for its account."""
    script = f'{ACCOUNT.format(at=at, first=FIRST)}exec "$@"'
    before = ["unshare", "-m", "sh", "-c", script, "--"]
    with own_engine("--userns-remap=sandboxd-remap", before=before) as engine:
        yield engine
