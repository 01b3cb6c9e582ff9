"""Pure: a policy and an image make a ``Shape``; a shape and a request make a ``Plan``.

A shape holds exact values for everything that a container needs before its command is known, and
nothing else; it is the key of a pool of waiting containers. A plan adds the command and what the
request narrows, and says all that is needed to run the call again, here or elsewhere: no path of
this host but those an operator wrote as a mount.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from sandboxd import canonical, units
from sandboxd.errors import InvalidRequest, RequestTooWide, TooLarge
from sandboxd.models import Bytes
from sandboxd.policy import paths, seccomp
from sandboxd.policy.environment import environment
from sandboxd.policy.explain import on_output
from sandboxd.policy.quantities import MIN_MEMORY
from sandboxd.policy.rules import network_rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.models import Input, Narrowing, Request
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
    "make_plan",
    "make_shape",
]

MAX_COMMAND = 6 * 2**20
"""Bytes of argv and env. No kernel takes more (_STK_LIM / 4 * 3, fs/exec.c); what a kernel takes of
less is its own to say, as E2BIG. Every record of a call repeats its argv."""

MAX_PATTERNS = 8192
"""Characters of all artifact patterns of a request."""


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


def make_plan(policy: Policy, shape: Shape, request: Request) -> Plan:
    """The plan of a request under its policy's shape.

    Raises RequestTooWide if the request asks for more than the policy allows, InvalidRequest for a
    path, pattern, variable or limit that is malformed.
    """
    for name in shape.granted("env"):
        if name in request.env:
            raise InvalidRequest(
                f"env: {name} is a secret that the policy puts there; leave it out", field=f"env.{name}"
            )
    if shape.kept:
        for name in ("memory", "cpus", "pids"):
            if getattr(request.limits, name) is not None:
                raise InvalidRequest(
                    f"limits.{name} is the container's, which the calls of a session share; leave it out",
                    field=f"limits.{name}",
                )
    inputs = _inputs(request.inputs, shape.limits)
    return Plan(
        shape=shape,
        command=_command(policy, request),
        limits=_narrow(shape.limits, request.limits),
        inputs=inputs,
        tar=None if request.tar is None else canonical.digest_bytes(request.tar.decode()),
        artifacts=tuple(artifact.release() for artifact in policy.artifacts),
        narrowed_artifacts=_patterns(request.artifacts),
        commit=None if request.session is None else policy.commit,
    )


def _narrow(limits: Limits, asked: Narrowing) -> Limits:
    cpus = None
    if asked.cpus is not None:
        try:
            cpus = units.parse_cpus(asked.cpus)
        except ValueError as error:
            raise InvalidRequest(f"limits.cpus: {error}", field="limits.cpus") from None
    if asked.memory is not None and asked.memory < MIN_MEMORY:
        least = units.format_size(MIN_MEMORY)
        raise InvalidRequest(f"limits.memory: no tool starts with less than {least}", field="limits.memory")
    wanted: list[tuple[str, int | None, int | None, Callable[[int], str]]] = [
        ("wall", asked.wall, limits.wall, units.format_duration),
        ("cpu_time", asked.cpu_time, limits.cpu_time, units.format_duration),
        ("cpus", cpus, limits.cpus, units.format_cpus),
        ("memory", asked.memory, limits.memory, units.format_size),
        ("pids", asked.pids, limits.pids, units.format_count),
        ("stdout", asked.stdout, limits.stdout, units.format_size),
        ("stderr", asked.stderr, limits.stderr, units.format_size),
    ]
    lower: dict[str, Any] = {}
    wider: list[dict[str, Any]] = []
    said: list[str] = []
    for name, value, most, show in wanted:
        if value is None:
            continue
        lower[name] = value
        if most is not None and value > most:
            wider.append({"limit": name, "asked": value, "allowed": most})
            said.append(f"limits.{name} {show(value)} is more than the policy's {show(most)}")
    if wider:
        raise RequestTooWide("; ".join(said), **wider[0], wider=wider)
    return replace(limits, **lower) if lower else limits


def _command(policy: Policy, request: Request) -> Command:
    def text(value: str, name: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{name} is no text that UTF-8 can hold; use base64", field=name) from None
        return value

    argv: list[dict[str, str]] = []
    argv_size = 0
    for number, arg in enumerate(request.argv):
        data = arg.decode() if isinstance(arg, Bytes) else text(arg, f"argv.{number}").encode()
        if b"\0" in data:
            raise InvalidRequest(f"argv.{number} contains a NUL byte", field=f"argv.{number}")
        argv_size += len(data) + 1
        argv.append(Bytes.of(data).model_dump(exclude_none=True))
    if argv[0] == {"text": ""}:
        raise InvalidRequest("argv.0 is empty; it names the program to run", field="argv.0")
    env = environment(policy.spec)
    for name, value in request.env.items():
        if "=" in name or "\0" in name:
            raise InvalidRequest(f"env: {name!r} is not the name of a variable", field="env")
        env[text(name, "env")] = text(value, f"env.{name}")
    _bound_command(argv_size, env)
    try:
        cwd = paths.absolute(request.cwd)
    except ValueError as error:
        raise InvalidRequest(f"cwd: {error}", field="cwd") from None
    if isinstance(request.stdin, str):
        return Command(argv=tuple(argv), env=env, cwd=cwd, stdin=request.stdin)
    digest = canonical.digest_bytes(request.stdin.decode())
    return Command(argv=tuple(argv), env=env, cwd=cwd, stdin="bytes", stdin_digest=digest)


def _bound_command(argv_size: int, env: dict[str, str]) -> None:
    size = argv_size + sum(len(name.encode()) + len(value.encode()) + 2 for name, value in env.items())
    if size > MAX_COMMAND:
        most = units.format_size(MAX_COMMAND)
        raise TooLarge(f"argv and env together have {size} bytes, more than {most}", limit=MAX_COMMAND)


_Tree = dict[str, "_Tree | None"]
"""Names of files (None) and directories."""


def _inputs(inputs: list[Input], limits: Limits) -> tuple[InputRef, ...]:
    found: list[InputRef] = []
    tree: _Tree = {}
    made = 0
    for number, item in enumerate(inputs):
        field = f"inputs.{number}.path"
        try:
            path = paths.relative(item.path)
        except ValueError as error:
            raise InvalidRequest(f"{field}: {error}", field=field) from None
        made += _plant(tree, path, field)
        # counted on the way: thousands of deep paths are millions of directories
        _fit("workspace.inodes", made, limits.workspace_inodes, units.format_count)
        data = item.content.decode()
        found.append(InputRef(path, len(data), canonical.digest_bytes(data), item.mode))
    _fit("workspace.size", sum(item.size for item in found), limits.workspace_size, units.format_size)
    return tuple(found)


def _plant(tree: _Tree, path: str, field: str) -> int:
    """Put a file into the tree of all inputs; returns how many files and directories that makes."""
    *above, name = path.split("/")
    made = 1
    for part in above:
        if part not in tree:
            tree[part] = {}
            made += 1
        beneath = tree[part]
        if beneath is None:
            raise InvalidRequest(f"{field}: {path!r} passes through another input", field=field)
        tree = beneath
    if name in tree:
        what = "given twice" if tree[name] is None else "a file and a directory"
        raise InvalidRequest(f"{field}: {path!r} is {what}", field=field)
    tree[name] = None
    return made


def _fit(limit: str, asked: int, allowed: int, show: Callable[[int], str]) -> None:
    if asked > allowed:
        raise RequestTooWide(
            f"the inputs need {show(asked)} of limits.{limit}, which is {show(allowed)}",
            limit=limit,
            asked=asked,
            allowed=allowed,
        )


def _patterns(patterns: list[str] | None) -> tuple[str, ...] | None:
    if sum(map(len, patterns or ())) > MAX_PATTERNS:  # compiling them takes the event loop's time
        said = f"artifacts: more than {MAX_PATTERNS} characters in all"
        raise TooLarge(said, field="artifacts", limit=MAX_PATTERNS)
    for number, pattern in enumerate(patterns or ()):
        try:
            paths.artifact_pattern(pattern)
        except ValueError as error:
            raise InvalidRequest(f"artifacts.{number}: {error}", field=f"artifacts.{number}") from None
    return None if patterns is None else tuple(patterns)
