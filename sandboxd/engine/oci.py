"""The ``oci`` engine: the built-in runtime, or an OCI runtime (``crun``, ``runc``, one by configuration).

Theory of operation.  The daemon lives in a mount namespace of its own, with a tmpfs in
``/run`` that only it sees; everything a slot is made of is mounted there and goes with the
daemon.  For a slot the engine takes a berth (``berth.py``: id range, cgroup, directory, connection, and
a process that is in the cgroup), presents the image through an id-mapped read-only mount and the
workspace as a tmpfs of the policy's size, and lets the process become our PID 1 (``builtin.py``), or the
runtime, which starts it from a bundle and exits (``bundled.py``). PID 1 parks the tool process; then the
limits are written to the cgroup, so that they bind the tool and not the runtime. Making and ending a slot
blocks, so both happen in worker threads.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Self

import anyio
import anyio.to_thread

from sandboxd import errors
from sandboxd.engine.base import Capabilities, Check, Lacks, Slot
from sandboxd.engine.berth import Berth, Berths
from sandboxd.engine.doors import doors_of
from sandboxd.engine.interpreter import with_interpreter
from sandboxd.engine.killing import DEATH_TIMEOUT, kill
from sandboxd.engine.parking import parked_process, whole_disk
from sandboxd.engine.presented import SlotMounts
from sandboxd.engine.trust import trusted_by
from sandboxd.engine.warming import Warming
from sandboxd.init.protocol import Rlimit, Setup
from sandboxd.kernel.cgroup import CgroupLimits
from sandboxd.kernel.orphans import end_process, reap_orphans
from sandboxd.policy import seccomp

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.engine.runtime import Runtime
    from sandboxd.engine.trust import Trust
    from sandboxd.images import ImageStore
    from sandboxd.kernel.cgroup_tree import CgroupTree
    from sandboxd.kernel.notify import Listener, NotifyServer
    from sandboxd.kernel.userns import UserNamespaces
    from sandboxd.plan import Limits, Shape

__all__ = ["OciEngine", "cgroup_limits", "rlimits", "tool_setup"]

CREATE_TIMEOUT = 30.0  # seconds for the runtime, and for each step of PID 1
OOM_SCORE_ADJ = 500  # PID 1 keeps 0, so that the kernel picks the tool


def cgroup_limits(limits: Limits, images: Path | None) -> CgroupLimits:
    """What a plan's limits mean for a cgroup; ``images`` is a path on the disk that holds them."""
    io: tuple[tuple[int, int, int | None, int | None], ...] = ()
    if limits.io_read is not None or limits.io_write is not None:
        device = None if images is None else whole_disk(images)
        if device is None:
            raise errors.ControlNotEnforced(
                "limits.io: the file system that holds the images is on no block device that the kernel "
                "can throttle",
                control="io",
            )
        io = ((*device, limits.io_read, limits.io_write),)
    return CgroupLimits(memory=limits.memory, pids=limits.pids, cpus=limits.cpus, io=io)


def rlimits(limits: Limits) -> tuple[Rlimit, ...]:
    """The rlimits of the tool process."""
    import resource  # noqa: PLC0415  (only its constants, and only on Linux)

    wanted = {
        resource.RLIMIT_NOFILE: limits.open_files,
        # Not 0: where core_pattern names a program, the kernel starts it, as root on the host, for 0 too,
        # and for 1 alone it does not (core(5), coredump_pipe() in fs/coredump.c).
        resource.RLIMIT_CORE: 1,
        resource.RLIMIT_SIGPENDING: 4096,
        resource.RLIMIT_MEMLOCK: 64 * 1024,
        resource.RLIMIT_MSGQUEUE: 819_200,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    if limits.file_size is not None:
        wanted[resource.RLIMIT_FSIZE] = limits.file_size
    return tuple(Rlimit(number, value, value) for number, value in sorted(wanted.items()))


def tool_setup(shape: Shape) -> Setup:
    """What PID 1 makes of the tool process of a shape."""
    owner = shape.process
    return Setup(
        owner.uid,
        owner.gid,
        owner.umask,
        OOM_SCORE_ADJ,
        rlimits(shape.limits),
        shape.program.bpf,
        keep=shape.kept,
    )


class OciEngine:
    """Implements ``engine.base.Engine``; see the module's first lines."""

    name = "oci"

    def __init__(
        self,
        runtime: Runtime,
        *,
        run: Path,
        images: ImageStore,
        cgroups: CgroupTree,
        namespaces: UserNamespaces,
        notify: NotifyServer,
        trust: Trust | None = None,
    ) -> None:
        """``run`` is a directory on a tmpfs of the daemon's own mount namespace.

        Without ``trust``, there is no container for a policy that looks into HTTP.
        """
        self.runtime = runtime
        self._run = run
        self._images = images
        self._berths = Berths(run, runtime, cgroups, namespaces)
        self._notify = notify
        self._trust = trust
        self._warming = Warming()
        self._resources: dict[str, ExitStack] = {}
        for part in ("slots", "runtime"):
            (run / part).mkdir(mode=0o711, exist_ok=True)

    def __enter__(self) -> Self:
        self._berths.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._berths.__exit__(*exception)

    async def probe(self) -> Capabilities:
        """Run a real container, without an image, and say what this host can enforce."""
        from sandboxd.engine.probe import probe_shape  # noqa: PLC0415  (only at start)

        try:
            slot = await self.create(probe_shape())
            await self.destroy(slot)
            check = Check("container", ok=True, found=f"{self.runtime.name} makes containers")
        except errors.AttemptFailed as error:
            check = Check(
                "container",
                ok=False,
                found=str(error),
                advice=f"make `{self.runtime.name}` work, or name another runtime",
            )
        return Capabilities(self.name, self.runtime.name, (check,))

    @property
    def lacks(self) -> Lacks:
        """What no container of this engine has."""
        said = "the oci engine gives each container a user namespace of its own; {} is for `engine: docker`"
        return Lacks(
            {kind: said.format(f"`process: {{user_namespace: {kind}}}`") for kind in ("engine", "none")}
        )

    async def create(self, shape: Shape, *, warm: bool = True) -> Slot:
        """A container of this shape, its tool process parked. Raises EngineFailed, HostFailed."""
        try:
            again = partial(anyio.to_thread.run_sync, self._create, shape)
            slot = await again()
            if not warm:
                return slot
            return await with_interpreter(slot, self._warming, destroy=self.destroy, again=again)
        finally:
            reap_orphans()  # crun leaves one behind each time, whoever started it

    async def kill(self, slot: Slot) -> None:
        """End every process of the slot; its files stay readable until ``destroy``."""
        await kill(slot)

    async def destroy(self, slot: Slot) -> None:
        """Kill, reap, clean. Safe to call twice."""
        with anyio.CancelScope(shield=True):
            stack = self._resources.pop(slot.id, None)
            if stack is None:
                return
            try:
                await self.kill(slot)
            finally:
                await anyio.to_thread.run_sync(stack.close)
                reap_orphans()
                self._berths.refill()

    def _create(self, shape: Shape) -> Slot:
        self.lacks.refuse(shape, errors.ControlNotEnforced)
        try:
            return self._make(shape)
        except OSError as error:
            raise errors.HostFailed(f"the host refused a part of a container: {error}") from error

    def _make(self, shape: Shape) -> Slot:
        berth = self._berths.take(host_network=shape.host_network)
        with berth.stack as stack:
            slot = self._assemble(berth, shape, stack)
            self._resources[slot.id] = stack.pop_all()
        return slot

    def _assemble(self, berth: Berth, shape: Shape, stack: ExitStack) -> Slot:
        ids, cgroup = berth.ids, berth.cgroup
        image = self._images.resolve(shape.image.digest)
        held = stack.enter_context(ExitStack())
        held.enter_context(self._images.hold(image.digest))
        made = SlotMounts(berth.directory, shape, image, ids, stack)
        init_pid, pidfd, listener = self._start(berth, shape, made, stack)
        stack.callback(end_process, pidfd, DEATH_TIMEOUT)
        tool_pid = parked_process(cgroup, init_pid)
        trusted, bundles = trusted_by(shape, self._trust, init_pid=init_pid, image=image, owner=ids.base)
        cgroup.set(cgroup_limits(shape.limits, image.rootfs))
        return Slot(
            berth.name,
            shape,
            self.name,
            self.runtime.name,
            init_pid,
            pidfd,
            tool_pid,
            berth.control,
            cgroup,
            listener,
            made.workspace_fd,
            ids.base,
            os.fstat(ids.namespace).st_ino,
            made.identities | bundles,
            made.upper_fd,
            made.secrets_fd,
            doors_of(shape, init_pid, stack),
            trusted=trusted,
            held=held,
        )

    def _start(
        self, berth: Berth, shape: Shape, made: SlotMounts, stack: ExitStack
    ) -> tuple[int, int, Listener]:
        """Let the runtime go and park the tool process; returns PID 1, its pidfd, the filter's listener."""
        berth.container.begin(shape, made, CREATE_TIMEOUT)
        try:
            listener_fd = berth.control.setup(tool_setup(shape), CREATE_TIMEOUT)
        except errors.EngineFailed:
            _, pidfd = berth.container.started()  # when the runtime failed, that is why nobody answered
            os.close(pidfd)
            raise
        listener = self._notify.add(listener_fd, answer=seccomp.answer, on_denied=None)
        stack.callback(listener.close)
        return *berth.container.started(), listener
