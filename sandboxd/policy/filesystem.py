"""What the mounts of a policy let a process read and write, whatever the modes of the files say.

``mount_table`` is the one description of it: the shape is made of the same policy values, and the
examples of a policy are judged on this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd.policy import paths

if TYPE_CHECKING:
    from sandboxd.policy.schema import PolicyFile

__all__ = ["MASKED", "WRITABLE_DEVICES", "Mounted", "mount_table", "mounted_at"]

MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kallsyms", "/proc/kcore", "/proc/key-users",
    "/proc/keys", "/proc/kmsg", "/proc/latency_stats", "/proc/pressure", "/proc/sched_debug", "/proc/scsi",
    "/proc/timer_list",
)  # fmt: skip
"""Nothing can be read there: files that speak of the host, which every engine masks."""
WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
"""The devices of the OCI runtime specification, config-linux.md, "Default Devices"."""


@dataclass(frozen=True)
class Mounted:
    """What is mounted at a path of the container."""

    target: str
    writable: bool
    readable: bool = True


def mount_table(spec: PolicyFile) -> tuple[Mounted, ...]:
    """Everything that is mounted, the deepest last."""
    table = [
        Mounted("/", writable=spec.filesystem.root == "overlay"),
        Mounted("/proc", writable=False),
        Mounted("/sys", writable=False),
        Mounted("/dev", writable=False),
        Mounted("/dev/shm", writable=True),  # noqa: S108, the container's own tmpfs
        Mounted("/workspace", writable=True),
        Mounted("/tmp", writable=True),  # noqa: S108, the container's own tmpfs
        *(Mounted(device, writable=True) for device in WRITABLE_DEVICES),
        *(Mounted(path, writable=False, readable=False) for path in MASKED),
        *(Mounted(mount.target, writable=mount.mode == "read-write") for mount in spec.mounts),
    ]
    return tuple(sorted(table, key=lambda mounted: mounted.target.count("/") if mounted.target != "/" else 0))


def mounted_at(table: tuple[Mounted, ...], path: str) -> Mounted:
    """The mount that an absolute, normalised path is on."""
    return [mounted for mounted in table if paths.within(path, mounted.target)][-1]
