"""sandboxd itself: a daemon of this run's own, asked in this process and by ``run-in-sandbox``.

Every call gets a container that is made when the call arrives (the cold path), under a shipped policy,
with its receipt read and its journal synced.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from processes import execute

from sandboxd import Client, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from measure import Workload

__all__ = ["Command", "CommandStart", "Cpu", "Daemon", "InProcess", "start"]

POLICIES = {"base": "default", "python": "python"}
READY_SECONDS = 30.0
BIN = Path(sys.executable).parent
TICKS = os.sysconf("SC_CLK_TCK")
Cpu = tuple[float, float]
"""Seconds of CPU of the daemon itself, and of the processes that it has waited for: the runtimes."""


class Daemon:
    """A running daemon, its socket, and how many calls it was asked for."""

    def __init__(self, pid: int, socket: Path) -> None:
        """What was started; see ``start``."""
        self.pid = pid
        self.socket = socket
        self.calls = 0
        self._before = self._cpu()

    def _cpu(self) -> Cpu:
        # proc_pid_stat(5): fields 14 to 17, counted from the end of the name
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        user, system, child_user, child_system = (int(field) / TICKS for field in fields[11:15])
        return user + system, child_user + child_system

    def cpu_per_call(self) -> Cpu:
        """Seconds of CPU for each call since the start; both 0 before the first."""
        own, children = (now - before for now, before in zip(self._cpu(), self._before, strict=True))
        calls = max(1, self.calls)
        return own / calls, children / calls

    def runtime(self) -> str:
        """The runtime that it picked."""
        return Client(self.socket).health().runtime


@contextlib.contextmanager
def start(images: Path) -> Iterator[Daemon]:
    """A daemon with an empty state directory, on disk since its journal is. Raises RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        (directory / "state").mkdir()
        (directory / "state" / "images").symlink_to(images)
        socket, log = directory / "s", directory / "log"
        command = [
            str(BIN / "sandboxd"),
            "serve",
            "--socket",
            str(socket),
            "--state",
            str(directory / "state"),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            _wait(process, socket, log)
            yield Daemon(process.pid, socket)
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    until = time.monotonic() + READY_SECONDS
    while True:
        try:
            Client(socket).health()
        except errors.Unavailable:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the daemon does not start:\n{log.read_text()}") from None
            time.sleep(0.05)
        else:
            return


class InProcess:
    """The Python client, in the process that measures."""

    name = "sandboxd, Python client"
    note = "everything of the shipped policies, receipt and journal included"

    def __init__(self, daemon: Daemon) -> None:
        """Asks ``daemon``."""
        self._daemon = daemon
        self._client = Client(daemon.socket)

    def run(self, workload: Workload) -> None:
        """Run it."""
        self._daemon.calls += 1
        done = self._client.run(list(workload.argv), policy=POLICIES[workload.image])
        if done.outcome is None or done.outcome.exit_code != 0:
            raise RuntimeError(f"sandboxd: {done.outcome}")


class Command:
    """``run-in-sandbox``, as agents start it."""

    name = "sandboxd, run-in-sandbox"
    note = "the same, with the start of the command"

    def __init__(self, daemon: Daemon) -> None:
        """Asks ``daemon``."""
        self._daemon = daemon

    def run(self, workload: Workload) -> None:
        """Run it."""
        self._daemon.calls += 1
        options = ["--socket", str(self._daemon.socket), "--policy", POLICIES[workload.image]]
        execute([str(BIN / "run-in-sandbox"), *options, "--", *workload.argv])


class CommandStart:
    """``run-in-sandbox`` up to its connection: the socket is not there, and it says so."""

    name = "run-in-sandbox"
    note = "all that it does before it connects, and its end"

    def run(self, workload: Workload) -> None:
        """Start it."""
        del workload
        execute([str(BIN / "run-in-sandbox"), "--socket", "/nonexistent", "--", "true"], status=125)
