"""What an engine is, by what it says of itself: whose, its ids, its runtime, and what rules it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd import errors
from sandboxd.engine.docker.podman import create_container, is_podman

if TYPE_CHECKING:
    from docker.api.client import APIClient

    from sandboxd.engine.docker.endpoint import DockerEndpoint

__all__ = ["EngineFacts", "look"]

PID_MAX = Path("/proc/sys/kernel/pid_max")  # more processes there cannot be


@dataclass(frozen=True)
class EngineFacts:
    """What the engine said of itself when it was opened."""

    root: str
    """Where it keeps its images."""
    base: int
    """The host's id of a container's root."""
    remapped: bool
    podman: bool
    runtime: str

    def create_container(self, client: APIClient, request: dict[str, Any], name: str) -> str:
        """Make a container that is not started; returns its id. Raises MissingInEngine, and as ``client``."""
        if self.podman:
            return create_container(client, request, name=name, processes=int(PID_MAX.read_text()))
        return str(client.create_container_from_config(request, name=name)["Id"])


def look(endpoint: DockerEndpoint, wanted: str | None) -> EngineFacts:
    """What the engine is; it has to have the runtime ``wanted``. Raises EngineFailed, HostUnsupported."""
    found = endpoint.info()
    podman = is_podman(endpoint.version())
    options = found.get("SecurityOptions") or ()
    if found.get("Rootless") or any("name=rootless" in option for option in options):  # Podman's, Docker's
        raise errors.HostUnsupported(_why_not_rootless(found))
    default = str(found.get("DefaultRuntime") or "default")
    runtimes = {default} if podman else found.get("Runtimes") or {}
    if wanted is not None and wanted not in runtimes:
        raise errors.HostUnsupported(
            f"the Docker Engine has no runtime {wanted!r}; it has {', '.join(sorted(runtimes))}"
            + (", the one that Podman itself is configured with (containers.conf)" if podman else "")
        )
    root = str(found.get("DockerRootDir") or "/var/lib/docker")
    remapped = any("name=userns" in option for option in options)
    base = _first_id(root) if remapped else 0
    return EngineFacts(root, base, remapped, podman, wanted or default)


def _first_id(root: str) -> int:
    """The first uid and gid that containers are mapped to: the engine's directory is named after them."""
    uid, _, gid = Path(root).name.partition(".")
    if not uid.isdigit() or uid != gid:
        raise errors.HostUnsupported(
            f"the Docker Engine maps user ids from {uid} and group ids from {gid or '?'}: "
            "userns-remap has to give both the same range"
        )
    return int(uid)


def _why_not_rootless(found: dict[str, Any]) -> str:
    """What a rootless engine lacks."""
    if found.get("CgroupDriver") == "none" or str(found.get("CgroupVersion")) == "1":
        reason = "can enforce no limit (it may use no cgroups, for which it needs version 2 and systemd)"
    else:
        reason = "maps ids in two pieces and has mounts of its own"
    return (
        f"this is a rootless engine, which {reason}; one that runs as root is needed, with userns-remap if "
        "containers shall have ids of their own"
    )
