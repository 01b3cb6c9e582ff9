"""The ``docker`` engine: containers by a Docker Engine on this host.

Theory of operation.  The engine is asked for a container whose entry point is our PID 1 (``request.py``);
what its API cannot say is done to the container that is up (``finish.py``). PID 1 connects to a socket in a
directory that is mounted there for that moment (``door.py``); from then on everything goes over that
connection, the pidfd and the cgroup, as with every engine, and the Docker Engine is not asked again until
the container is removed. So a call that has its slot does not depend on the engine, and none waits for it.

A container ends when its PID 1 does, and the engine removes it then (``AutoRemove``), whether or not this
daemon is there to ask. What an earlier daemon left is removed at start. Ours is what has this daemon's label
*and* a name of ours: an image can bring a label, and no container its name.

User namespaces are the Docker Engine's (``userns-remap``), one map for all its containers: ``slot`` is
refused, ``engine`` runs where it has one, ``none`` everywhere.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.to_thread
import structlog
from uuid6 import uuid7

from sandboxd import errors
from sandboxd.engine.base import Capabilities, Check, Lacks, Slot
from sandboxd.engine.bundle import INIT_PATH, temporary
from sandboxd.engine.docker.accounts import check_accounts
from sandboxd.engine.docker.door import Door
from sandboxd.engine.docker.endpoint import MissingInEngine
from sandboxd.engine.docker.facts import EngineFacts, look
from sandboxd.engine.docker.finish import finish, root_of
from sandboxd.engine.docker.removal import Removal
from sandboxd.engine.docker.request import INSTANCE_LABEL, Labels, make_request
from sandboxd.engine.doors import doors_of
from sandboxd.engine.interpreter import with_interpreter
from sandboxd.engine.killing import DEATH_TIMEOUT, kill
from sandboxd.engine.oci import cgroup_limits, tool_setup
from sandboxd.engine.parking import parked_process
from sandboxd.engine.presented import new_secrets, new_workspace
from sandboxd.engine.trust import trusted_by
from sandboxd.engine.warming import Warming
from sandboxd.init import INIT
from sandboxd.init.protocol import Control
from sandboxd.kernel.orphans import end_process
from sandboxd.policy import seccomp
from sandboxd.policy.paths import SECRETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.docker.endpoint import DockerEndpoint
    from sandboxd.engine.docker.images import DockerImages
    from sandboxd.engine.trust import Trust
    from sandboxd.images import HostBind, Image
    from sandboxd.kernel.cgroup_tree import CgroupTree
    from sandboxd.kernel.notify import NotifyServer
    from sandboxd.plan import Mount, Shape

__all__ = ["DockerEngine", "DockerRuntime", "run_directory"]

CONNECT_TIMEOUT = 20.0  # seconds from the start of a container until PID 1 has connected
SETUP_TIMEOUT = 30.0  # seconds for each step of PID 1
REQUESTS = 32  # threads that wait for the engine at once: the daemon has others
WORKSPACE = "/workspace"

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DockerRuntime:
    """The runtime that the engine uses, by its name there."""

    name: str


def run_directory(instance: str) -> Path:
    """Where the doors are: in /run, which the engine sees as we do, and beside the daemon's own mounts."""
    return Path(f"/run/sandboxd-{instance}-docker")


class DockerEngine:
    """Implements ``engine.base.Engine``; see the module's first lines. A context manager."""

    name = "docker"

    def __init__(
        self,
        endpoint: DockerEndpoint,
        *,
        instance: str,
        images: DockerImages,
        cgroups: CgroupTree,
        notify: NotifyServer,
        runtime: str | None = None,
        trust: Trust | None = None,
    ) -> None:
        """``runtime`` is one that the engine has by this name; without it, the engine's default.

        Without ``trust``, there is no container for a policy that looks into HTTP.
        """
        self._endpoint = endpoint
        self._instance = instance
        self.images = images
        self._cgroups = cgroups
        self._notify = notify
        self._trust = trust
        self._wanted = runtime
        self.runtime = DockerRuntime(runtime or "default")
        self._host: EngineFacts | None = None
        self._directory = run_directory(instance)
        self._warming = Warming()
        self._resources: dict[str, ExitStack] = {}
        self._removal = Removal(endpoint)
        self._looked_at: set[str] = set()
        self._threads: anyio.CapacityLimiter | None = None

    def __enter__(self) -> Self:
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o711)
        return self

    def __exit__(self, *_: object) -> None:
        self._removal.try_again()
        self._endpoint.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def probe(self) -> Capabilities:
        """Run a real container and say what this host can enforce."""
        try:
            shape = await self.probe_shape()
            removed = await self._in_thread(self.clean_leftovers)
            if removed:
                log.warning("containers of an earlier daemon were removed", count=len(removed))
            await self.destroy(await self.create(shape))
            check = Check("container", ok=True, found=f"Docker's {self.runtime.name} makes containers")
        except errors.SandboxdError as error:
            check = Check(
                "container",
                ok=False,
                found=str(error),
                advice="start the Docker Engine, or name its socket: `docker: {socket: /run/docker.sock}`",
            )
        return Capabilities(self.name, self.runtime.name, (check,))

    async def probe_shape(self) -> Shape:
        """A small shape that this engine can make. Raises EngineFailed, HostUnsupported."""
        from sandboxd.engine.probe import probe_shape  # noqa: PLC0415  (only at start)

        host = await self._in_thread(self._look)
        image = await self._in_thread(self.images.resolve, "host")
        shape = probe_shape()
        process = replace(shape.process, user_namespace="engine" if host.remapped else "none")
        return replace(shape, process=process, image=replace(shape.image, digest=image.digest))

    async def create(self, shape: Shape, *, warm: bool = True) -> Slot:
        """A container of this shape, its tool process parked. Raises EngineFailed, HostFailed."""
        again = partial(self._in_thread, self._create, shape)
        slot = await again()
        if not warm:
            return slot
        return await with_interpreter(slot, self._warming, destroy=self.destroy, again=again)

    async def kill(self, slot: Slot) -> None:
        """End every process of the slot but PID 1, with which the engine would remove the cgroup."""
        await kill(slot)

    async def destroy(self, slot: Slot) -> None:
        """Kill and clean. Safe to call twice. An engine that is down removes the container when it is up."""
        with anyio.CancelScope(shield=True):
            stack = self._resources.pop(slot.id, None)
            if stack is None:
                return
            await self._in_thread(self._end, slot, stack)

    def _end(self, slot: Slot, stack: ExitStack) -> None:
        with stack, suppress(errors.HostFailed):  # where PID 1 has ended, the engine has removed the cgroup
            slot.cgroup.thaw_and_unthrottle()

    def clean_leftovers(self) -> list[str]:
        """Remove the containers of an earlier daemon of this instance. Raises EngineFailed."""
        wanted = {"label": f"{INSTANCE_LABEL}={self._instance}"}
        with self._endpoint.asking("leftovers") as client:
            found = client.containers(all=True, filters=wanted)
        prefix = f"/sandboxd-{self._instance}-"
        ours = [one["Id"] for one in found if any(name.startswith(prefix) for name in one.get("Names") or ())]
        for container in ours:
            self._removal.remove(container)
        self.images.forget_removed()
        return ours

    async def _in_thread(self, function: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        if self._threads is None:
            self._threads = anyio.CapacityLimiter(REQUESTS)
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._threads)

    def _look(self) -> EngineFacts:
        """What the engine is, and that it has the runtime. Raises EngineFailed, HostUnsupported."""
        self._host = look(self._endpoint, self._wanted)
        self.runtime = DockerRuntime(self._host.runtime)
        return self._host

    @property
    def lacks(self) -> Lacks:
        """What no container of this engine has, as far as it is known."""
        kinds = {
            "slot": "the Docker Engine gives no container a user namespace of its own; a policy for it says "
            "`process: {user_namespace: engine}` (userns-remap) or `none`"
        }
        if self._host is not None and not self._host.remapped:
            kinds["engine"] = (
                "this Docker Engine runs without userns-remap; configure it there, or let the policy say "
                "`process: {user_namespace: none}`"
            )
        return Lacks(
            kinds,
            overlay_root="the Docker Engine cannot bound the size of a writable root; a policy for it says "
            "`filesystem: {root: read-only}`",
            host_network="a Docker Engine with userns-remap gives no container the host's network; a policy "
            "for it says `network: {mode: rules}`, with what it may reach"
            if self._host is not None and self._host.remapped
            else None,
        )

    def _create(self, shape: Shape) -> Slot:
        self.lacks.refuse(shape, errors.ControlNotEnforced)
        self._removal.try_again()
        try:
            with ExitStack() as stack:
                slot = self._make(shape, self._host or self._look(), stack)
                self._resources[slot.id] = stack.pop_all()
                return slot
        except OSError as error:
            raise errors.HostFailed(f"the host refused a part of a container: {error}") from error
        except errors.NotFound as error:  # the image, which was there when the call was accepted
            raise errors.EngineFailed(str(error)) from error

    def _make(self, shape: Shape, host: EngineFacts, stack: ExitStack) -> Slot:
        image = self.images.resolve(shape.image.digest)
        held = stack.enter_context(ExitStack())
        held.enter_context(self.images.hold(image.digest))
        labels = Labels(self._instance, str(uuid7()))
        door = stack.enter_context(Door(self._directory / labels.slot, host.base))
        container = self._create_container(shape, image, labels, door, host)
        stack.callback(self._removal.remove, container)
        init_pid, upper = self._start(container)
        stack.callback(self._kill_container, container)
        control = Control(door.accept(init_pid, host.base, CONNECT_TIMEOUT))
        stack.callback(control.close)
        pidfd = os.pidfd_open(init_pid)
        stack.callback(end_process, pidfd, DEATH_TIMEOUT)
        root_of(init_pid, upper)
        lent: list[HostBind | Mount] = [*image.binds, *shape.mounts]
        binds = {one.target: one.source for one in lent}
        with ExitStack() as opened:
            mount = new_workspace(shape, host.base)
            opened.callback(os.close, mount)
            workspace = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
            stack.callback(os.close, workspace)
            ours, secrets = {WORKSPACE: mount}, None
            if shape.granted("file"):
                ours[SECRETS], secrets = self._secrets(shape, host.base, labels.slot)
                opened.callback(os.close, ours[SECRETS])
                stack.callback(os.close, secrets)
            finish(init_pid, binds, ours, temporary(shape) if host.podman else ())
        listener = self._notify.add(
            control.setup(tool_setup(shape), SETUP_TIMEOUT), answer=seccomp.answer, on_denied=None
        )
        stack.callback(listener.close)
        trusted, bundles = trusted_by(shape, self._trust, init_pid=init_pid, image=image, owner=host.base)
        cgroup = self._cgroups.of_process(labels.slot, init_pid)
        tool_pid = parked_process(cgroup, init_pid)
        cgroup.set(cgroup_limits(shape.limits, Path(host.root)))
        return Slot(
            labels.slot,
            shape,
            self.name,
            self.runtime.name,
            init_pid,
            pidfd,
            tool_pid,
            control,
            cgroup,
            listener,
            workspace,
            host.base,
            Path(f"/proc/{init_pid}/ns/user").stat().st_ino if host.remapped else None,
            _identities(init_pid, workspace, secrets, binds) | bundles,
            None,
            secrets,
            doors_of(shape, init_pid, stack),
            trusted=trusted,
            spares_init=True,
            held=held,
        )

    def _secrets(self, shape: Shape, base: int, slot: str) -> tuple[int, int]:
        """The tmpfs for secrets, made in the mount namespace that is this process's own."""
        place = self._directory / f"{slot}-secrets"
        place.mkdir(mode=0o700)
        try:
            return new_secrets(shape, base, place)
        finally:
            place.rmdir()

    def _create_container(
        self, shape: Shape, image: Image, labels: Labels, door: Door, host: EngineFacts
    ) -> str:
        """The id of a container that is not started. What was imported and removed is imported again."""
        for last in (False, True):
            source = self.images.in_engine(image)
            if host.podman:  # which is told to make none of them
                source = replace(source, volumes=())
            request = make_request(
                shape,
                source,
                [*image.binds, *shape.mounts],
                labels=labels,
                door=door.directory,
                runtime=self._wanted,
            )
            try:
                if image.digest not in self._looked_at:
                    self._look_at(image, request, labels, host)
                    self._looked_at.add(image.digest)
                with self._endpoint.asking("create a container") as client:
                    return host.create_container(client, request, labels.name)
            except MissingInEngine:
                self.images.gone(image)
                if last:
                    raise
            except errors.EngineFailed:
                self._removal.remember(labels.name)  # it may make the container yet, whose id is not known
                raise
        raise AssertionError

    def _look_at(self, image: Image, request: dict[str, Any], labels: Labels, host: EngineFacts) -> None:
        """Raise EngineFailed for an image that would hold up the engine itself."""
        asked = request["HostConfig"]
        covered = {one["Target"]: "" for one in asked["Mounts"]}  # else a volume of the image would be there
        bare = {**request, "HostConfig": {**asked, "Mounts": [], "Tmpfs": {**asked["Tmpfs"], **covered}}}
        name = f"{labels.name}-look"
        try:
            with self._endpoint.asking("look at an image") as client:
                check_accounts(client, host.create_container(client, bare, name), image.name)
        finally:
            self._removal.remove(name)

    def _start(self, container: str) -> tuple[int, str | None]:
        """Start it; returns PID 1 as the host numbers it, and the upper layer of its root."""
        with self._endpoint.asking("start a container") as client:
            client.start(container)
            found = client.inspect_container(container)
        pid = int(found["State"]["Pid"])
        if pid <= 0:
            raise errors.EngineFailed(f"PID 1 ended at once, with status {found['State'].get('ExitCode')}")
        return pid, ((found.get("GraphDriver") or {}).get("Data") or {}).get("UpperDir")

    def _kill_container(self, container: str) -> None:
        """For one that never connected: else its processes are dead by now."""
        with suppress(errors.EngineFailed), self._endpoint.asking("kill a container") as client:
            client.kill(container)


def _identities(
    init_pid: int, workspace: int, secrets: int | None, binds: dict[str, str]
) -> dict[str, tuple[int, int]]:
    """Device and inode of the root of each mount: but for ``/``, as this daemon has it on the host."""
    found = {target: os.stat(source) for target, source in (*binds.items(), (INIT_PATH, str(INIT)))}  # noqa: PTH116
    found["/"] = os.stat(f"/proc/{init_pid}/root")  # noqa: PTH116
    found[WORKSPACE] = os.fstat(workspace)
    if secrets is not None:
        found[SECRETS] = os.fstat(secrets)
    return {target: (one.st_dev, one.st_ino) for target, one in found.items()}
