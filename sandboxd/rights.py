"""What the kernel has to let this process do, as it stands in ``/proc``, for ``doctor``.

On a host, root has all of it. In a container it is what its engine was asked for, so each advice says that
too; docs/dind.md says what each is for, and how it was found.
"""

from __future__ import annotations

import os
from pathlib import Path

from sandboxd.engine.base import Check

__all__ = ["rights"]

CAPABILITIES = {  # linux/capability.h
    "CHOWN": (0, "to give a container its files"),
    "DAC_OVERRIDE": (1, "to read and write what belongs to a container"),
    "FOWNER": (3, "to write a call's inputs with the tool as their owner"),
    "KILL": (5, "to end what runs as another user"),
    "SETGID": (6, "to map the ids of a user namespace"),
    "SETUID": (7, "to map the ids of a user namespace"),
    "SYS_PTRACE": (19, "to open the namespaces of a container and read its processes"),
    "SYS_ADMIN": (21, "to mount, and to enter namespaces"),
    "MKNOD": (27, "to make the devices of containers"),
}
SECCOMP_FILTER = "2"  # proc_pid_status(5)
WRITTEN = Path("/proc/sys/user/max_user_namespaces")


def rights() -> list[Check]:
    """Capabilities, the filter on system calls, and whether ``/proc/sys`` can be written."""
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    return [_capabilities(int(status["CapEff"], 16)), _filter(status.get("Seccomp", "0")), _system_paths()]


def _capabilities(effective: int) -> Check:
    missing = {name: what for name, (number, what) in CAPABILITIES.items() if not effective >> number & 1}
    why = "; ".join(f"CAP_{name}, {what}" for name, what in missing.items())
    options = " ".join(f"--cap-add {name}" for name in missing)
    return Check(
        "capabilities",
        ok=not missing,
        found=f"not here: {why}" if missing else "all that are needed",
        advice=f"run as root on the host, or the container with `docker run {options} …`",
    )


def _filter(mode: str) -> Check:
    """What somebody's filter refuses cannot be listed; a container shows whether it lets enough by."""
    return Check(
        "system calls",
        ok=mode != SECCOMP_FILTER,
        found="a seccomp filter is on this process" if mode == SECCOMP_FILTER else "not filtered",
        advice="that of Docker refuses keyctl, and before 2023 mount_setattr: "
        "`docker run --security-opt seccomp=unconfined …`",
        required=False,
    )


def _system_paths() -> Check:
    writable = not os.statvfs(WRITTEN).f_flag & os.ST_RDONLY
    return Check(
        "/proc/sys",
        ok=writable,
        found="writable"
        if writable
        else f"{WRITTEN} is read-only, so no container can be kept from making user namespaces of its own",
        advice="`mount -o remount,bind,rw /proc/sys`, as the image's sandboxd-start does, or "
        "`docker run --security-opt systempaths=unconfined …`; the engine docker does without",
        required=False,
    )
