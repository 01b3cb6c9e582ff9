"""Podman: its compatible API for everything but making a container and importing an image.

Source: ``pkg/specgen`` and ``pkg/api/handlers`` of Podman 4.3 to 5.8. The compatible API drops fields of a
request without a word (``CgroupnsMode`` before Podman 4.4 and on cgroup v1, ``MaskedPaths``), makes comma
separated words of paths, gives variables that have no value those of the service, and fills volumes and tmpfs
with the image's files; and it leaves what it imports in a temporary file. Its own API, on the same socket, is
not so. What neither takes is the number of inodes of a tmpfs, which is set in the container that is up:
``finish.py``.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import docker.errors
import requests.exceptions

from sandboxd.engine.bundle import MASKED
from sandboxd.engine.docker.endpoint import MissingInEngine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from docker.api.client import APIClient

__all__ = ["IMPORT", "create_container", "is_podman", "specification"]

CREATE = "/v4.0.0/libpod/containers/create"  # of the oldest version, which all since answer to
IMPORT = "/v4.0.0/libpod/images/import"
NO_IMAGE = "image not known"


def is_podman(version: Mapping[str, Any]) -> bool:
    """Whether an answer to ``/version`` is Podman's."""
    return any(part.get("Name") == "Podman Engine" for part in version.get("Components") or ())


def create_container(client: APIClient, request: Mapping[str, Any], *, name: str, processes: int) -> str:
    """Make what a request of ``request.py`` asks for; returns its id.

    Raises MissingInEngine without the image, and what ``client`` raises.
    """
    asked = specification(request, name=name, processes=processes)
    answer = client.post(client.base_url + CREATE, json=asked, timeout=client.timeout)
    if answer.ok:
        return str(answer.json()["Id"])
    if NO_IMAGE in answer.text:  # with status 500
        raise MissingInEngine(f"create a container: {request['Image'][:19]}: {NO_IMAGE}")
    try:
        answer.raise_for_status()
    except requests.exceptions.HTTPError as error:
        docker.errors.create_api_error_from_http_exception(error)
    raise AssertionError


def specification(request: Mapping[str, Any], *, name: str, processes: int) -> dict[str, Any]:
    """A request as Podman's ``SpecGenerator``.

    ``processes`` is for ``RLIMIT_NPROC``, which Podman would raise, to what it may not be able to. No runtime
    is named: Podman 4.3 does not look at ``oci_runtime``.
    """
    host = request["HostConfig"]
    private = {"nsmode": "private"}
    return {
        "name": name,
        "image": request["Image"],
        "image_volume_mode": "ignore",
        "entrypoint": request["Entrypoint"],
        "command": request["Cmd"],
        "env": {},
        "unsetenvall": True,
        "healthconfig": request["Healthcheck"],
        "hostname": request["Hostname"],
        "labels": request["Labels"],
        "log_configuration": {"driver": host["LogConfig"]["Type"]},
        "manage_password": False,
        "use_image_hosts": True,
        "use_image_resolve_conf": True,
        "remove": host["AutoRemove"],
        "stop_signal": int(signal.Signals[request["StopSignal"]]),
        "stop_timeout": request["StopTimeout"],
        "systemd": "false",
        "user": request["User"],
        "work_dir": request["WorkingDir"],
        "cap_add": host["CapAdd"],
        "cap_drop": host["CapDrop"],
        "no_new_privileges": True,
        "seccomp_profile_path": "unconfined",
        # Else what Podman masks by itself would be masked twice. What it keeps read-only by itself is all
        # that has to be.
        "unmask": list(MASKED),
        "mask": list(MASKED),
        "read_only_filesystem": host["ReadonlyRootfs"],
        "sysctl": host["Sysctls"],
        "cgroupns": private,
        "ipcns": {"nsmode": host["IpcMode"]},
        "netns": {"nsmode": host["NetworkMode"]},
        "pidns": private,
        "userns": {"nsmode": "host"},
        "utsns": private,
        "mounts": [*map(_bind, host["Mounts"]), *(_tmpfs(*one) for one in host["Tmpfs"].items())],
        "r_limits": [
            *({"type": one["Name"], "soft": one["Soft"], "hard": one["Hard"]} for one in host["Ulimits"]),
            {"type": "nproc", "soft": processes, "hard": processes},
        ],
        "resource_limits": {
            "cpu": {"period": host["CpuPeriod"], "quota": host["CpuQuota"]},
            "memory": {"limit": host["Memory"], "swap": host["MemorySwap"]},
            "pids": {"limit": host["PidsLimit"]},
        },
    }


def _bind(mount: Mapping[str, Any]) -> dict[str, Any]:
    options = ["bind", "rprivate", "ro"]
    return {"destination": mount["Target"], "type": "bind", "source": mount["Source"], "options": options}


def _tmpfs(target: str, options: str) -> dict[str, Any]:
    taken = [option for option in options.split(",") if option and not option.startswith("nr_inodes=")]
    return {
        "destination": target,
        "type": "tmpfs",
        "source": "tmpfs",
        "options": [*taken, "notmpcopyup"],  # else it has copies of the image's files
    }
