"""What the mounts of a policy let a process read and write, whatever the modes of the files say.

``mount_table`` is the one description of it: the shape is made of the same policy values, and the
examples of a policy are judged on this table. A test compares it with what a container has mounted.
Modes count only of what every container makes alike: its ``/dev``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd.policy import paths
from sandboxd.policy.trust import TRUSTED, looks_inside

if TYPE_CHECKING:
    from sandboxd.policy.schema import PolicyFile

__all__ = ["DEVICES", "MASKED", "READ_ONLY", "Mounted", "mount_table", "mounted_at"]

MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kallsyms", "/proc/kcore", "/proc/key-users",
    "/proc/keys", "/proc/kmsg", "/proc/latency_stats", "/proc/pressure", "/proc/sched_debug", "/proc/scsi",
    "/proc/timer_list",
)  # fmt: skip
"""Nothing can be read there: files that speak of the host, which every engine masks."""
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""Switches of the kernel, which every engine mounts read-only."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
"""The devices of the OCI runtime specification, config-linux.md, "Default Devices"."""


@dataclass(frozen=True)
class Mounted:
    """What is mounted at a path of the container."""

    target: str
    writable: bool
    readable: bool = True


def mount_table(spec: PolicyFile) -> tuple[Mounted, ...]:
    """Everything that is mounted, the deepest last.

    There is no /sys: a directory of that name is the image's. Which file is an image's bundle of authorities,
    on which another lies where a rule looks into HTTP, only the image tells.
    """
    table = [
        Mounted("/", writable=spec.filesystem.root == "overlay"),
        Mounted("/proc", writable=False),
        *(Mounted(path, writable=False) for path in READ_ONLY),
        *(Mounted(path, writable=False, readable=False) for path in MASKED),
        # a tmpfs that belongs to the container's root, mode 0755
        Mounted("/dev", writable=spec.process.user == 0),
        *(Mounted(device, writable=True) for device in DEVICES),
        Mounted("/dev/.sandboxd", writable=False),
        *([Mounted(TRUSTED, writable=False)] if looks_inside(spec) else []),
        Mounted("/dev/pts", writable=False),  # terminals come of opening ptmx, and no other file can be made
        Mounted("/dev/pts/ptmx", writable=True),
        Mounted("/dev/ptmx", writable=True),  # a link to the one before
        Mounted("/dev/shm", writable=True),  # noqa: S108, the container's own tmpfs
        Mounted("/workspace", writable=True),
        Mounted("/tmp", writable=True),  # noqa: S108, the container's own tmpfs
        *(Mounted(mount.target, writable=mount.mode == "read-write") for mount in spec.mounts),
        *([Mounted(paths.SECRETS, writable=False)] if any(one.as_ == "file" for one in spec.secrets) else []),
    ]
    return tuple(sorted(table, key=lambda mounted: mounted.target.count("/") if mounted.target != "/" else 0))


def mounted_at(table: tuple[Mounted, ...], path: str) -> Mounted:
    """The mount that an absolute, normalised path is on."""
    return [mounted for mounted in table if paths.within(path, mounted.target)][-1]
