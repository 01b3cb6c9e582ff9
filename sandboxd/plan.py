"""Pure: a policy and an image make a ``Shape``; a shape and a request make a ``Plan``.

A shape holds exact values for everything that a container needs before its command is known, and
nothing else; it is the key of a pool of waiting containers. A plan adds the command and what the
request narrows, and says all that is needed to run the call again, here or elsewhere: no path of
this host but those an operator wrote as a mount.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from sandboxd import canonical

if TYPE_CHECKING:
    from sandboxd.policy.seccomp import Rule

__all__ = ["Command", "ImageRef", "InputRef", "Limits", "Mount", "Plan", "Root", "Shape", "ToolProcess"]


@dataclass(frozen=True)
class Data:
    """The base of plan values: data with a canonical JSON form and a digest."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-compatible form of the value."""
        return asdict(self)

    @cached_property
    def digest(self) -> str:
        """``sha256:…`` of the canonical JSON."""
        return canonical.digest(self.to_json())


@dataclass(frozen=True)
class ImageRef:
    """An image by name and by what the name stood for."""

    name: str
    digest: str


@dataclass(frozen=True)
class Limits:
    """Durations in microseconds, sizes in bytes, CPUs in thousandths. None: the policy sets none."""

    wall: int
    cpu_time: int | None
    cpus: int
    memory: int
    pids: int
    open_files: int
    file_size: int | None
    workspace_size: int
    workspace_inodes: int
    tmp_size: int
    tmp_inodes: int
    stdout: int
    stderr: int
    on_output: Literal["truncate", "kill"]
    io_read: int | None
    """Bytes per second, from the device that holds images."""
    io_write: int | None


@dataclass(frozen=True)
class ToolProcess:
    """What the tool's process starts with. Ids are those inside the container."""

    uid: int
    gid: int
    user_namespace: Literal["slot", "engine", "none"]
    hostname: str
    umask: int


@dataclass(frozen=True)
class Root:
    """How the root file system is presented: read-only, or with an overlay that is thrown away."""

    mode: Literal["read-only", "overlay"]
    size: int
    inodes: int


@dataclass(frozen=True)
class Mount:
    """A host directory or file that the operator lends to the container, read-only."""

    source: str
    target: str


@dataclass(frozen=True)
class Shape(Data):
    """Everything that a container needs before its command is known."""

    policy: str
    policy_digest: str
    image: ImageRef
    limits: Limits
    process: ToolProcess
    root: Root
    mounts: tuple[Mount, ...]
    syscalls: tuple[Rule, ...]
    network: Literal["none"]


@dataclass(frozen=True)
class InputRef:
    """An input by path and digest; the bytes travel beside the plan."""

    path: str
    size: int
    digest: str
    mode: int


@dataclass(frozen=True)
class Command:
    """What the parked process executes. Argv and env values are ``{"text"}`` or ``{"base64"}``."""

    argv: tuple[dict[str, str], ...]
    env: dict[str, str]
    cwd: str
    stdin: Literal["none", "stream", "bytes"]


@dataclass(frozen=True)
class Plan(Data):
    """A shape, a command, and what the request narrows."""

    shape: Shape
    command: Command
    limits: Limits
    """The shape's limits, lowered by the request: written to the slot at hand-over."""
    inputs: tuple[InputRef, ...]
    tar: str | None
    """Digest of the tar, if any."""
    artifacts: tuple[tuple[str, int | None], ...]
    """Patterns that the policy releases, each with its largest file size."""
    narrowed_artifacts: tuple[str, ...] | None
