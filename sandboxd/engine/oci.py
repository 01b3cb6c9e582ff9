"""The ``oci`` engine: an OCI runtime (``crun``, ``runc`` or one by configuration) and nothing else.

Theory of operation.  The daemon lives in a mount namespace of its own, with a tmpfs in
``/run`` that only it sees; everything a slot is made of is mounted there and goes with the
daemon.  For a slot the engine takes an id range, makes a cgroup, presents the image through an
id-mapped read-only mount and the workspace as a tmpfs of the policy's size, writes the bundle, and
lets ``sandboxd-launch`` enter the cgroup and become the runtime, which starts our PID 1 and exits.
PID 1 parks the tool process; then the limits are written to the cgroup, so that they bind the tool
and not the runtime.  Making and ending a slot blocks, so both happen in worker threads.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread
from uuid6 import uuid7

from sandboxd import errors
from sandboxd.engine.base import Capabilities, Check, Slot
from sandboxd.engine.bundle import INIT_PATH, Bind, BundlePaths, make_config
from sandboxd.engine.launch import Launch
from sandboxd.init import INIT
from sandboxd.init.protocol import Control, Rlimit, Setup
from sandboxd.kernel import mounts
from sandboxd.kernel.cgroup import CgroupLimits
from sandboxd.kernel.orphans import end_process, reap, reap_orphans
from sandboxd.policy import seccomp

if TYPE_CHECKING:
    from sandboxd.images import HostBind, Image, ImageStore
    from sandboxd.kernel.cgroup import Cgroup, CgroupTree
    from sandboxd.kernel.notify import Listener, NotifyServer
    from sandboxd.kernel.userns import IdRange, UserNamespaces
    from sandboxd.plan import Limits, Mount, Shape

__all__ = ["OciEngine", "Runtime", "cgroup_limits", "find_runtimes", "rlimits"]

CREATE_TIMEOUT = 30.0  # seconds for the runtime, and for each step of PID 1
RUNTIME_GONE = 1.0  # seconds until the runtime's own processes have left the cgroup, after its end
DEATH_TIMEOUT = 30.0  # seconds until a killed container must be gone
OOM_SCORE_ADJ = 500  # PID 1 keeps 0, so that the kernel picks the tool


@dataclass(frozen=True)
class Runtime:
    """An OCI runtime. ``dialect`` says whose command line it understands."""

    path: str
    dialect: Literal["crun", "runc"]

    @property
    def name(self) -> str:
        """The name that a receipt shows."""
        return Path(self.path).name

    def command(self, root: Path, slot: Path, name: str) -> list[str]:
        """The argv that makes and starts a container and then exits."""
        options = ["--cgroup-manager=disabled"] if self.dialect == "crun" else []
        return [
            self.path,
            "--root",
            str(root),
            *options,
            "run",
            "--detach",
            "--preserve-fds",
            "1",
            "--pid-file",
            str(slot / "pid"),
            "--bundle",
            str(slot),
            name,
        ]


def find_runtimes(wanted: str) -> list[Runtime]:
    """The runtimes to try, best first: ``auto``, ``crun``, ``runc``, or a path. Raises HostUnsupported."""
    if wanted == "auto":
        found = [Runtime(path, kind) for kind in ("crun", "runc") if (path := shutil.which(kind))]
    elif path := shutil.which(wanted):
        found = [Runtime(path, "crun" if "crun" in Path(path).name else "runc")]
    else:
        found = []
    if not found:
        raise errors.HostUnsupported(f"no OCI runtime ({wanted}) on PATH; install crun or runc")
    return found


def cgroup_limits(limits: Limits, device: tuple[int, int] | None) -> CgroupLimits:
    """What a plan's limits mean for a cgroup; ``device`` is the disk that holds the images."""
    io = ()
    if limits.io_read is not None or limits.io_write is not None:
        if device is None:
            raise errors.ControlNotEnforced(
                "limits.io: the file system that holds the images is on no block device that the kernel "
                "can throttle",
                control="io",
            )
        io = ((*device, limits.io_read, limits.io_write),)  # type: ignore[assignment]
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
    ) -> None:
        """``run`` is a directory on a tmpfs of the daemon's own mount namespace."""
        self.runtime = runtime
        self._run = run
        self._images = images
        self._cgroups = cgroups
        self._namespaces = namespaces
        self._notify = notify
        self._resources: dict[str, ExitStack] = {}
        for part in ("slots", "runtime"):
            (run / part).mkdir(mode=0o711, exist_ok=True)

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

    async def create(self, shape: Shape) -> Slot:
        """A container of this shape, its tool process parked. Raises EngineFailed, HostFailed."""
        try:
            return await anyio.to_thread.run_sync(self._create, shape)
        finally:
            reap_orphans()  # crun leaves one behind each time, whoever started it

    async def kill(self, slot: Slot) -> None:
        """End every process of the slot; its files stay readable until ``destroy``."""
        slot.cgroup.thaw_and_unthrottle()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(slot.init_pidfd, signal.SIGKILL)
        with anyio.move_on_after(DEATH_TIMEOUT) as scope:
            await anyio.wait_readable(slot.init_pidfd)
        if scope.cancelled_caught:
            raise errors.EngineFailed(f"container {slot.id} did not die within {DEATH_TIMEOUT:.0f} s")
        reap(slot.init_pidfd)

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

    def _create(self, shape: Shape) -> Slot:
        name = str(uuid7())
        began = time.monotonic()
        with ExitStack() as stack:
            try:
                slot = self._assemble(name, shape, stack)
            except OSError as error:
                raise errors.HostFailed(f"the host refused a part of a container: {error}") from error
            slot.started = began
            self._resources[name] = stack.pop_all()
        return slot

    def _assemble(self, name: str, shape: Shape, stack: ExitStack) -> Slot:
        ids = None
        if shape.process.user_namespace == "slot":
            ids = stack.enter_context(self._namespaces.borrowed())
        cgroup = self._cgroups.create(name, CgroupLimits(memory=None, pids=None, cpus=None))
        stack.callback(self._end_cgroup, cgroup, ids)
        directory = self._run / "slots" / name
        directory.mkdir(mode=0o711)  # the runtime looks up paths as the container's root
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(shutil.rmtree, self._run / "runtime" / name, ignore_errors=True)
        image = self._images.resolve(shape.image.digest)
        stack.enter_context(self._images.hold(image.digest))
        made = _Mounts(directory, shape, image, ids, stack)
        paths, workspace = made.make()
        config = make_config(
            shape,
            paths,
            userns=ids.path if ids else None,
            id_map=(ids.base, ids.size) if ids else None,
            cgroup=cgroup.relative_path if self.runtime.dialect == "runc" else None,
        )
        (directory / "config.json").write_text(json.dumps(config))
        control, init_pid, listener = self._start(shape, directory, cgroup, stack)
        pidfd = os.pidfd_open(init_pid)
        stack.callback(end_process, pidfd, DEATH_TIMEOUT)
        tool_pid = self._tool_of(cgroup, init_pid)
        cgroup.set(cgroup_limits(shape.limits, self._device(shape.limits, image)))
        return Slot(
            name,
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
            ids.base if ids else 0,
            os.fstat(ids.namespace).st_ino if ids else None,
            made.presented,
            made.upper_fd,
        )

    def _start(
        self, shape: Shape, directory: Path, cgroup: Cgroup, stack: ExitStack
    ) -> tuple[Control, int, Listener]:
        """The container with its tool process parked: the connection, PID 1 and the filter's listener."""
        ours, theirs = socket.socketpair()
        control = Control(ours)
        stack.callback(control.close)
        with theirs:
            launch = Launch(
                self.runtime.name,
                self.runtime.command(self._run / "runtime", directory, directory.name),
                control=theirs.fileno(),
                # runc places the container itself, and by a path below its own cgroup: it stays in ours
                places=cgroup.procs_files if self.runtime.dialect == "crun" else (),
                timeout=CREATE_TIMEOUT,
            )
        owner, program = shape.process, shape.program
        setup = Setup(owner.uid, owner.gid, owner.umask, OOM_SCORE_ADJ, rlimits(shape.limits), program.bpf)
        with launch:
            try:
                listener_fd = control.setup(setup, CREATE_TIMEOUT)
            except errors.EngineFailed:
                launch.finish()  # when the runtime failed, that is why nobody answered
                raise
            listener = self._notify.add(listener_fd, answer=seccomp.answer, on_denied=None)
            stack.callback(listener.close)
            launch.finish()
        try:
            return control, int((directory / "pid").read_text()), listener
        except ValueError as error:
            raise errors.EngineFailed(f"{self.runtime.name} wrote no pid: {error}") from error

    @staticmethod
    def _tool_of(cgroup: Cgroup, init_pid: int) -> int:
        """The parked process: what is in the cgroup beside PID 1, once what the runtime forked has left."""
        until = time.monotonic() + RUNTIME_GONE
        while len(tools := [pid for pid in cgroup.processes() if pid != init_pid]) != 1:
            if time.monotonic() > until:
                raise errors.ControlNotEnforced(
                    f"the cgroup holds {len(tools)} processes beside PID 1, not the parked one alone",
                    control="cgroup",
                )
            time.sleep(0.0005)
        return tools[0]

    def _end_cgroup(self, cgroup: Cgroup, ids: IdRange | None) -> None:
        try:
            cgroup.thaw_and_unthrottle()
            cgroup.kill()
            cgroup.remove()
        except BaseException:
            if ids is not None:  # what lives there must not meet the processes of another call
                self._namespaces.retire(ids)
            raise

    @staticmethod
    def _device(limits: Limits, image: Image) -> tuple[int, int] | None:
        if image.rootfs is None or (limits.io_read is None and limits.io_write is None):
            return None
        device = image.rootfs.stat().st_dev
        return _whole_disk(os.major(device), os.minor(device))


def _whole_disk(major: int, minor: int) -> tuple[int, int] | None:
    """The disk of a partition, since the kernel throttles disks; None when it is no block device."""
    at = Path(f"/sys/dev/block/{major}:{minor}")
    if not at.exists():
        return None
    if (at / "partition").exists():
        disk = (at.resolve().parent / "dev").read_text().strip().split(":")
        return int(disk[0]), int(disk[1])
    return major, minor


class _Mounts:
    """Makes the mounts of one slot in the daemon's namespace; the stack takes them off again."""

    def __init__(
        self, directory: Path, shape: Shape, image: Image, ids: IdRange | None, stack: ExitStack
    ) -> None:
        self._directory = directory
        self._shape = shape
        self._image = image
        self._ids = ids
        self._stack = stack
        self.presented: dict[str, tuple[int, int]] = {}
        self.upper_fd: int | None = None

    def make(self) -> tuple[BundlePaths, int]:
        """The bundle's paths, and the workspace's root as a descriptor that outlives the container."""
        lent: list[HostBind | Mount] = [*self._image.binds, *self._shape.mounts]
        binds = [
            self._present(Path(bind.source), bind.target, f"bind{number}") for number, bind in enumerate(lent)
        ]
        workspace = self._workspace()
        rootfs = self._root()
        self._note("/", rootfs)
        self._note("/workspace", self._directory / "workspace")
        self._note(INIT_PATH, INIT)
        for bind in binds:
            self._note(bind.target, bind.source)
        return BundlePaths(rootfs, self._directory / "workspace", INIT, tuple(binds)), workspace

    def _note(self, target: str, source: Path) -> None:
        found = source.stat()
        self.presented[target] = found.st_dev, found.st_ino

    def _attach(self, mount: int, name: str, *, directory: bool = True) -> Path:
        target = self._directory / name
        if directory:
            target.mkdir(mode=0o700)
        else:
            target.touch(mode=0o600)
        try:
            mounts.attach(mount, target)
        finally:
            os.close(mount)
        self._stack.callback(mounts.detach, target)
        return target

    def _clone(self, path: Path) -> int:
        mount = mounts.clone_tree(path)
        try:
            mounts.set_attributes(mount, read_only=True, userns=self._ids.namespace if self._ids else None)
        except BaseException:
            os.close(mount)
            raise
        return mount

    def _present(self, source: Path, target: str, name: str) -> Bind:
        path = self._attach(self._clone(source), name, directory=source.is_dir())
        return Bind(path, target, read_only=True)

    def _workspace(self) -> int:
        owner, limits = self._shape.process, self._shape.limits
        base = self._ids.base if self._ids else 0
        mount = mounts.new_mount(
            "tmpfs",
            {
                "size": str(limits.workspace_size),
                "nr_inodes": str(limits.workspace_inodes),
                "mode": "0755",
                "uid": str(base + owner.uid),
                "gid": str(base + owner.gid),
            },
        )
        root = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        self._stack.callback(os.close, root)
        self._attach(mount, "workspace")
        return root

    def _root(self) -> Path:
        rootfs = self._image.rootfs
        if rootfs is None:
            raise errors.EngineFailed(f"image {self._image.name} has no root file system")
        lower = self._attach(self._clone(rootfs), "image")
        missing = [mount.target for mount in self._shape.mounts if not _is_there(rootfs, mount)]
        if self._shape.root.mode == "read-only" and not missing:
            return lower
        return self._overlay(lower)

    def _overlay(self, lower: Path) -> Path:
        """An overlay that is thrown away: for a writable root, or for mount points that the image lacks."""
        root = self._shape.root
        upper = self._attach(
            mounts.new_mount(
                "tmpfs", {"size": str(root.size), "nr_inodes": str(root.inodes), "mode": "0755"}
            ),
            "upper",
        )
        self.upper_fd = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stack.callback(os.close, self.upper_fd)
        base = self._ids.base if self._ids else 0
        for part in ("upper", "work"):
            (upper / part).mkdir(mode=0o755)
            os.chown(upper / part, base, base)
        options = {"lowerdir": str(lower), "upperdir": str(upper / "upper"), "workdir": str(upper / "work")}
        return self._attach(mounts.new_mount("overlay", options), "rootfs")


def _is_there(rootfs: Path, mount: Mount) -> bool:
    """Whether the image has the mount point, as a directory or file that is reached through no link."""
    at = rootfs
    for part in Path(mount.target).parts[1:]:
        at = at / part
        if at.is_symlink() or not at.exists():
            return False
    return at.is_dir() == Path(mount.source).is_dir()
