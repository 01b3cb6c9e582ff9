"""What may stand in a policy file: every key, its type, its default, and what it means.

The models are read in three ways: the loader validates files with them, ``jsonschema`` makes the
editors' schema of them (the docstring below a field is what an editor shows), and a resolved policy
is one value of ``PolicyFile``. In memory durations are microseconds, sizes bytes, CPUs thousandths.
What a later release enforces is parsed here in full as well; ``checks`` says what is not enforced yet.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from sandboxd.policy import paths
from sandboxd.policy.network import Network  # noqa: TC001, pydantic reads it at run time
from sandboxd.policy.quantities import Count, Cpus, Duration, Memory, Rate, Size, SizeText, between
from sandboxd.policy.retry import Retry
from sandboxd.policy.section import Section

__all__ = [
    "Artifact",
    "Examples",
    "Filesystem",
    "FloorFile",
    "Limits",
    "Mount",
    "PolicyFile",
    "Process",
    "Stream",
]

POLICY_NAME = r"[a-z0-9][a-z0-9_.-]{0,63}"
IMAGE_NAME = r"[A-Za-z0-9][A-Za-z0-9_./:@-]{0,254}"


def _matches(pattern: str, what: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return AfterValidator(check)


Name = Annotated[str, _matches(POLICY_NAME, "a policy's name (lower case letters, digits, '-', '_', '.')")]
Id = Annotated[int, Field(ge=0, le=65534)]
EnvName = Annotated[str, _matches(r"[A-Za-z_][A-Za-z0-9_]{0,254}", "the name of an environment variable")]


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


Text = Annotated[str, AfterValidator(_no_nul), Field(max_length=131_071)]


def _umask(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"(0o)?0?[0-7]{3}", value):
        return int(value.removeprefix("0o"), 8)
    raise ValueError("write the umask as an octal text such as '0022'")


_UmaskText = Annotated[str, Field(pattern="^0?[0-7]{3}$")]
Umask = Annotated[int, BeforeValidator(_umask, json_schema_input_type=_UmaskText)]


class Tmpfs(Section):
    """The size of a file system in memory; its pages count against ``limits.memory``."""

    size: Size
    """Bytes, such as 256MiB. The kernel refuses more with ENOSPC."""
    inodes: Count
    """Files and directories, such as 20k. The kernel refuses more with ENOSPC."""


class Workspace(Tmpfs):
    """``/workspace``: where the call's inputs are and where it works."""

    size: Size = 256 * 2**20
    inodes: Count = 20_000


class Tmp(Tmpfs):
    """``/tmp``: thrown away after the call."""

    size: Size = 64 * 2**20
    inodes: Count = 10_000


class Stream(Section):
    """How much of an output stream is kept, and what happens at the end of it."""

    size: Size = 2**20
    """Bytes kept; what comes after is counted and dropped, and the result says so."""
    on_limit: Literal["truncate", "kill"] | None = None
    """At the size: cut what follows (truncate, the default) or end the call (kill). Both streams alike."""


def _stream(value: object) -> object:
    return value if isinstance(value, dict) else {"size": value}


Output = Annotated[Stream, BeforeValidator(_stream, json_schema_input_type=SizeText | Stream)]


class Io(Section):
    """Bytes per second from and to the device that holds the images."""

    read: Rate | None = None
    """Bytes read per second, such as 50MiB; without it, no limit."""
    write: Rate | None = None
    """Bytes written per second, such as 50MiB; without it, no limit."""


class Limits(Section):
    """What a call may use. A request can lower these, never raise them."""

    wall: Duration = 60_000_000
    """Time from hand-over of the command to its end."""
    cpu_time: Duration | None = None
    """CPU time of all processes of the call together; without it, no limit but wall times cpus."""
    cpus: Cpus = 1000
    """How many CPUs the call may keep busy, such as 0.5."""
    memory: Memory = 512 * 2**20
    """Memory of all processes, with swap, and the pages of workspace, tmp and overlay."""
    pids: Count = 64
    """Processes and threads at the same time."""
    open_files: Annotated[Count, between(16, 2**20, str)] = 1024
    """Open descriptors of each process (RLIMIT_NOFILE)."""
    file_size: Size | None = None
    """The largest file that a process can write (RLIMIT_FSIZE); without it, no limit."""
    workspace: Workspace = Workspace()
    """The size of /workspace."""
    tmp: Tmp = Tmp()
    """The size of /tmp."""
    stdout: Output = Stream()
    """How much of standard output is kept."""
    stderr: Output = Stream()
    """How much of standard error is kept."""
    io: Io = Io()
    """Rates of disk input and output."""


HostName = Annotated[str, _matches(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?", "a host name")]


class Process(Section):
    """What the tool's process starts with."""

    user: Id = 1000
    """The user id inside the container; root inside (0) is nobody outside."""
    group: Id | None = None
    """The group id inside the container; without it, the same number as user."""
    user_namespace: Literal["slot", "engine", "none"] = "slot"
    """slot: ids of its own for every container; engine: the engine's remap; none: the host's ids."""
    env: Annotated[dict[EnvName, Text], Field(max_length=1024)] = Field(default_factory=dict)
    """Environment variables; a request may add to these and set them anew."""
    umask: Umask = 0o022
    """The umask, as an octal text such as '0022'."""
    hostname: HostName = "sandbox"
    """What the tool sees as the name of its host."""


class Filesystem(Section):
    """How the image is presented."""

    root: Literal["read-only", "overlay"] = "read-only"
    """read-only, or an overlay in memory that takes writes and is thrown away."""
    size: Size = 256 * 2**20
    """The size of the overlay; only with root: overlay."""
    inodes: Count = 50_000
    """Files and directories that the overlay can take; only with root: overlay."""


HostPath = Annotated[str, AfterValidator(paths.mount_source)]


class Mount(Section):
    """A directory or file of the host that the operator lends to the container."""

    source: HostPath
    """An absolute path of the host."""
    target: Annotated[str, AfterValidator(paths.mount_target)]
    """An absolute path inside the container."""
    mode: Literal["read-only", "read-write"] = "read-only"
    """read-write is not enforced by this release and refused."""


class Syscalls(Section):
    """The seccomp filter, an allow-list; deny wins over allow."""

    base: Literal["strict", "default", "build"] = "default"
    """Where the list starts: each base is a list of named groups."""
    allow: Annotated[tuple[str, ...], Field(max_length=1024)] = ()
    """System calls and @groups beside the base."""
    deny: Annotated[tuple[str, ...], Field(max_length=1024)] = ()
    """System calls and @groups that are taken away."""


class Secret(Section):
    """A secret of the daemon's store that a call may use."""

    name: Annotated[str, _matches(r"[A-Z][A-Z0-9_]{0,127}", "a secret's name, such as GITHUB_TOKEN")]
    """The name in the store."""
    as_: Annotated[Literal["env", "file", "proxy"], Field(alias="as")]
    """env and file enter the container; proxy never does: it is put into requests on their way out."""
    placeholder: Annotated[Text, Field(min_length=1, max_length=4096)] | None = None
    """With proxy: the value of a variable of that name, for programs that insist on having a key."""


MediaType = Annotated[str, Field(pattern=r"^[a-z]{1,32}/([a-z0-9][a-z0-9.+-]{0,126}|\*)$")]


class Artifact(Section):
    """Files that are released from the workspace when the call has ended."""

    path: Annotated[str, AfterValidator(paths.artifact_pattern)]
    """A glob relative to the workspace; ** stands for any number of directories."""
    max_size: Size | None = None
    """A larger file is withheld, and the result says so."""
    type: Annotated[tuple[MediaType, ...], Field(max_length=64)] = ()
    """Media types by content, such as image/png or image/*; a file of another type is withheld."""
    count: Annotated[Count, Field(le=1000)] | None = None
    """More files than these are withheld."""
    secrets: Literal["allow", "deny"] = "allow"
    """deny: a file with a secret of the call, or with what looks like a well-known token, is withheld."""

    def release(self) -> tuple[object, ...]:
        """The rule as plans have it: a pattern and a size, and the rest where that is asked."""
        if not (self.type or self.count or self.secrets == "deny"):
            return (self.path, self.max_size)
        return (self.path, self.max_size, self.type, self.count, self.secrets)


Program = Annotated[str, _matches(r"/?[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*", "the name of a program")]
_MODULE = r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*"
Module = Annotated[str, _matches(_MODULE, "the name of a module"), Field(max_length=256)]


class Warm(Section):
    """An interpreter that the waiting container has started already."""

    command: Annotated[Program, Field(max_length=4096)]
    """CPython as calls name it, such as python3; calls that name another program are not faster."""
    preload: Annotated[tuple[Module, ...], Field(max_length=64)] = ()
    """Modules that it has imported already."""


class Examples(Section):
    """What must and what must not be possible, judged by the compiled rules whenever the file is loaded.

    Each is ``syscall NAME [ARG…]``, ``read PATH``, ``write PATH``, ``connect HOST:PORT`` or
    ``request METHOD URL``. They speak of this file's policy and are not inherited.
    """

    allows: Annotated[tuple[str, ...], Field(max_length=256)] = ()
    denies: Annotated[tuple[str, ...], Field(max_length=256)] = ()


def _none(value: object) -> object:
    return None if value == "none" else value


class PolicyFile(Section):
    """A policy of sandboxd: what a call may do. What it does not name is not available."""

    version: Literal[1]
    """The version of this format."""
    name: Name
    """The policy's name, which is also the name of its file."""
    description: Annotated[str, Field(max_length=4096)] = ""
    """For people."""
    extends: Name | None = None
    """One parent: its lists are added to (!remove X drops an inherited item), its scalars replaced."""
    image: Annotated[str, _matches(IMAGE_NAME, "an image's name")] = "base"
    """The root file system: an image of the store, or host for this host's own programs."""
    limits: Limits = Limits()
    process: Process = Process()
    filesystem: Filesystem = Filesystem()
    mounts: Annotated[tuple[Mount, ...], Field(max_length=64)] = ()
    """Host paths that the call sees."""
    syscalls: Syscalls = Syscalls()
    network: Network | None = None
    """Without this key there is no network at all."""
    secrets: Annotated[tuple[Secret, ...], Field(max_length=64)] = ()
    artifacts: Annotated[tuple[Artifact, ...], Field(max_length=64)] = ()
    """Which files of the workspace are released; without it, none."""
    commit: Literal["exited", "success", "always", "never"] = "exited"
    """When a session keeps the files of a call."""
    retry: Annotated[
        Retry | None, BeforeValidator(_none, json_schema_input_type=Literal["none"] | Retry)
    ] = None  # fmt: skip
    """none, or which causes are tried again."""
    isolation: Literal["call", "session"] = "call"
    """A container for every call, or one for all calls of a session."""
    warm: Warm | None = None
    """An interpreter that waits for the command, started and with its modules imported."""
    expose: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], Field(max_length=64)] = ()
    """Ports inside the container that the caller can reach."""
    examples: Examples = Examples()

    def resolved(self) -> dict[str, Any]:
        """The JSON form of all that is in force: no description, examples or parent."""
        return self.model_dump(mode="json", by_alias=True, exclude={"description", "examples", "extends"})


class FloorSyscalls(Section):
    """What no policy may allow."""

    deny: Annotated[tuple[str, ...], Field(max_length=1024)] = ()
    """System calls and @groups that are denied in every policy."""


class FloorFilesystem(Section):
    """How freely a policy may present its image."""

    root: Literal["read-only", "overlay"] = "overlay"
    """read-only: no policy may have a writable root."""


class FloorProcess(Section):
    """How a policy's processes may run."""

    user_namespace: Literal["slot", "engine", "none"] = "none"
    """The weakest that a policy may choose, in the order slot, engine, none."""


class FloorArtifacts(Section):
    """What every rule for artifacts must ask of files."""

    secrets: Literal["allow", "deny"] = "allow"
    """deny: no policy may release a file without a look for secrets."""


SecretName = Annotated[str, _matches(r"[A-Z][A-Z0-9_]{0,127}", "a secret's name, such as GITHUB_TOKEN")]


class FloorSecrets(Section):
    """Which secrets policies may grant, and how."""

    names: Annotated[tuple[SecretName, ...], Field(max_length=1024)] | None = None
    """Those that may be granted at all; without this key, any."""
    as_: Annotated[tuple[Literal["env", "file", "proxy"], ...] | None, Field(alias="as")] = None
    """The ways in which a command may have one; without this key, any."""


class FloorFile(Section):
    """What no policy may exceed (floor.yaml). A section that is absent constrains nothing, save network."""

    version: Literal[1]
    """The version of this format."""
    description: Annotated[str, Field(max_length=4096)] = ""
    limits: Limits = Limits()
    """Maxima; only those that are written here count."""
    process: FloorProcess = FloorProcess()
    filesystem: FloorFilesystem = FloorFilesystem()
    mounts: Annotated[tuple[HostPath, ...], Field(max_length=64)] | None = None
    """Host paths beneath which policies may mount; without this key, any."""
    syscalls: FloorSyscalls = FloorSyscalls()
    network: Network | None = None
    """Without this key no policy may have a network."""
    artifacts: FloorArtifacts = FloorArtifacts()
    secrets: FloorSecrets = FloorSecrets()
    inject: Literal["none", "tls", "plain"] = "plain"
    """What rules may put into requests, in the order none, tls (nothing with plain: true), plain."""
    expose: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], Field(max_length=64)] | None = None
    """Ports that policies may expose to their callers; without this key, any."""
    commit: Literal["exited", "success", "always", "never"] = "always"
    """The most that a policy may have sessions keep, in the order never, success, exited, always."""
    isolation: Literal["call", "session"] = "session"
    """call: no policy may have sessions keep a container over their calls."""
