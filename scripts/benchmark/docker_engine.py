"""``docker run`` and ``docker exec`` on a Docker Engine of this run's own.

It has its own data, socket and containers, and no network.
The engine is given no bridge and no firewall, so it touches nothing of the host's network and needs no
iptables; ``docker run --network none`` is the peer of what the others do.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from processes import execute, perform
from runtimes import CPUS, MEMORY, PIDS, Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import ExitStack

    from measure import Workload

__all__ = ["DockerExec", "DockerRun", "running", "start"]

READY_SECONDS = 30.0


class DockerRun:
    """``docker run --rm`` with the same limits."""

    name = "docker run"
    note = "namespaces, limits and its default filter; no user namespace"

    def __init__(self, host: str) -> None:
        """``host`` is the engine's socket as ``docker -H`` takes it."""
        self._host = host
        self.socket = host.removeprefix("unix://")

    def command(self, *arguments: str) -> list[str]:
        """A command of the client for this engine."""
        return ["docker", "-H", self._host, *arguments]

    def takes(self, workload: Workload) -> bool:
        """All that is a command."""
        return bool(workload.argv)

    def options(self) -> list[str]:
        """What every container gets."""
        options = ["--network", "none", "--read-only", "--cap-drop", "ALL", "--user", "1000:1000"]
        options += ["--security-opt", "no-new-privileges", "--tmpfs", "/tmp", "--tmpfs", "/workspace"]  # noqa: S108
        options += ["--memory", str(MEMORY), "--memory-swap", str(MEMORY)]
        return [*options, "--pids-limit", str(PIDS), "--cpus", str(CPUS)]

    def run(self, workload: Workload) -> None:
        """Run it."""
        options = ["--rm", *(["-i"] if workload.stdin else []), *self.options()]
        perform(self.command("run", *options, f"bench-{workload.image}", *workload.argv), workload)


class DockerExec:
    """``docker exec`` into a container that runs all the time: nothing is fresh but the process."""

    name = "docker exec"
    note = "into a running container, which all calls share"

    def __init__(self, engine: DockerRun, images: Iterable[str]) -> None:
        """Start a container of each image; they end with the engine. Raises RuntimeError."""
        self._engine = engine
        for name in images:
            options = ["-d", "--name", f"bench-{name}", *engine.options()]
            execute(engine.command("run", *options, f"bench-{name}", "sleep", "infinity"))

    def takes(self, workload: Workload) -> bool:
        """All that is a command."""
        return bool(workload.argv)

    def run(self, workload: Workload) -> None:
        """Run it."""
        options = ["-i"] if workload.stdin else []
        perform(self._engine.command("exec", *options, f"bench-{workload.image}", *workload.argv), workload)


def start(stage: Stage, stack: ExitStack) -> tuple[DockerRun | str, DockerExec | str]:
    """Start an engine that ``stack`` stops, import the images; or say why there is none."""
    missing = [name for name in ("dockerd", "docker", "tar") if shutil.which(name) is None]
    if missing:
        why = f"are left out: no {' and no '.join(missing)} on PATH (Debian package docker.io)."
        return f"docker run and docker exec {why}", ""
    try:
        engine = stack.enter_context(running())
        for name, rootfs in stage.rootfs.items():
            _import(engine, rootfs, f"bench-{name}")
    except (OSError, RuntimeError) as error:
        return f"docker run and docker exec are left out: {error}", ""
    try:
        return engine, DockerExec(engine, stage.rootfs)
    except RuntimeError as error:
        return engine, f"docker exec is left out: {error}"


@contextlib.contextmanager
def running() -> Iterator[DockerRun]:
    """An engine for the time of a ``with`` block. Raises OSError, RuntimeError."""
    # overlay2 wants a file system that overlayfs can stand on, and /tmp may be a tmpfs
    directory = Path(tempfile.mkdtemp(prefix="sandboxd-bench-docker-", dir="/var/tmp"))
    host = f"unix://{directory}/docker.sock"
    command = ["dockerd", "-H", host, "-p", str(directory / "pid")]
    command += ["--data-root", str(directory / "data"), "--exec-root", str(directory / "exec")]
    command += ["--cgroup-parent", directory.name]
    command += ["--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"]
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    engine = DockerRun(host)
    try:
        _wait(engine, process, log)
        yield engine
    finally:
        running = subprocess.run(engine.command("ps", "-q"), capture_output=True, text=True, check=False)
        if running.stdout.split():
            subprocess.run(
                engine.command("rm", "-f", *running.stdout.split()), capture_output=True, check=False
            )
        process.terminate()  # it takes its containerd and its mounts with it
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)
        for left in Path("/sys/fs/cgroup").glob(f"**/{directory.name}"):
            left.rmdir()


def _wait(engine: DockerRun, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_SECONDS
    while True:
        try:
            execute(engine.command("version"))
        except RuntimeError:
            if process.poll() is not None or time.monotonic() > until:
                said = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise RuntimeError(f"dockerd does not start: {' '.join(said)}") from None
            time.sleep(0.2)
        else:
            return


def _import(engine: DockerRun, rootfs: Path, name: str) -> None:
    tar = subprocess.Popen(["tar", "-C", rootfs, "--numeric-owner", "-c", "."], stdout=subprocess.PIPE)
    with tar:
        done = subprocess.run(
            engine.command("import", "-", name), stdin=tar.stdout, capture_output=True, check=False
        )
    if done.returncode != 0 or tar.returncode != 0:
        raise RuntimeError(f"docker import: {done.stderr.decode(errors='replace').strip()}")
