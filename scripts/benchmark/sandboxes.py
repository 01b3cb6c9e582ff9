"""sandboxd itself: daemons of this run's own, asked in this process and by ``run-in-sandbox``.

Everything is as shipped: every control in force and read back, the journal synced. What differs between
the rows is configuration: ``cold`` makes each container when its call arrives (``pool: {min: 0, max: 0}``),
``warm`` has some waiting, and the policy ``interpreter`` has an interpreter waiting in them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from processes import chunks, execute, perform

from sandboxd import Client, errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from measure import Workload

__all__ = [
    "BY_CRUN",
    "COLD",
    "CRUN",
    "UNMAPPED",
    "WARM",
    "Command",
    "CommandStart",
    "Cpu",
    "Daemon",
    "InProcess",
    "prepare",
    "start",
]

POLICIES = {"base": "default", "python": "plain"}
UNMAPPED = {"base": "unmapped", "python": "unmapped-python"}
"""Of the same limits, for an engine that gives no user namespace to a container."""
INTERPRETERS = {True: "numeric", False: "python"}  # by whether the workload imports numpy
COLD, WARM = "pool: {min: 0, max: 0}\n", "pool: {min: 4, max: 16}\n"
CRUN = f"{COLD}runtime: crun\n"
BY_CRUN = "sandboxd, cold by crun"
EXTRA = {
    "loud": "extends: default\nlimits:\n  stdout: 2GiB\n",
    "small": (
        "extends: default\nlimits:\n  wall: 10m\n  memory: 32MiB\n  workspace: {size: 8MiB, inodes: 1k}\n"
        "  tmp: {size: 8MiB, inodes: 1k}\n"
    ),
    "plain": "extends: python\nwarm: !remove\n",
    "numeric": "extends: python\nwarm: {command: python3, preload: [numpy]}\n",
    "roomy": "extends: python\nlimits: {wall: 10m, workspace: {size: 400MiB, inodes: 200k}}\n",
    "unmapped": "extends: default\nprocess: {user_namespace: none}\n",
    "unmapped-python": "extends: plain\nprocess: {user_namespace: none}\n",
}
READY_SECONDS = 60.0
BIN = Path(sys.executable).parent
TICKS = os.sysconf("SC_CLK_TCK")
Cpu = tuple[float, float]
"""Seconds of CPU of the daemon's own processes, and of the processes that they have waited for."""


class Daemon:
    """A running daemon, its socket, and how many calls it was asked for."""

    def __init__(self, pid: int, socket: Path) -> None:
        """What was started; see ``start``."""
        self.pid = pid
        self.socket = socket
        self.calls = 0
        self.ready = 0.0
        """Seconds from its start to its first answer."""
        self._before = self._cpu()

    def _cpu(self) -> Cpu:
        # proc_pid_stat(5): fields 14 to 17, counted from the end of the name
        found = [0.0, 0.0]
        for pid in self._processes():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user, system, child_user, child_system = (int(field) / TICKS for field in fields[11:15])
            found = [found[0] + user + system, found[1] + child_user + child_system]
        return found[0], found[1]

    def _processes(self) -> list[int]:
        """The one that serves callers, and the one that makes containers."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        engine = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "sandboxd-engine\n"]
        return [self.pid, *map(int, engine)]

    def cpu_per_call(self) -> Cpu:
        """Seconds of CPU for each call since the start; both 0 before the first."""
        own, children = (now - before for now, before in zip(self._cpu(), self._before, strict=True))
        calls = max(1, self.calls)
        return own / calls, children / calls

    def runtime(self) -> str:
        """The runtime that it picked."""
        return Client(self.socket).health().runtime

    def refusal(self, policy: str) -> str:
        """Why it does not have a policy, or nothing."""
        try:
            Client(self.socket).policy(policy)
        except errors.Refused as error:
            return str(error)
        return ""

    def memory(self) -> int:
        """Bytes that its processes hold, what they share counted once: Pss of proc_pid_smaps(5)."""
        return sum(_bytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss") for pid in self._processes())

    def peak(self) -> int:
        """Bytes that the process which serves callers held at most, since ``forget_peak``."""
        return _bytes(Path(f"/proc/{self.pid}/status"), "VmHWM")

    def forget_peak(self) -> None:
        """Count ``VmHWM`` from now: proc_pid_clear_refs(5)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def descriptors(self) -> int:
        """How many its processes have open."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self._processes())


def _bytes(file: Path, name: str) -> int:
    """A line such as ``Pss:  100 kB`` of a file in ``/proc``."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def start(images: Path, config: str = "", *, directory: Path | None = None) -> Iterator[Daemon]:
    """A daemon on a state directory of its own, on disk since its journal is. Raises RuntimeError.

    ``directory`` is one that an earlier daemon had, or one prepared; else a new one that is removed.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            made = tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/var/tmp")
            directory = Path(stack.enter_context(made))
        prepare(directory, images, config)
        socket, log = directory / "s", directory / "log"
        command = [str(BIN / "sandboxd"), "serve", "--config", str(directory / "sandboxd.yaml")]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            began = time.monotonic()
            _wait(process, socket, log)
            daemon = Daemon(process.pid, socket)
            daemon.ready = time.monotonic() - began
            yield daemon
        finally:
            process.terminate()
            process.wait()


def prepare(directory: Path, images: Path, config: str = "") -> None:
    """A state directory, policies and a configuration."""
    state, policies = directory / "state", directory / "policies"
    state.mkdir(exist_ok=True)
    policies.mkdir(exist_ok=True)
    if not (state / "images").exists():
        (state / "images").symlink_to(images)
    for name, text in EXTRA.items():
        (policies / f"{name}.yaml").write_text(f"version: 1\nname: {name}\n{text}")
    where = f"state: {state}\nsocket: {{path: {directory}/s}}\npolicies: [{policies}]\n"
    (directory / "sandboxd.yaml").write_text(where + config)


def _wait(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    until = time.monotonic() + READY_SECONDS
    while True:
        try:
            Client(socket).health()
        except errors.Unavailable:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the daemon does not start:\n{log.read_text()}") from None
            time.sleep(0.005)
        else:
            return


class InProcess:
    """The Python client, in the process that measures."""

    def __init__(
        self,
        daemon: Daemon,
        kind: str,
        note: str,
        *,
        interpreter: bool = False,
        policies: Mapping[str, str] = POLICIES,
    ) -> None:
        """Asks ``daemon``, under policies with an ``interpreter`` or none; ``kind`` is part of its name.

        ``policies``: by the workload's image.
        """
        self.name = f"sandboxd, {kind}"
        self.note = note
        self._daemon = daemon
        self._client = Client(daemon.socket, timeout=120.0)
        self._interpreter = interpreter
        self._policies = policies

    def takes(self, workload: Workload) -> bool:
        """All that is a command; with an interpreter what starts Python."""
        return bool(workload.argv) and (not self._interpreter or workload.argv[0] == "python3")

    def run(self, workload: Workload) -> None:
        """Run it."""
        self._daemon.calls += 1
        try:
            if workload.stdin:
                self._pour(workload)
                return
            policy = self._policies[workload.image]
            if self._interpreter:
                policy = INTERPRETERS["numpy" in workload.argv[-1]]
            done = self._client.run(list(workload.argv), policy=policy)
        except errors.SandboxdError as error:
            raise RuntimeError(str(error)) from error
        if done.outcome is None or done.outcome.exit_code != 0:
            raise RuntimeError(f"{done.outcome}")

    def _pour(self, workload: Workload) -> None:
        call = self._client.start(list(workload.argv), policy="loud", stdin="stream")
        send = self._client.write_stdin
        feeder = threading.Thread(target=lambda: send(call.id, chunks(workload.stdin)))
        feeder.start()
        with self._client.stdout(call.id, follow=True) as stream:
            size = sum(len(data) for data in stream)
        feeder.join()
        if size != workload.stdin:
            raise RuntimeError(f"{size} of {workload.stdin} bytes came back")


class Command:
    """``run-in-sandbox``, as agents start it."""

    name = "sandboxd, run-in-sandbox"
    note = "the warm one, with the start of the command"

    def __init__(self, daemon: Daemon) -> None:
        """Asks ``daemon``."""
        self._daemon = daemon

    def takes(self, workload: Workload) -> bool:
        """All that is a command."""
        return bool(workload.argv)

    def run(self, workload: Workload) -> None:
        """Run it."""
        self._daemon.calls += 1
        policy = "loud" if workload.stdin else POLICIES[workload.image]
        options = ["--socket", str(self._daemon.socket), "--policy", policy]
        options += ["-i"] if workload.stdin else []
        perform([str(BIN / "run-in-sandbox"), *options, "--", *workload.argv], workload)


class CommandStart:
    """``run-in-sandbox`` up to its connection: the socket is not there, and it says so."""

    name = "run-in-sandbox"
    note = "all that it does before it connects, and its end"

    def takes(self, workload: Workload) -> bool:
        """Starts alone."""
        return not workload.argv

    def run(self, workload: Workload) -> None:
        """Start it."""
        del workload
        execute([str(BIN / "run-in-sandbox"), "--socket", "/nonexistent", "--", "true"], status=125)
