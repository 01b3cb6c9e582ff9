"""What each engine and kind of host can mean: the one place where they differ.

A test that needs something which not all of them have is marked ``@needs("…")`` with a key of ``EXPECTED``.
It is skipped where the subject has a trait that the table names, with the reason that stands there, and
runs everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ENGINES", "EXPECTED", "RECEIPT", "ROOT", "EngineUnderTest", "why_not"]


@dataclass(frozen=True)
class EngineUnderTest:
    """How the suite's daemon is configured for an engine, and how its policies ask for ids."""

    configuration: str
    user_namespaces: tuple[str, ...]
    """Values of ``process.user_namespace``, best first; the first that the daemon takes is used."""
    takes_runtime: bool = True
    """Whether ``--runtime`` is the daemon's ``runtime``."""


ENGINES = {
    "oci": EngineUnderTest("engine: oci\n", ("slot",)),
    "docker": EngineUnderTest("engine: docker\n", ("engine", "none"), takes_runtime=False),
}

ROOT = {"slot": "0", "engine": "0", "none": "1000"}
"""By ``process.user_namespace``: the user of policies that have a root inside where they can have one."""

EXPECTED: dict[str, dict[str, str]] = {
    "ids of each container's own": {
        "user_namespace: engine": "the engine's remap is the same for all of its containers",
        "user_namespace: none": "the engine has no user namespaces: containers share the host's ids",
    },
    "a user namespace": {
        "user_namespace: none": "the engine has no user namespaces: containers share the host's ids",
    },
    "a root inside": {
        "user_namespace: none": "user 0 would be the host's own root, and no policy may say so",
    },
    "a writable root": {
        "docker": "the engine cannot bound the size of a writable root",
    },
    "a limit of io": {
        "given": "the daemon was given with --socket; where its images are is not known",
        "no disk": "the images are on no block device of their own that the kernel can throttle",
    },
    "the engine's processes on this host": {
        "given": "the daemon was given with --socket; whose processes are its own is not known",
    },
    "the host's network": {
        "given": "the daemon was given with --socket; whether its configuration allows it is not known",
        "user_namespace: engine": "an engine that remaps ids gives no container the host's network",
    },
    "a daemon of the suite's own": {
        "given": "the daemon was given with --socket; it is not ours to configure, to stop or to kill",
    },
}
"""By what a test needs: the traits of a subject that rule it out, and why."""

RECEIPT: dict[str, str] = {
    **dict.fromkeys(
        [
            "seccomp", "no_new_privs", "capabilities", "user", "group", "supplementary_groups", "umask",
            "oom_score_adj", "init", "parent", "mnt_namespace", "pid_namespace", "net_namespace",
            "ipc_namespace", "uts_namespace", "cgroup_namespace", "user_namespace_uids", "network",
            "network_routes", "hostname", "root", "nosuid_nodev", "workspace", "tmp", "shm", "mount /",
            "mount /workspace", "mount /dev/.sandboxd", "mounts_read_only", "proc", "devices",
            "masked_paths", "mounts", "rlimit_core_file_size", "rlimit_open_files", "rlimit_locked_memory",
            "rlimit_msgqueue_size", "rlimit_pending_signals", "rlimit_nice_priority",
            "rlimit_realtime_priority", "processes", "cgroup", "memory", "swap", "pids", "cpu",
        ],
        "always",
    ),
    "user_namespace": "maps ids",
    "user_namespace_gids": "maps ids",
    "sockets": "cgroup v1",  # v2 counts the buffers of sockets as memory
    "mount /lent": "policy proof",
    "rlimit_file_size": "policy proof",
    "root_overlay": "policy overlay",
    "io": "policy io",
    "network_filter": "policy network",
    "network_sysctls": "policy network",
    "trust": "policy https",
    "expose": "policy exposed",
    "isolation": "policy kept",
    **dict.fromkeys(
        ["secrets", "secrets_swap", "secret_files", "secret CONFORMANCE_FILE", "mount /run/secrets"],
        "policy secrets",
    ),
}  # fmt: skip
"""Every line of a receipt, and the trait of a subject or of a policy with which it is there."""


def why_not(needed: str, traits: frozenset[str]) -> str:
    """Why a subject of these traits has not what is needed, or an empty text."""
    return next((why for trait, why in EXPECTED[needed].items() if trait in traits), "")
