"""A container by the built-in runtime, ``init/container.c``, whose first lines say how it works."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from sandboxd import errors
from sandboxd.engine.bundle import MASKED, READ_ONLY, temporary
from sandboxd.init import CONTAINER
from sandboxd.kernel import descriptors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from sandboxd.engine.presented import SlotMounts
    from sandboxd.kernel.cgroup import Cgroup
    from sandboxd.kernel.userns import IdRange
    from sandboxd.plan import Shape

__all__ = ["BuiltInContainer", "container_plan"]

MAX_SAID = 2000  # bytes of what the process says that are passed on
PREPARED = 30.0  # seconds until the namespaces are made


def container_plan(shape: Shape, targets: Sequence[str]) -> bytes:
    """What is mounted where, in order; ``targets``: of the detached mounts, the root's first."""
    words = ["hostname", shape.process.hostname, "root", "prepared", "/proc", "prepared", "/dev"]
    for target, options in temporary(shape):
        words += ["tmpfs", target, *options, ""]
    for target in targets[1:]:
        words += ["mount", target]
    if shape.root.mode == "read-only":
        words.append("sealed")
    return b"".join(os.fsencode(word) + b"\0" for word in words)


class BuiltInContainer:
    """Implements ``engine.berth.Container``: its process is PID 1 to be. A context manager."""

    def __init__(
        self, directory: Path, ids: IdRange, cgroup: Cgroup, control: int, *, host_network: bool = False
    ) -> None:
        """``directory`` is an empty one that the container's root can reach. Raises OSError, EngineFailed."""
        with ExitStack() as stack:
            self._said = os.memfd_create("container", os.MFD_CLOEXEC)
            stack.callback(os.close, self._said)
            self._plan, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # a process that has not become the container ends with its connection
            stack.callback(self._plan.close)
            with theirs:
                self._plan.settimeout(PREPARED)
                passed = [theirs.fileno(), control, ids.namespace]
                network = "host" if host_network else "own"
                command = [str(CONTAINER), *map(str, passed), network, str(directory), *cgroup.procs_files]
                parent = subprocess.Popen(
                    [*command, "--", *MASKED, "--", *READ_ONLY, "--", cgroup.name],
                    stdin=self._said,
                    stdout=self._said,
                    stderr=self._said,
                    pass_fds=passed,
                    env={},
                )
            try:
                data, fds, _ = descriptors.receive(self._plan, 64, 1)
            finally:
                parent.wait()
            if len(fds) != 1:
                raise self._failed()
            [self._pidfd] = fds
            stack.callback(os.close, self._pidfd)
            (self._pid,) = struct.unpack("=i", data)
            self._stack = stack.pop_all()

    def alive(self) -> bool:
        """Whether the process is there."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def begin(self, shape: Shape, made: SlotMounts, timeout: float) -> None:
        """Let the process become the container. Raises OSError."""
        self._plan.settimeout(timeout)
        plan = container_plan(shape, [one.target for one in made.all])
        socket.send_fds(self._plan, [plan], [one.mount for one in made.all])
        self._plan.close()

    def started(self) -> tuple[int, int]:
        """PID 1 and a pidfd of it. Raises EngineFailed when it has ended."""
        if not self.alive():
            raise self._failed()
        return self._pid, os.dup(self._pidfd)

    def _failed(self) -> errors.EngineFailed:
        text = os.pread(self._said, MAX_SAID, 0).decode(errors="replace").strip()
        return errors.EngineFailed(f"the built-in runtime could not make a container: {text}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
