"""Berths: what every container needs and no shape decides, made ahead of time.

Theory of operation.  A process that joins a cgroup of version 1 waits for a grace period of the kernel,
10 ms and more on an idle host. So an id range, a cgroup, a directory, the control connection and a process
that has already joined are made in the background: the built-in runtime's, which has made its namespaces too,
or the launcher of another runtime. A slot takes such a berth and puts its image, its limits and its command
into it. A berth serves one slot and ends with it.
"""

from __future__ import annotations

import shutil
import socket
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import structlog
from uuid6 import uuid7

from sandboxd import errors
from sandboxd.engine.builtin import BuiltInContainer
from sandboxd.engine.bundled import BundledContainer
from sandboxd.init.protocol import Control
from sandboxd.kernel.cgroup import CgroupLimits

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.engine.presented import SlotMounts
    from sandboxd.engine.runtime import Runtime
    from sandboxd.kernel.cgroup import Cgroup
    from sandboxd.kernel.cgroup_tree import CgroupTree
    from sandboxd.kernel.userns import IdRange, UserNamespaces
    from sandboxd.plan import Shape

__all__ = ["Berth", "Berths", "Container"]

READY = 4  # berths that wait; each is a cgroup and a process of 0.1 MiB
AGAIN = 1.0  # seconds until a berth that could not be made is tried again

log = structlog.get_logger(__name__)


class Container(Protocol):
    """A process in the cgroup that waits to become the container's PID 1, or to make it."""

    def alive(self) -> bool:
        """Whether the process is there."""
        ...

    def begin(self, shape: Shape, made: SlotMounts, timeout: float) -> None:
        """Make the container; PID 1 speaks on the control connection. Raises OSError."""
        ...

    def started(self) -> tuple[int, int]:
        """PID 1 and a pidfd of it, the caller's, once nothing else is left to do. Raises EngineFailed."""
        ...


@dataclass(frozen=True)
class Berth:
    """A place for one container. ``stack`` takes everything away, and whatever the slot adds to it."""

    name: str
    ids: IdRange
    cgroup: Cgroup
    directory: Path
    control: Control
    container: Container
    stack: ExitStack


class Berths:
    """Keeps berths ready, in a thread of its own. A context manager; thread-safe."""

    def __init__(self, run: Path, runtime: Runtime, cgroups: CgroupTree, namespaces: UserNamespaces) -> None:
        self._run = run
        self._runtime = runtime
        self._cgroups = cgroups
        self._namespaces = namespaces
        self._ready: list[Berth] = []
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._keep, name="berths", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        with ExitStack() as stack:  # one that cannot be cleared away does not keep the others
            for berth in self._ready:
                stack.push(berth.stack)
            self._ready.clear()

    def take(self, *, host_network: bool = False) -> Berth:
        """A berth whose process lives: one that waits, else a new one. Raises OSError, HostFailed.

        With ``host_network`` it has no network of its own; none waits that has not.
        """
        if host_network:
            return self._make(host_network=True)
        while True:
            with self._change:
                berth = self._ready.pop(0) if self._ready else None
            if berth is None:
                return self._make()
            if berth.container.alive():
                return berth
            try:
                berth.stack.close()
            except (OSError, errors.SandboxdError):
                log.exception("what was prepared for a container was not cleared away", id=berth.name)

    def refill(self) -> None:
        """Let the thread make up for what was taken. Not done by ``take``: it would be in the slot's way."""
        with self._change:
            self._change.notify_all()

    def _keep(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or len(self._ready) < READY)
                if self._closed:
                    return
            try:
                berth = self._make()
            except Exception as error:  # whatever it is, the thread goes on
                if isinstance(error, (OSError, errors.SandboxdError)):
                    log.warning("no container could be prepared", reason=str(error))
                else:
                    log.exception("no container could be prepared")
                with self._change:
                    self._change.wait_for(lambda: self._closed, timeout=AGAIN)
                continue
            with self._change:
                self._ready.append(berth)

    def _make(self, *, host_network: bool = False) -> Berth:
        name = str(uuid7())
        with ExitStack() as stack:
            ids = stack.enter_context(self._namespaces.borrowed())
            cgroup = self._cgroups.create(name, CgroupLimits(memory=None, pids=None, cpus=None))
            stack.callback(self._end_cgroup, cgroup, ids)
            directory = self._run / "slots" / name
            directory.mkdir(mode=0o711)  # the runtime looks up paths as the container's root
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            stack.callback(shutil.rmtree, self._run / "runtime" / name, ignore_errors=True)
            ours, theirs = socket.socketpair()
            control = Control(ours)
            stack.callback(control.close)
            with theirs:
                container = self._container(
                    directory, ids, cgroup, theirs.fileno(), host_network=host_network
                )
            stack.enter_context(container)
            return Berth(name, ids, cgroup, directory, control, container, stack.pop_all())

    def _container(
        self, directory: Path, ids: IdRange, cgroup: Cgroup, control: int, *, host_network: bool
    ) -> BuiltInContainer | BundledContainer:
        if self._runtime.dialect == "builtin":
            return BuiltInContainer(directory, ids, cgroup, control, host_network=host_network)
        return BundledContainer(
            self._runtime, directory, ids, cgroup, root=self._run / "runtime", control=control
        )

    def _end_cgroup(self, cgroup: Cgroup, ids: IdRange) -> None:
        try:
            cgroup.kill()
            cgroup.remove()
        except BaseException:
            self._namespaces.retire(ids)  # what lives there must not meet the processes of another call
            raise
