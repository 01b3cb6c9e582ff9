"""What a program inside a container has to find for a line of a receipt to be true.

The program is ``programs/proof.py``. For each line it tries what the line says is not possible; here stands
how that has to come out, given what the receipt says is in force.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sandboxd.conformance.policies import LENT

__all__ = ["PROOFS"]

MIB = 2**20
Proof = Callable[[str, Any], object]
"""Whether what is in force, as the receipt has it, is what the program found."""

NOWHERE = {"EACCES", "EPERM", "EROFS", "ENOENT"}
UNREACHABLE = {"ENETUNREACH", "EADDRNOTAVAIL", "EAFNOSUPPORT"}


def namespace(*refused: str) -> Proof:
    return lambda in_force, seen: in_force == seen[0] and seen[1] in refused


def tmpfs(size: int, inodes: int) -> Proof:
    """Full at exactly its size, with some names fewer than inodes: the root is one, inputs are others."""

    def proof(in_force: str, seen: Any) -> bool:
        (filled, full), (names, no_more) = seen
        exact = in_force == f"tmpfs of {size} bytes, {inodes} inodes"
        fits = size - MIB // 4 < filled <= size and inodes - 10 < names < inodes
        return exact and fits and full == no_more == "ENOSPC"

    return proof


def rlimit(*tried: object) -> Proof:
    return lambda in_force, seen: seen[0] == in_force and seen[1] == "EPERM" and seen[2] in tried


def counted(least: int, errno: str) -> Proof:
    """As many as the soft limit says, or some fewer that were there before; then the errno."""

    def proof(in_force: str, seen: Any) -> bool:
        said, raising, (count, ended) = seen
        most = int(in_force.partition(" ")[0])
        return (said, raising, ended) == (in_force, "EPERM", errno) and bool(least <= count <= most)

    return proof


DEVICES = {"null", "zero", "full", "random", "urandom", "tty"}
KNOWN_DEVICES = DEVICES | {"pts", "shm", "ptmx", "fd", "stdin", "stdout", "stderr", "core", ".sandboxd"}
KNOWN_MOUNTS = {
    "/", "/dev", "/dev/pts", "/dev/shm", "/dev/.sandboxd", "/lent", "/proc", "/tmp", "/workspace",
    *(f"/dev/{name}" for name in DEVICES),
}  # fmt: skip


PROOFS: dict[str, Proof] = {
    "seccomp": lambda _, seen: seen == "EPERM",
    "no_new_privs": lambda _, seen: seen == [1, "EINVAL"],
    "capabilities": lambda _, seen: seen == [True, "EPERM"],
    "user": lambda _, seen: seen == [1234, 1234, 1234, "EPERM"],
    "group": lambda _, seen: seen == [4321, 4321, 4321, "EPERM"],
    "supplementary_groups": lambda _, seen: seen == [[], "EPERM"],
    "umask": lambda in_force, seen: (in_force, seen) == ("0027", "0640"),
    "oom_score_adj": lambda in_force, seen: seen == [in_force, "EACCES"],
    "init": lambda _, seen: seen[:2] == ["EPERM", False] and seen[2] in NOWHERE | {"ETXTBSY"},
    "parent": lambda _, seen: seen == 1,
    "mnt_namespace": namespace("EPERM"),
    "pid_namespace": lambda in_force, seen: seen == [in_force, True, "ESRCH"],
    "net_namespace": namespace("ECONNREFUSED"),
    "ipc_namespace": namespace("ENOENT"),
    "uts_namespace": namespace("EPERM"),
    "cgroup_namespace": lambda in_force, seen: seen == [in_force, False],
    "user_namespace": namespace("EPERM"),
    "user_namespace_uids": lambda in_force, seen: seen[1] in NOWHERE and ids_as_said(in_force, seen[0]),
    "user_namespace_gids": lambda in_force, seen: seen[1] in NOWHERE and ids_as_said(in_force, seen[0]),
    "network": lambda in_force, seen: seen == [in_force.split(), "EPERM"] and in_force == "lo",
    "network_routes": lambda _, seen: set(seen) <= UNREACHABLE,
    "hostname": lambda in_force, seen: (in_force, seen[0]) == ("proving", "proving") and seen[1] in NOWHERE,
    "root": lambda in_force, seen: in_force == "read-only" and set(seen) == {"EROFS"},
    "nosuid_nodev": lambda _, seen: seen == [["1234", "1234"], [], "EPERM"],
    "workspace": tmpfs(8 * MIB, 200),
    "tmp": tmpfs(4 * MIB, 100),
    "shm": tmpfs(4 * MIB, 100),
    "mount /": lambda in_force, seen: seen == in_force,
    "mount /workspace": lambda in_force, seen: seen == in_force,
    "mount /dev/.sandboxd": lambda in_force, seen: seen == in_force,
    "mount /lent": lambda in_force, seen: seen == [in_force, LENT],
    "mounts_read_only": lambda _, seen: set(seen) <= {"EROFS", "EACCES"} and "EROFS" in seen,
    "proc": lambda _, seen: seen == [True, False],
    "devices": lambda in_force, seen: seen[:2] == [True, "ENOSPC"] and harmless(in_force, seen[2]),
    "masked_paths": lambda _, seen: seen[0] == [] and set(seen[1:]) <= NOWHERE,
    "mounts": lambda _, seen: set(seen) <= KNOWN_MOUNTS and {"/", "/workspace", "/tmp", "/lent"} <= set(seen),
    "rlimit_core_file_size": rlimit([-11, []]),
    "rlimit_open_files": counted(40, "EMFILE"),
    "rlimit_file_size": rlimit("EFBIG"),
    "rlimit_locked_memory": rlimit("ENOMEM"),
    "rlimit_msgqueue_size": lambda in_force, seen: seen[0] == in_force and seen[2][1] == "EMFILE",
    "rlimit_pending_signals": counted(1, "EAGAIN"),
    "rlimit_nice_priority": rlimit("EPERM", "EACCES"),
    "rlimit_realtime_priority": rlimit("EPERM"),
    "processes": lambda _, seen: seen == "ESRCH",
    "cgroup": lambda _, seen: set(seen) == {"/"},
    "memory": lambda in_force, seen: int(in_force) == 96 * MIB and seen == -9,
    "swap": lambda in_force, seen: in_force in {"0", "none"} and seen == -9,
    "pids": lambda in_force, seen: in_force == "24" and 20 <= seen[0] < 24 and seen[1] == "EAGAIN",
    "cpu": lambda in_force, seen: in_force == "500" and seen < 0.75,
    "sockets": lambda in_force, seen: 0 < seen < 2 * int(in_force),
}


def harmless(in_force: str, names: list[str]) -> bool:
    return set(in_force.split()) == DEVICES and DEVICES <= set(names) <= KNOWN_DEVICES


def ids_as_said(in_force: str, seen: str) -> bool:
    """A map reads alike inside and outside but for its middle: ids of the reader's own namespace."""
    inside, _, count = seen.split()
    return (inside, count) == tuple(in_force.split()[::2])
