"""bwrap and the bare OCI runtimes, each on a bundle like that of a slot, without the filter.

``Stage`` is where all of it lies: a tmpfs in this process's mount namespace, with the images' root file
systems presented read-only.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from processes import perform

from sandboxd.engine.bundle import MASKED, READ_ONLY
from sandboxd.kernel import mounts

if TYPE_CHECKING:
    from types import TracebackType

    from measure import Workload

    from sandboxd.images import ImageStore

__all__ = ["CPUS", "MEMORY", "PIDS", "Bubblewrap", "Runtime", "Stage", "find_bubblewrap", "find_runtime"]

MEMORY, PIDS, CPUS = 512 * 2**20, 64, 1  # those of the shipped policy `default`
CPU_PERIOD = 100_000
TOOL = 1000
FIRST_ID, IDS = 1 << 30, 65_536


class Stage:
    """Directories and root file systems of one run. A context manager."""

    def __init__(self, images: ImageStore, names: set[str]) -> None:
        """``names`` are those of the images that the workloads need."""
        self._images = images
        self._names = names
        self._stack = ExitStack()
        self.directory = Path()
        self.rootfs: dict[str, Path] = {}
        self.sources: dict[str, Path] = {}
        """The same where the store has them, through no mount of ours."""

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="sandboxd-bench-", dir="/run"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.directory.chmod(0o711)  # a container's root is nobody here, and must find its bundle
        self._mount(mounts.new_mount("tmpfs", {"mode": "0711"}), self.directory)
        for name in sorted(self._names):
            image = self._images.resolve(name)
            self._stack.enter_context(self._images.hold(image.digest))
            if image.rootfs is None:
                raise RuntimeError(f"image {name} has no root file system")
            target = self.directory / name
            target.mkdir(mode=0o755)
            tree = mounts.clone_tree(image.rootfs)
            mounts.set_attributes(tree, read_only=True, userns=None)
            self._mount(tree, target)
            self.rootfs[name], self.sources[name] = target, image.rootfs
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _mount(self, mount: int, target: Path) -> None:
        try:
            mounts.attach(mount, target)
        finally:
            os.close(mount)
        self._stack.callback(mounts.detach, target)


class _Any:
    def takes(self, workload: Workload) -> bool:
        """All that is a command."""
        return bool(workload.argv)


class Bubblewrap(_Any):
    """bwrap with every namespace and no limit, since it has none."""

    name = "bwrap"
    note = "all namespaces; no limits, no filter"

    def __init__(self, stage: Stage) -> None:
        """Runs in the images of ``stage``."""
        self._stage = stage

    def run(self, workload: Workload) -> None:
        """Run it."""
        root = str(self._stage.rootfs[workload.image])
        options = ["--unshare-all", "--uid", str(TOOL), "--gid", str(TOOL), "--cap-drop", "ALL"]
        options += ["--die-with-parent", "--new-session", "--hostname", "sandbox"]
        options += ["--ro-bind", root, "/", "--proc", "/proc", "--dev", "/dev"]
        options += ["--tmpfs", "/tmp", "--tmpfs", "/workspace", "--chdir", "/workspace"]  # noqa: S108
        perform(["bwrap", *options, "--", *workload.argv], workload)


class Runtime(_Any):
    """An OCI runtime without a daemon: one bundle for each workload, a new container each time."""

    note = "all namespaces, user namespace and memory, pids and CPU limits; no filter"

    def __init__(self, stage: Stage, name: str) -> None:
        """Writes its bundles below ``stage``."""
        self.name = name
        self._stage = stage
        self._directory = stage.directory / f"{name}-bundles"
        self._directory.mkdir(mode=0o711)
        self._made: dict[Workload, Path] = {}
        self._numbers = itertools.count()

    def run(self, workload: Workload) -> None:
        """Run it."""
        bundle = self._made.get(workload)
        if bundle is None:
            bundle = self._made[workload] = self._directory / str(len(self._made))
            bundle.mkdir(mode=0o711)
            (bundle / "config.json").write_text(json.dumps(self._config(workload)))
        container = f"sandboxd-bench-{os.getpid()}-{next(self._numbers)}"
        root = str(self._directory / "state")
        perform([self.name, "--root", root, "run", "--bundle", str(bundle), container], workload)

    def _config(self, workload: Workload) -> dict[str, Any]:
        mapping = [{"containerID": 0, "hostID": FIRST_ID, "size": IDS}]
        kinds = ("user", "pid", "network", "ipc", "uts", "mount", "cgroup")
        return {
            "ociVersion": "1.0.2",
            "root": {"path": str(self._stage.rootfs[workload.image]), "readonly": True},
            "hostname": "sandbox",
            "mounts": [
                _mount("/proc", "proc", "nosuid", "nodev", "noexec"),
                _mount("/dev", "tmpfs", "nosuid", "noexec", "mode=755", "size=64k"),
                _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
                _mount("/dev/shm", "tmpfs", "nosuid", "nodev", "noexec", "mode=1777", "size=64m"),  # noqa: S108
                _mount("/tmp", "tmpfs", "nosuid", "nodev", "mode=1777", "size=64m"),  # noqa: S108
                _mount("/workspace", "tmpfs", "nosuid", "nodev", "mode=1777", "size=256m"),
            ],
            "process": {
                "terminal": False,
                "user": {"uid": TOOL, "gid": TOOL},
                "args": list(workload.argv),
                "env": ["PATH=/usr/local/bin:/usr/bin:/bin"],
                "cwd": "/workspace",
                "noNewPrivileges": True,
                "capabilities": {},
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}],
            },
            "linux": {
                "namespaces": [{"type": kind} for kind in kinds],
                "uidMappings": mapping,
                "gidMappings": mapping,
                "maskedPaths": list(MASKED),
                "readonlyPaths": list(READ_ONLY),
                "resources": {
                    "memory": {"limit": MEMORY, "swap": MEMORY},
                    "pids": {"limit": PIDS},
                    "cpu": {"quota": CPUS * CPU_PERIOD, "period": CPU_PERIOD},
                },
            },
        }


def _mount(target: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": list(options)}


def find_bubblewrap(stage: Stage) -> Bubblewrap | str:
    """bwrap, or why not."""
    if shutil.which("bwrap") is None:
        return "bwrap is left out: it is not installed (Debian package bubblewrap)."
    return Bubblewrap(stage)


def find_runtime(stage: Stage, name: str) -> Runtime | str:
    """A runtime of this name on PATH, or why not."""
    if shutil.which(name) is None:
        return f"{name} is left out: it is not installed (Debian package {name})."
    return Runtime(stage, name)
