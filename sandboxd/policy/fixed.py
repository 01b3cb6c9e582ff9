"""What every container has, whatever its policy says: so that ``explain`` shows it beside the rest.

The engine and the receipt have these values in their own terms; tests compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd import units
from sandboxd.policy.filesystem import DEVICES, MASKED, READ_ONLY

if TYPE_CHECKING:
    from sandboxd.policy.schema import Tmpfs

__all__ = [
    "ALWAYS",
    "DEFAULT_ENV",
    "HOST_NETWORK",
    "NAMESPACES_HOST_NETWORK",
    "OOM_SCORE_ADJ",
    "RLIMITS",
    "shm_size",
]

DEFAULT_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/tmp",  # noqa: S108, the one directory beside the workspace that any tool can write
    "TMPDIR": "/tmp",  # noqa: S108, the container's own tmpfs
    "LANG": "C.UTF-8",
}
"""What every command gets unless its policy or its request says otherwise."""

RLIMITS = {
    "core_file_size": 1,
    "locked_memory": 65_536,
    "msgqueue_size": 819_200,
    "nice_priority": 0,
    "pending_signals": 4096,
    "realtime_priority": 0,
}
"""Soft and hard values by the names of the receipt; descriptors and file sizes are the policy's."""

OOM_SCORE_ADJ = 500
SHM_MAX = 64 * 2**20

HOST_NETWORK = (
    "the call has the HOST'S OWN NETWORK: every address that the host reaches, services on its loopback "
    "and abstract Unix sockets of its programs; nothing of it is refused or recorded"
)
"""What is said wherever somebody looks at a policy with ``network: {mode: host}``, or a call of it."""

NAMESPACES_HOST_NETWORK = "mount, pid, ipc, uts, cgroup: none of the host's; net: THE HOST'S"

KEPT_INIT = (
    "sandboxd's own PID 1, the tools of all calls its children; it keeps SETUID, SETGID and KILL, and has no "
    "filter"
)
KEPT_CGROUP = "one of its own, with what earlier calls of the session left, and nobody else"
"""What stands in the place of ``init`` and ``cgroup`` with ``isolation: session``."""

ALWAYS = {
    "init": "sandboxd's own PID 1, the tool its child",
    "namespaces": "mount, pid, net, ipc, uts, cgroup: none of the host's",
    "cgroup": "one of its own, with nobody else in it",
    "capabilities": "none",
    "no_new_privs": "yes",
    "supplementary_groups": "none",
    "oom_score_adj": str(OOM_SCORE_ADJ),
    "swap": "none",
    "sockets": "their buffers are bounded with limits.memory",
    **{f"rlimit_{name}": str(value) for name, value in RLIMITS.items()},
    "nosuid_nodev": "every mount",
    "proc": "the container's own processes, other users' hidden",
    **{f"masked_paths.{number}": path for number, path in enumerate(MASKED)},
    **{f"read_only_paths.{number}": path for number, path in enumerate(READ_ONLY)},
    "devices": " ".join(DEVICES),
}
"""Controls by name, and how a person reads them."""


def shm_size(tmp: Tmpfs) -> str:
    """What ``/dev/shm`` takes, for a person."""
    size, inodes = min(tmp.size, SHM_MAX), tmp.inodes
    return f"{units.format_size(size)}, {units.format_count(inodes)} inodes"
