"""``sandboxd doctor``: what this host can enforce, and what to do where it cannot.

Each line is found out by doing the thing: a container is made and its receipt read, a filter is
installed, a file system is mounted. Only what cannot be tried without harm is read off.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import structlog

from sandboxd import errors
from sandboxd.engine.base import Check
from sandboxd.engine.host import EngineHost, enter_private_mounts, instance_name
from sandboxd.engine.probe import probe_shape
from sandboxd.init import require_programs
from sandboxd.kernel.userns import RANGE
from sandboxd.network.chain import write_chain
from sandboxd.network.namespace import reference
from sandboxd.reach import Allow, NetworkRules, Reach
from sandboxd.receipt import read_receipt
from sandboxd.rights import rights
from sandboxd.secrets import SecretStore, place_of

if TYPE_CHECKING:
    from sandboxd.config import Config
    from sandboxd.engine.docker import DockerEngine
    from sandboxd.engine.oci import OciEngine
    from sandboxd.kernel.cgroup_tree import CgroupTree
    from sandboxd.plan import Shape

__all__ = ["examine"]

MINIMUM_KERNEL = (5, 19)
RANGES = 16  # of ids: for one container and those that the engine prepares
TOOLS = {
    "mmdebstrap": "build images (`sandboxd image build`)",
    "skopeo": "pull and import images",
}


def examine(config: Config) -> list[Check]:
    """Every line, in the order in which a person would mend them. Needs root; starts no daemon."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    programs = _programs()
    checks = [_kernel(), programs, _root(), _user_namespaces(), *rights()]
    if not all(check.ok for check in checks if check.required):  # each container would fail of the same
        return checks
    try:
        config.state.mkdir(mode=0o711, parents=True, exist_ok=True)
        name = instance_name(config.state, f"-doctor-{os.getpid()}")
        run = enter_private_mounts(name)
    except (OSError, errors.HostUnsupported) as error:
        return [
            *checks,
            Check("mount namespace", ok=False, found=str(error), advice="mend what is marked above"),
        ]
    checks.append(Check("mount namespace", ok=True, found="the daemon's mounts are its own"))
    checks += anyio.run(_containers, config, run, name)
    return [*checks, _secrets(config), *_tools()]


def _secrets(config: Config) -> Check:
    place = place_of(config.secrets.key, config.state, os.environ)
    problem = SecretStore.open(config.state / "secrets", place, serving=False).problem()
    if problem is None:
        found = f"the key is {place.path}"
        if place.own and not place.path.exists():
            found = f"the key will be made with the first secret, at {place.path}"
    return Check(
        "secrets",
        ok=problem is None,
        found=found if problem is None else problem,
        advice="mend the key; calls whose policy grants no secret do without",
        required=False,
    )


def _kernel() -> Check:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    return Check(
        "kernel",
        ok=numbers >= MINIMUM_KERNEL,
        found=f"Linux {release} on {platform.machine()}",
        advice="5.19 or newer is needed: id-mapped mounts under overlayfs, seccomp's killable notifications",
    )


def _programs() -> Check:
    try:
        require_programs()
    except errors.HostUnsupported as error:
        return Check("programs", ok=False, found=str(error), advice="install a wheel for this machine")
    return Check("programs", ok=True, found=f"those for {platform.machine()} are here")


def _root() -> Check:
    return Check(
        "root",
        ok=os.geteuid() == 0,
        found=f"effective uid {os.geteuid()}",
        advice="run as root: containers, cgroups and id-mapped mounts need it",
    )


ALLOWED = (
    "WARNING: the configuration (`network: {host: true}`) lets policies give calls the host's own network; a "
    "floor without `network: {mode: host}` forbids it again"
)


def _user_namespaces() -> Check:
    most = int(Path("/proc/sys/user/max_user_namespaces").read_text())
    return Check(
        "user namespaces",
        ok=most > 0,
        found=f"user.max_user_namespaces is {most}",
        advice="sysctl -w user.max_user_namespaces=15000",
    )


async def _containers(config: Config, run: Path, name: str) -> list[Check]:
    checks: list[Check] = []
    try:
        parts = EngineHost(_with_last_ids(config), run, name)
    except errors.SandboxdError as error:
        return [
            Check("cgroups", ok=False, found=str(error), advice="mount the memory, pids and cpu controllers")
        ]
    with parts:
        tree = parts.cgroups
        checks.append(Check("cgroups", ok=True, found=f"version {tree.version} at {tree.place}"))
        checks.append(_io_limits(tree))
        checks.append(_network_rules())
        if config.network.host:
            checks.append(Check("network host", ok=True, found=ALLOWED, required=False))
        oci = await _oci(parts)
        docker = await _docker(config, parts)
    either = config.engine == "auto" and any(found[-1].ok for found in (oci, docker))
    for engine, found in (("oci", oci), ("docker", docker)):
        needed = config.engine in {engine, "auto"} and not either
        checks += [*found[:-1], replace(found[-1], required=needed)]
    return checks


def _network_rules() -> Check:
    """Whether a network namespace can be made ready here; without, no policy with a network has a call."""
    rules = NetworkRules((Allow("example.org", (443,), ""), Allow("192.0.2.0/24", (443,), "")), ())
    try:
        reference(write_chain(Reach(rules)))
    except OSError as error:
        return Check(
            "network rules",
            ok=False,
            found=str(error),
            advice="apt-get install libnftables1; the kernel needs IPv6, nft_tproxy and nfnetlink_log",
            required=False,
        )
    return Check(
        "network rules", ok=True, found="nftables filters, steers and logs in a namespace of its own"
    )


async def _oci(parts: EngineHost) -> list[Check]:
    """What each OCI runtime makes here; the last line is the engine's."""
    try:
        engines = parts.engines()
    except errors.HostUnsupported as error:
        return [Check("engine oci", ok=False, found=str(error), advice="apt-get install crun")]
    works, checks = False, []
    for engine in engines:
        with engine:
            found = await _container(engine, probe_shape())
        works = works or all(check.ok for check in found)
        checks += found
    last = Check(
        "engine oci",
        ok=works,
        found="usable: ids of its own for each container" if works else "no runtime enforces every control",
        advice="mend what is marked above, or name another runtime in the configuration",
    )
    return [*checks, last]


async def _docker(config: Config, parts: EngineHost) -> list[Check]:
    """What the Docker Engine makes here; the last line is the engine's."""
    socket = config.docker.socket
    if not socket.exists():
        found = f"no Docker Engine at {socket}"
        return [Check("engine docker", ok=False, found=found, advice="apt-get install docker.io")]
    advice = "mend what is marked above, or name another runtime: `docker: {runtime: …}`"
    with parts.docker_engine() as engine:
        try:
            shape = await engine.probe_shape()
        except errors.SandboxdError as error:
            advice = f"start it, or name its socket: `docker: {{socket: {socket}}}`"
            return [Check("engine docker", ok=False, found=str(error), advice=advice)]
        checks = await _container(engine, shape)
    works = all(check.ok for check in checks)
    userns = shape.process.user_namespace
    ids = {
        "none": "all containers have the host's ids, and policies have to say `user_namespace: none`",
        "engine": "all containers have the same remapped ids, and policies have to say "
        "`user_namespace: engine`",
    }
    text = f"usable: {ids[userns]}" if works else "it does not enforce every control"
    return [*checks, Check("engine docker", ok=works, found=text, advice=advice)]


def _io_limits(tree: CgroupTree) -> Check:
    there = not tree.controllers.isdisjoint({"io", "blkio"})
    return Check(
        "io limits",
        ok=there,
        found="the io controller is there" if there else "no io controller",
        advice="mount or delegate the io (v1: blkio) controller; until then calls with limits.io fail",
        required=False,
    )


def _with_last_ids(config: Config) -> Config:
    """With the last ranges of ids alone, which a daemon that runs at the same time does not reach."""
    ids = config.ids
    count = min(ids.count, RANGES)
    last = ids.model_copy(update={"base": ids.base + (ids.count - count) * RANGE, "count": count})
    return config.model_copy(update={"ids": last})


async def _container(engine: OciEngine | DockerEngine, shape: Shape) -> list[Check]:
    name = engine.runtime.name
    advice = "see what it says; another runtime is named by `runtime:`"
    if engine.name == "docker":
        name = f"docker {name}"
    try:
        slot = await engine.create(shape)
    except errors.AttemptFailed as error:
        return [Check(f"{name}: container", ok=False, found=str(error), advice=advice, required=False)]
    try:
        receipt = read_receipt(slot, shape.limits)
    except errors.AttemptFailed as error:
        return [Check(f"{name}: container", ok=False, found=str(error), advice=advice, required=False)]
    finally:
        await engine.destroy(slot)
    missing = [control for control in receipt.controls if not control.enforced]
    if not missing:
        return [
            Check(name, ok=True, found=f"makes containers with all {len(receipt.controls)} controls in force")
        ]
    return [
        Check(
            f"{name}: {control.name}",
            ok=False,
            found=control.in_force,
            required=False,
            advice=f"asked for {control.asked}; {advice}",
        )
        for control in missing
    ]


def _tools() -> list[Check]:
    return [
        Check(
            tool,
            ok=shutil.which(tool) is not None,
            found=shutil.which(tool) or "not on PATH",
            advice=f"apt-get install {tool}, to {use}",
            required=False,
        )
        for tool, use in TOOLS.items()
    ]
