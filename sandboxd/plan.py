"""Pure: a policy and an image make a ``Shape``; a shape and a request make a ``Plan`` (``narrowing``).

A shape holds exact values for everything that a container needs before its command is known, and
nothing else; it is the key of a pool of waiting containers. A plan adds the command and what the
request narrows, and says all that is needed to run the call again, here or elsewhere: no path of
this host but those an operator wrote as a mount.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from sandboxd import canonical
from sandboxd.policy import seccomp
from sandboxd.policy.environment import environment
from sandboxd.policy.explain import on_output
from sandboxd.policy.rules import network_rules

if TYPE_CHECKING:
    from sandboxd.policy import Policy
    from sandboxd.policy.seccomp import Program, Rule
    from sandboxd.reach import NetworkRules

__all__ = [
    "Command",
    "Grant",
    "ImageRef",
    "InputRef",
    "Limits",
    "Mount",
    "Plan",
    "Root",
    "Shape",
    "ToolProcess",
    "Warm",
    "make_shape",
]


@dataclass(frozen=True)
class Data:
    """The base of plan values: data with a canonical JSON form and a digest."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-compatible form of the value."""
        return asdict(self)

    @cached_property
    def encoded(self) -> bytes:
        """The canonical JSON."""
        return canonical.canonical(self.to_json())

    @cached_property
    def digest(self) -> str:
        """``sha256:…`` of the canonical JSON."""
        return canonical.digest_bytes(self.encoded)


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
class Warm:
    """The interpreter that waits for the command, what it has imported, and what it was started with."""

    command: str
    preload: tuple[str, ...]
    env: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Grant:
    """A secret by its name, and how the command gets it. Its value is in no plan."""

    name: str
    kind: Literal["env", "file", "proxy"]


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
    network: NetworkRules | None
    """None: no network but a loopback."""
    warm: Warm | None = None
    secrets: tuple[Grant, ...] = ()
    host_network: bool = False
    """Whether its network is the host's own; ``network`` is None then too."""
    expose: tuple[int, ...] = ()
    """Ports of servers inside that the caller may reach."""
    kept: bool = False
    """Whether a container of it serves the calls of a session, one after the other."""

    def granted(self, kind: Literal["env", "file", "proxy"]) -> tuple[str, ...]:
        """The names of the secrets that are given in this way."""
        return tuple(grant.name for grant in self.secrets if grant.kind == kind)

    @cached_property
    def program(self) -> Program:
        """The filter of these rules for this machine; here, since to look it up by them takes long."""
        return seccomp.compile_filter(self.syscalls)


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
    stdin_digest: str | None = None
    """Of ``bytes``; what is streamed is not known before."""


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
    artifacts: tuple[tuple[Any, ...], ...]
    """Patterns that the policy releases, each with its largest file size and what else files must be: the
    fields of ``release.Rule``."""
    narrowed_artifacts: tuple[str, ...] | None
    commit: Literal["exited", "success", "always", "never"] | None = None
    """When its session keeps what it changed; None: it runs in none."""

    @property
    def holds(self) -> int:
        """Bytes of the host's memory that an attempt may hold: its limit, and what is put into its workspace.

        The kernel charges a page to whoever writes it first, and that is the daemon. How much a tar unpacks
        to is not known before.
        """
        put_in = sum(item.size for item in self.inputs)
        return self.limits.memory + (put_in if self.tar is None else self.limits.workspace_size)

    @cached_property
    def encoded(self) -> bytes:
        """The canonical JSON. The shape's is its own: it is nearly all of it, and serves many plans."""
        rest = {
            "command": vars(self.command),  # flat, so that ``asdict`` would only copy them
            "limits": vars(self.limits),
            "inputs": [vars(each) for each in self.inputs],
            "tar": self.tar,
            "artifacts": self.artifacts,
            "narrowed_artifacts": self.narrowed_artifacts,
            "commit": self.commit,
        }
        encoded = {name: canonical.canonical(value) for name, value in rest.items()}
        return canonical.joined({"shape": self.shape.encoded, **encoded})


@lru_cache(maxsize=1024)  # its digest takes longer than everything else that is done for a plan
def make_shape(policy: Policy, image: ImageRef) -> Shape:
    """The shape of a policy on an image: everything but the command, with no default left open."""
    spec = policy.spec
    limits, process, root = spec.limits, spec.process, spec.filesystem
    overlay = root.root == "overlay"
    warm = spec.warm
    env = tuple(environment(spec).items())
    return Shape(
        policy=policy.name,
        policy_digest=policy.digest,
        image=image,
        limits=Limits(
            wall=limits.wall,
            cpu_time=limits.cpu_time,
            cpus=limits.cpus,
            memory=limits.memory,
            pids=limits.pids,
            open_files=limits.open_files,
            file_size=limits.file_size,
            workspace_size=limits.workspace.size,
            workspace_inodes=limits.workspace.inodes,
            tmp_size=limits.tmp.size,
            tmp_inodes=limits.tmp.inodes,
            stdout=limits.stdout.size,
            stderr=limits.stderr.size,
            on_output=on_output(policy),
            io_read=limits.io.read,
            io_write=limits.io.write,
        ),
        process=ToolProcess(
            uid=process.user,
            gid=process.user if process.group is None else process.group,
            user_namespace=process.user_namespace,
            hostname=process.hostname,
            umask=process.umask,
        ),
        root=Root(root.root, root.size if overlay else 0, root.inodes if overlay else 0),
        mounts=tuple(Mount(mount.source, mount.target) for mount in spec.mounts),
        syscalls=policy.syscalls,
        network=network_rules(policy),
        warm=None if warm is None else Warm(warm.command, warm.preload, env),
        secrets=tuple(Grant(secret.name, secret.as_) for secret in spec.secrets),
        host_network=policy.shares_host_network,
        expose=spec.expose,
        kept=spec.isolation == "session",
    )
