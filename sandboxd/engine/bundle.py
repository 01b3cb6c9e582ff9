"""The OCI bundle of a slot: pure, from a shape and the paths that the engine prepared.

Source of the format: OCI runtime specification 1.0.2, ``config.md`` and ``config-linux.md``. What is
*not* here is on purpose: limits are written to the cgroup by the daemon, the filter, rlimits and ids
of the tool are taken by the parked process, for every engine alike.
"""

# ruff: noqa: S108  -- these are paths inside a container

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.plan import Shape

__all__ = [
    "INIT_CAPABILITIES",
    "INIT_PATH",
    "MASKED",
    "READ_ONLY",
    "SHM_MAX",
    "Bind",
    "BundlePaths",
    "make_config",
    "shm_size",
    "temporary",
]

INIT_PATH = "/dev/.sandboxd"  # under /dev, where the runtime can make a mount point in any image
INIT_CAPABILITIES = ("CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID")
SHM_MAX = 64 * 2**20
PTYS = 64  # terminals that a tool may open; all containers share what kernel.pty.max leaves them

# World-readable files of /proc that speak of the host, and switches of the kernel.
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/pressure",  # the host's, and anybody may set triggers on it
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True)
class Bind:
    """A mount that the engine prepared, ``nosuid,nodev`` and read-only where it has to be."""

    source: Path
    target: str
    read_only: bool
    executable: bool = True


@dataclass(frozen=True)
class BundlePaths:
    """Where the engine put what the container is made of."""

    rootfs: Path
    workspace: Path
    init: Path
    binds: tuple[Bind, ...]


def shm_size(shape: Shape) -> int:
    """Bytes of ``/dev/shm``: as much as ``/tmp``, at most 64 MiB."""
    return min(shape.limits.tmp_size, SHM_MAX)


def temporary(shape: Shape) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Where the container has a tmpfs of its own, and its options; each is ``nosuid,nodev`` beside."""
    limits = shape.limits
    common = ("mode=1777", f"nr_inodes={limits.tmp_inodes}")
    return (
        ("/dev/shm", ("noexec", *common, f"size={shm_size(shape)}")),
        ("/tmp", (*common, f"size={limits.tmp_size}")),
    )


def make_config(
    shape: Shape,
    paths: BundlePaths,
    *,
    userns: str | None,
    id_map: tuple[int, int] | None,
    cgroup: str | None,
) -> dict[str, Any]:
    """The ``config.json`` of a slot.

    ``userns`` is the path of the user namespace to join and ``id_map`` its ``(base, size)``; ``cgroup``
    is the ``cgroupsPath`` for a runtime that insists on placing the container itself.
    """
    namespaces: list[dict[str, str]] = [
        {"type": kind}
        for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")
        if not (kind == "network" and shape.host_network)
    ]
    linux: dict[str, Any] = {
        "namespaces": namespaces,
        "resources": {},
        "maskedPaths": list(MASKED),
        "readonlyPaths": list(READ_ONLY),
        "rootfsPropagation": "private",
    }
    if userns is not None and id_map is not None:
        namespaces.insert(0, {"type": "user", "path": userns})
        mapping = [{"containerID": 0, "hostID": id_map[0], "size": id_map[1]}]
        linux["uidMappings"] = linux["gidMappings"] = mapping
    if cgroup is not None:
        linux["cgroupsPath"] = cgroup
    mounts: list[dict[str, Any]] = [
        _mount("/proc", "proc", "nosuid", "nodev", "noexec", "hidepid=invisible"),
        _mount("/dev", "tmpfs", "nosuid", "noexec", "mode=755", "size=64k"),
        _mount(
            "/dev/pts",
            "devpts",
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            f"max={PTYS}",
        ),
        *(_mount(target, "tmpfs", "nosuid", "nodev", *options) for target, options in temporary(shape)),
        _bind(Bind(paths.init, INIT_PATH, read_only=True)),
        _bind(Bind(paths.workspace, "/workspace", read_only=False)),
        *(_bind(bind) for bind in paths.binds),
    ]
    capabilities = list(INIT_CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(paths.rootfs), "readonly": shape.root.mode == "read-only"},
        "hostname": shape.process.hostname,
        "mounts": mounts,
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [INIT_PATH],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        },
        "linux": linux,
    }


def _mount(target: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": list(options)}


def _bind(bind: Bind) -> dict[str, Any]:
    options = ["bind", "nosuid", "nodev", "ro" if bind.read_only else "rw"]
    options += [] if bind.executable else ["noexec"]
    return {"destination": bind.target, "type": "bind", "source": str(bind.source), "options": options}
