"""Real daemons for tests: started as a user would start one, on a state directory of their own.

The images are those of ``SANDBOXD_TEST_STATE``, built once by ``scripts/test`` and shared by symbolic
link; everything else of a daemon is below a temporary directory. ``daemon`` serves the whole session;
a test that kills or configures one starts its own with ``start_daemon``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from sandboxd import Client, errors
from sandboxd.api.descriptors import path_beside
from sandboxd.engine.host import instance_name
from sandboxd.kernel import cgroupfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.models import Invocation

SANDBOXD = Path(sys.executable).with_name("sandboxd")
RUN_IN_SANDBOX = Path(sys.executable).with_name("run-in-sandbox")
IMAGES = Path(os.environ.get("SANDBOXD_TEST_STATE", "/var/lib/sandboxd-test")) / "images"
PATIENCE = float(os.environ.get("SANDBOXD_TEST_PATIENCE", "1"))
"""How many times longer than usual to wait for what has to happen: on a machine that is emulated, some."""
READY_SECONDS = 20.0 * PATIENCE
# Most tests count containers, so none waits for them; those of the pool configure one.
POOLED = os.environ.get("SANDBOXD_TEST_POOL") == "1"
POOL = "pool: {min: 2, max: 4}\n" if POOLED else "pool: {min: 0, max: 0}\n"

KILLED: set[str] = set()
"""Instances whose last daemon did not end by itself."""

# Policies for tests alone, beside the shipped ones.
POLICIES = {
    "host": "version: 1\nname: host\nextends: default\nimage: host\n",
    "tiny": (
        "version: 1\nname: tiny\nextends: default\nlimits:\n  wall: 10s\n  memory: 64MiB\n  pids: 32\n"
        "  workspace: {size: 16MiB, inodes: 4k}\n  tmp: {size: 16MiB, inodes: 4k}\n"
    ),
    "loud": "version: 1\nname: loud\nextends: default\nlimits:\n  stdout: 2GiB\n  stderr: 2GiB\n",
    "files": 'version: 1\nname: files\nextends: default\nartifacts:\n  - {path: "**", max_size: 5MiB}\n',
}


@dataclass
class Daemon:
    """A running daemon. ``policies`` is a directory of its own that it watches."""

    process: subprocess.Popen[bytes]
    socket: Path
    state: Path
    policies: Path
    log: Path

    def client(self, timeout: float = 100.0) -> Client:
        """A client of this daemon."""
        return Client(self.socket, timeout=timeout * PATIENCE)

    def run(self, *argv: str, policy: str = "default", **options: object) -> Invocation:
        """Run a command and wait for its end."""
        return self.client().run(list(argv), policy=policy, **options)  # type: ignore[arg-type]

    def cli(
        self, *argv: str, stdin: bytes = b"", timeout: float = 100.0
    ) -> subprocess.CompletedProcess[bytes]:
        """``run-in-sandbox`` against this daemon."""
        return subprocess.run(
            [RUN_IN_SANDBOX, "--socket", self.socket, *argv],
            input=stdin,
            capture_output=True,
            timeout=timeout * PATIENCE,
            check=False,
        )

    def sandboxd(self, *argv: str) -> str:
        """What ``sandboxd`` with these arguments prints, asked of this daemon."""
        command = [str(SANDBOXD), *argv, "--socket", str(self.socket)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60 * PATIENCE)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    @property
    def engine(self) -> int:
        """Its other process, which has the engine and whose children the containers are."""
        return next(
            child.pid
            for child in psutil.Process(self.process.pid).children()
            if child.name() == "sandboxd-engine"
        )

    @property
    def processes(self) -> list[int]:
        """The one that serves callers, and the one that has the engine."""
        return [self.process.pid, self.engine]

    def admit_everybody(self) -> None:
        """Let any user reach the socket; who gets in is then for the configuration alone to say."""
        for directory in self.socket.parents:
            if not directory.stat().st_mode & 0o001:
                directory.chmod(directory.stat().st_mode | 0o011)
        self.socket.chmod(0o666)
        path_beside(self.socket).chmod(0o666)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60 * PATIENCE)


@contextmanager
def start_daemon(
    directory: Path, *, config: str = "", state: Path | None = None, ready: bool = True
) -> Iterator[Daemon]:
    """A daemon below a directory; ``config`` is appended to its configuration file.

    Without ``ready`` nobody waits until it serves, which it may never do.
    """
    state = state or directory / "state"
    state.mkdir(parents=True, exist_ok=True)
    images = state / "images"
    if not images.exists():
        IMAGES.mkdir(parents=True, exist_ok=True)
        images.symlink_to(IMAGES)
    policies = directory / "policies"
    policies.mkdir(exist_ok=True)
    for name, text in POLICIES.items():
        (policies / f"{name}.yaml").write_text(text)
    file = directory / "sandboxd.yaml"
    socket = f"{{path: {directory}/s, mode: '0660', group: nogroup}}"
    if "pool:" not in config:
        config += POOL
    if not re.search("^policies:", config, re.MULTILINE):
        config += f"policies: [{policies}]\n"
    file.write_text(f"state: {state}\nsocket: {socket}\n{config}")
    log = directory / "log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [SANDBOXD, "serve", "--config", file], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    daemon = Daemon(process, directory / "s", state, policies, log)
    try:
        if ready:
            _until_ready(daemon)
        yield daemon
    finally:
        (KILLED.discard if daemon.stop() >= 0 else KILLED.add)(instance_name(state))


def _until_ready(daemon: Daemon) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        try:
            daemon.client().health()
        except errors.Unavailable:
            if daemon.process.poll() is not None:
                break
            time.sleep(0.02)
        else:
            return
    pytest.fail(f"the daemon did not start:\n{daemon.log.read_text()}")


def waited(call: Invocation) -> bool:
    """Whether the call's container was there before the call."""
    assert call.receipt is not None, call.outcome
    return call.receipt.read_at < call.times.accepted


MAKERS = {"sandboxd-launch", "sandboxd-container"}


def berths_of(daemon: Daemon) -> dict[int, str]:
    """Processes that wait for a container to make or to be, by pid, and the names of their cgroups."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess, StopIteration):
        for child in psutil.Process(daemon.engine).children():
            with contextlib.suppress(psutil.Error):
                if child.name() in MAKERS and child.cmdline()[1:2] != ["userns"]:
                    found[child.pid] = child.cmdline()[-1]
    return found


def pooled_slots(daemon: Daemon) -> set[str]:
    """With SANDBOXD_TEST_POOL, the ids of containers that no call has had: they may stay."""
    if not POOLED:
        return set()
    try:
        return {slot.id for slot in daemon.client().slots() if slot.id and slot.state == "waiting"}
    except errors.Unavailable:
        return set()


def slots_of(daemon: Daemon) -> list[str]:
    """Cgroups of containers that this daemon holds, in every hierarchy, and processes in them."""
    tree = f"sandboxd-{instance_name(daemon.state)}"
    waiting = berths_of(daemon)
    ready = pooled_slots(daemon)
    found = [
        path
        for path, _, _ in os.walk("/sys/fs/cgroup")  # others come and go
        if f"/{tree}/" in path and Path(path).name not in {*waiting.values(), *ready}
    ]
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in waiting:
            try:
                text = (process / "cgroup").read_text()
                if f"/{tree}/" in text and text.partition(f"/{tree}/")[2].split("\n")[0] not in ready:
                    found.append(f"process {process.name}")
            except OSError:  # it ended meanwhile
                continue
    return found


def until(condition: Callable[[], object], what: str, seconds: float = 15.0) -> None:
    """Wait for a condition, or fail."""
    end = time.monotonic() + seconds * PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what}, not within {seconds * PATIENCE:g} s"
        time.sleep(0.02)


def needs_containers() -> None:
    """Skip on a machine that cannot make containers; fail there in CI."""
    if os.geteuid() == 0:
        return
    if os.environ.get("CI") == "true":
        pytest.fail("CI must run as root")
    pytest.skip("containers need root")


@pytest.fixture(scope="session", autouse=True)
def killed_daemons(leak_session: object) -> Iterator[None]:
    """Takes away what daemons left that were killed and have no next one: it would do that at its start.

    Not what a process is still in: those end with their daemon.
    """
    yield
    for name in KILLED:
        for top in cgroupfs.named("/sys/fs/cgroup", f"sandboxd-{name}"):
            until(partial(cgroupfs.remove_tree, top), f"nobody is in {top}")
        with contextlib.suppress(FileNotFoundError):
            Path(f"/run/sandboxd-{name}").rmdir()
        shutil.rmtree(f"/run/sandboxd-{name}-docker", ignore_errors=True)


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The session's daemon."""
    needs_containers()
    directory = tmp_path_factory.mktemp("daemon")
    with start_daemon(directory) as running:
        yield running


@pytest.fixture
def daemon_factory(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons of a test's own; all are stopped at its end."""
    needs_containers()
    with ExitStack() as stack:

        def start(*, config: str = "", state: Path | None = None, name: str = "own") -> Daemon:
            directory = tmp_path / name
            directory.mkdir(exist_ok=True)
            return stack.enter_context(start_daemon(directory, config=config, state=state))

        yield start
