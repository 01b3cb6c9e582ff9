"""What the engine is asked for when a container is made: pure, from a shape.

Source of the format: Docker Engine API 1.41, ``ContainerCreate``. What its fields cannot say (``nosuid`` on
the root, a ``/proc`` that hides, no ``/sys``) is done to the container that is up: ``finish.py``. The
engine's seccomp filter is off: the parked process installs the policy's, which a filter around it could only
hide (the errno of an outer filter wins over the notification of an inner one), PID 1 filters itself, and
until then nothing but our own code runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.engine.bundle import INIT_CAPABILITIES, INIT_PATH, MASKED, READ_ONLY, temporary
from sandboxd.engine.oci import rlimits
from sandboxd.init import INIT
from sandboxd.policy.paths import SECRETS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd.engine.docker.images import EngineImage
    from sandboxd.images import HostBind
    from sandboxd.plan import Mount, Shape

__all__ = ["DOOR_PATH", "INSTANCE_LABEL", "SLOT_LABEL", "Labels", "make_request"]

DOOR_PATH = "/dev/.sandboxd-door"
IPV6 = Path("/proc/sys/net/ipv6")  # not there in a kernel without; the engine turns it off
"""Where PID 1 finds the socket to connect to; gone before the tool process exists."""
INSTANCE_LABEL = "io.sandboxd.instance"
SLOT_LABEL = "io.sandboxd.slot"
CPU_PERIOD = 100_000  # microseconds
LEAST_PIDS = (
    64  # what a runtime of several threads needs until it has become PID 1; then the limit is written
)
LEAST_MEMORY = 16 * 2**20  # the same, in bytes
PLACEHOLDER = "size=64k,nr_inodes=64"  # in which the engine can still make its mount points
ULIMITS = {  # names of the API by the constants of resource
    1: "fsize",
    4: "core",
    7: "nofile",
    8: "memlock",
    11: "sigpending",
    12: "msgqueue",
    13: "nice",
    14: "rtprio",
}


@dataclass(frozen=True)
class Labels:
    """Whose container it is, and of which slot."""

    instance: str
    slot: str

    @property
    def name(self) -> str:
        """The container's name."""
        return f"sandboxd-{self.instance}-{self.slot}"


def make_request(
    shape: Shape,
    image: EngineImage,
    lent: Iterable[HostBind | Mount],
    *,
    labels: Labels,
    door: Path,
    runtime: str | None,
) -> dict[str, Any]:
    """The body of the request. ``door`` is the slot's directory."""
    limits = shape.limits
    memory = max(limits.memory, LEAST_MEMORY)
    binds = [
        _bind(str(INIT), INIT_PATH),
        _bind(str(door), DOOR_PATH),
        *(_bind(one.source, one.target) for one in lent),
    ]
    bound = {bind["Target"] for bind in binds}
    host: dict[str, Any] = {
        "AutoRemove": True,  # it goes when PID 1 ends, whoever is there to see to it
        "CapAdd": [name.removeprefix("CAP_") for name in INIT_CAPABILITIES],
        "CapDrop": ["ALL"],
        "CgroupnsMode": "private",
        "CpuPeriod": CPU_PERIOD,
        "CpuQuota": max(limits.cpus * CPU_PERIOD // 1000, 1000),
        "Init": False,
        "IpcMode": "none",  # a namespace of its own; its /dev/shm is below, with a limit on files too
        "LogConfig": {"Type": "none"},
        "MaskedPaths": list(MASKED),
        "Memory": memory,
        "MemorySwap": memory,
        "Mounts": binds,
        "NetworkMode": "host" if shape.host_network else "none",
        "PidsLimit": max(limits.pids, LEAST_PIDS),
        "Privileged": False,
        "ReadonlyPaths": list(READ_ONLY),
        "ReadonlyRootfs": True,
        "RestartPolicy": {"Name": "no"},
        "SecurityOpt": ["no-new-privileges", "seccomp=unconfined"],
        "Sysctls": {} if shape.host_network else _sysctls(),
        "Tmpfs": {
            # else the engine makes a volume, and fills it
            **{path: PLACEHOLDER for path in image.volumes if path not in bound},
            **{target: _tmpfs(*options) for target, options in temporary(shape)},
            "/workspace": PLACEHOLDER,  # ours is put in its place
            **({SECRETS: PLACEHOLDER} if shape.granted("file") else {}),  # likewise
        },
        "Ulimits": [
            {"Name": ULIMITS[one.resource], "Soft": one.soft, "Hard": one.hard} for one in rlimits(limits)
        ],
    }
    if runtime is not None:
        host["Runtime"] = runtime
    return {
        "Image": image.id,
        "Entrypoint": [INIT_PATH],
        "Cmd": [f"{DOOR_PATH}/s"],
        "Env": list(image.environment),  # a name without a value takes the image's variable away
        "Healthcheck": {"Test": ["NONE"]},  # the image's would be run in the container, beside the tool
        "HostConfig": host,
        "Hostname": shape.process.hostname,
        "Labels": {INSTANCE_LABEL: labels.instance, SLOT_LABEL: labels.slot},
        "NetworkDisabled": False,
        "StopSignal": "SIGKILL",
        "StopTimeout": 1,
        "User": "0:0",
        "WorkingDir": "/",
    }


def _sysctls() -> dict[str, str]:
    return {  # as the kernel has them: the engine would open both
        "net.ipv4.ip_unprivileged_port_start": "1024",
        "net.ipv4.ping_group_range": "1 0",
        **({"net.ipv6.conf.all.disable_ipv6": "0"} if IPV6.exists() else {}),
    }


def _bind(source: str, target: str) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": source,
        "Target": target,
        "ReadOnly": True,
        "BindOptions": {"Propagation": "rprivate", "NonRecursive": True},
    }


def _tmpfs(*options: str) -> str:
    executable = () if "noexec" in options else ("exec",)  # without a word the engine says noexec
    return ",".join(("rw", "nosuid", "nodev", *executable, *options))
