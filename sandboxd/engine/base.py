"""What an engine is, and what it hands to the supervisor.

An engine only makes a container that runs our init as PID 1 with the shape's isolation in force,
connected to the daemon's control socket, and takes it away again. Receipt, usage, limits and
collection act on the ``Slot`` through ``kernel/`` and are written once, for every engine.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd.init.protocol import Control
    from sandboxd.kernel.cgroup import Cgroup
    from sandboxd.kernel.notify import Listener
    from sandboxd.network.namespace import Doors
    from sandboxd.plan import Shape
    from sandboxd.receipt import Reading

__all__ = ["Capabilities", "Check", "Engine", "Slot", "Stacked", "Trusted"]


@dataclass(frozen=True)
class Check:
    """One line of what a host can do: ``advice`` says what to change where it cannot."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    required: bool = True


@dataclass(frozen=True)
class Capabilities:
    """What this engine can enforce on this host, found by running a real container."""

    engine: str
    runtime: str
    checks: tuple[Check, ...]

    @property
    def usable(self) -> bool:
        """Whether all that no policy can do without is there."""
        return all(check.ok for check in self.checks if check.required)


@dataclass(frozen=True)
class Lacks:
    """What no container of an engine can have on this host, each with a sentence that says what to do."""

    user_namespaces: Mapping[str, str] = field(default_factory=dict)
    """By the kind that a policy asks for."""
    overlay_root: str | None = None
    host_network: str | None = None

    def refuse(self, shape: Shape, error: type[errors.SandboxdError] = errors.ControlNotSupported) -> None:
        """Raise the error, which names the control, for a shape that no container here can have."""
        if (said := self.user_namespaces.get(shape.process.user_namespace)) is not None:
            raise error(said, control="user_namespace")
        if self.overlay_root is not None and shape.root.mode == "overlay":
            raise error(self.overlay_root, control="root_overlay")
        if self.host_network is not None and shape.host_network:
            raise error(self.host_network, control="network")


@dataclass(frozen=True)
class Trusted:
    """Whom a container was made to trust: the daemon's authority."""

    authority: str
    """``sha256:…`` of its certificate."""
    files: Mapping[str, str]
    """Digests of the bundles that have it, by their places in the container."""


@dataclass(frozen=True)
class Stacked:
    """The workspace of a call in a session: an overlay, with an upper layer of the call's own."""

    upper_fd: int
    """Descriptor of the upper layer, which outlives the container."""
    layers: int
    """How many are below it."""
    checkout: bool = False
    """Whether a directory of the caller's is below them."""


@dataclass
class Slot:
    """One container that an engine has made; its tool process is parked before ``execve``."""

    id: str
    shape: Shape
    engine: str
    runtime: str
    init_pid: int
    """PID 1 of the container, as the host numbers it."""
    init_pidfd: int
    tool_pid: int
    """The parked tool process, as the host numbers it."""
    control: Control
    cgroup: Cgroup
    listener: Listener
    """The seccomp listener of the tool's filter."""
    workspace_fd: int
    """``O_PATH`` descriptor of the workspace's root; outlives the container."""
    id_base: int
    """The first host id of the slot's range; 0 where the container shares the host's user namespace."""
    user_namespace: int | None
    """Inode of the slot's user namespace; None where it has none of its own."""
    presented: Mapping[str, tuple[int, int]]
    """What the engine mounted, by its place in the container: device and inode of its root."""
    upper_fd: int | None
    """``O_PATH`` descriptor of the writable layer of the root, where there is one."""
    secrets_fd: int | None = None
    """``O_PATH`` descriptor of the root of ``/run/secrets``, by a mount that can be written to."""
    doors: Doors | None = None
    """The sockets of its network namespace, where its policy has a network."""
    trusted: Trusted | None = None
    """Where its policy looks into HTTP."""
    spares_init: bool = False
    """Whether a kill leaves PID 1 alone, with which the engine would remove the cgroup before it is read."""
    warm: bool = False
    """Whether the parked process is the shape's interpreter, which waits for a command."""
    held: ExitStack = field(default_factory=ExitStack)
    """Keeps the image from being removed; a slot that waits lets go of it."""
    stacked: Stacked | None = None
    """Where the call's session has put its files into the place of the empty workspace."""
    shared: bool = False
    """Whether other calls were in the container before, and may have left something running."""
    reading: Reading | None = None
    """What was read of the slot when it was made, where it has waited for its call."""


class Engine(Protocol):
    """Makes containers out of shapes.

    ``create`` raises ``EngineFailed`` or ``HostFailed`` and then has left nothing behind;
    ``destroy`` may be called twice, and returns only when every process of the slot is dead and its
    cgroup, mounts and descriptors are gone.
    """

    async def probe(self) -> Capabilities:
        """Run a real container and say what this host can enforce."""
        ...

    @property
    def lacks(self) -> Lacks:
        """What no container of it can have here; known once it was probed."""
        ...

    async def create(self, shape: Shape, *, warm: bool = True) -> Slot:
        """A container of this shape: init connected, the tool process parked before ``execve``.

        With ``warm``, the shape's interpreter waits in it if there is one; that takes as long as it
        takes to start, so it is for slots that are made ahead.
        """
        ...

    async def kill(self, slot: Slot) -> None:
        """End every process of the slot at once; its files stay readable until ``destroy``."""
        ...

    async def destroy(self, slot: Slot) -> None:
        """Kill, reap, clean."""
        ...
