"""What engines stand on, and which of them serves on this host.

The daemon and ``doctor`` both make containers; this is what they have in common.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import canonical, errors
from sandboxd.engine.oci import OciEngine
from sandboxd.engine.runtime import find_runtimes
from sandboxd.engine.trust import Trust
from sandboxd.images import ImageStore
from sandboxd.init import LAUNCH, require_programs
from sandboxd.kernel import mounts
from sandboxd.kernel.cgroup_tree import CgroupTree
from sandboxd.kernel.notify import NotifyServer
from sandboxd.kernel.userns import UserNamespaces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.config import Config
    from sandboxd.engine.docker import DockerEndpoint, DockerEngine, DockerImages

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
"""Those that a runtime takes from its own ``/dev`` when it cannot make them: OCI config-linux.md."""

__all__ = ["EngineHost", "enter_private_mounts", "images_of", "instance_name"]


def instance_name(state: Path, suffix: str = "") -> str:
    """A short name for whoever works on this state directory: of its cgroup tree and its directory."""
    return canonical.digest(str(state.resolve()))[7:19] + suffix


def enter_private_mounts(name: str) -> Path:
    """Move into a mount namespace of our own with a tmpfs at ``/run/sandboxd-NAME``; returns that directory.

    It is in /run because a container's root, who is nobody on the host, must be able to reach it: the
    state directory may be below one that only root may enter. What the host sees of it is an empty
    directory. Must run before the process has other threads. Raises HostUnsupported.
    """
    run = Path(f"/run/sandboxd-{name}")
    try:
        run.mkdir(mode=0o711, exist_ok=True)
        mounts.private_namespace()
        mounts.hide_hybrid_cgroup2()
        tmpfs = mounts.new_mount("tmpfs", {"mode": "0711", "size": "256m"})
        try:
            mounts.attach(tmpfs, run)
        finally:
            os.close(tmpfs)
        mounts.own_devices(run / "dev", DEVICES)
    except OSError as error:
        raise errors.HostUnsupported(
            f"no mount namespace of our own: {error}; sandboxd needs root"
        ) from error
    return run


def leave_private_mounts(run: Path) -> None:
    """Take the tmpfs and its directory away; only for the one process that may use this name."""
    with suppress(OSError):
        mounts.detach(run)
        run.rmdir()


def images_of(config: Config, engine: str) -> ImageStore:
    """Where the images of an engine are, by its name."""
    return _docker(config)[1] if engine == "docker" else ImageStore(config.state / "images")


def _docker(config: Config) -> tuple[DockerEndpoint, DockerImages]:
    """The Docker Engine of the configuration, which nothing is asked of yet, and its images."""
    from sandboxd.engine.docker import DockerEndpoint, DockerImages  # noqa: PLC0415  (slow)

    endpoint = DockerEndpoint(config.docker.socket, timeout=config.docker.timeout / 1e6)
    return endpoint, DockerImages(config.state, endpoint, instance_name(config.state))


class EngineHost(ExitStack):
    """The cgroup tree, the user namespaces, the seccomp server and the images; takes them down at exit.

    ``name`` is that of ``run``.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        name: str,
        processes: Sequence[int] = (0,),
        authority: tuple[str, str] | None = None,
    ) -> None:
        """``authority`` is the certificate (PEM) that containers trust, and its digest.

        Raises HostUnsupported.
        """
        super().__init__()
        with ExitStack() as made:
            made.callback(leave_private_mounts, run)
            require_programs()
            self._config = config
            self._run = run
            self._name = name
            self._trust = None if authority is None else Trust(run, *authority)
            self.images = images_of(config, "oci")
            self.cgroups = CgroupTree.open(name, processes)
            made.callback(self.cgroups.close)
            self.notify = made.enter_context(NotifyServer())
            self.namespaces = UserNamespaces(LAUNCH, config.ids.base, config.ids.count)
            made.callback(self.namespaces.close)
            self.push(made.pop_all())

    def clean_leftovers(self) -> list[str]:
        """End and remove the containers that an earlier daemon of this state directory left."""
        found = self.cgroups.leftovers()
        for cgroup in found:
            cgroup.kill()
            cgroup.remove()
        return [cgroup.name for cgroup in found]

    def engines(self) -> list[OciEngine]:
        """An engine for each runtime that could serve, best first. Raises HostUnsupported."""
        return [
            OciEngine(
                found,
                run=self._run,
                images=self.images,
                cgroups=self.cgroups,
                namespaces=self.namespaces,
                notify=self.notify,
                trust=self._trust,
            )
            for found in find_runtimes(self._config.runtime)
        ]

    def docker_engine(self) -> DockerEngine:
        """The Docker Engine of the configuration, which nothing was asked of yet."""
        from sandboxd.engine.docker import DockerEngine  # noqa: PLC0415  (slow)

        endpoint, images = _docker(self._config)
        return DockerEngine(
            endpoint,
            instance=self._name,
            images=images,
            cgroups=self.cgroups,
            notify=self.notify,
            runtime=self._config.docker.runtime,
            trust=self._trust,
        )

    async def open_engine(self) -> OciEngine | DockerEngine:
        """The first engine that makes a real container here. Raises HostUnsupported.

        ``auto`` takes an OCI runtime where one works, else the Docker Engine.
        """
        tried: list[str] = []
        if self._config.engine != "docker":
            try:
                engines = self.engines()
            except errors.HostUnsupported as error:
                engines, tried = [], [str(error)]
            for engine in engines:
                if await self._works(engine, tried):
                    return engine
        if self._config.engine != "oci":
            docker = self.docker_engine()
            if await self._works(docker, tried):
                return docker
        raise errors.HostUnsupported("no engine makes a container here: " + "; ".join(tried))

    async def _works(self, engine: OciEngine | DockerEngine, tried: list[str]) -> bool:
        """Whether it makes a container: then it stays open; else ``tried`` says why not."""
        with ExitStack() as stack:
            stack.enter_context(engine)
            capabilities = await engine.probe()
            if capabilities.usable:
                self.push(stack.pop_all())
                return True
        name = engine.runtime.name if engine.name == "oci" else engine.name
        tried += [f"{name}: {check.found}" for check in capabilities.checks if not check.ok]
        return False
