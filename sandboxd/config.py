"""The daemon's own configuration: one strict YAML file, or none at all.

Every key has a default. Errors name file, line, column and the nearest valid word, and all errors of
the file come at once, in one ``ConfigInvalid``. Durations are microseconds, sizes bytes, as
everywhere else; in the file they are texts with a unit.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    field_validator,
    model_validator,
)

from sandboxd import document, units
from sandboxd.errors import ConfigInvalid, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DEFAULT_PATH",
    "Budget",
    "CallbackProgram",
    "CallerRule",
    "Config",
    "DockerConfig",
    "HttpLimits",
    "IdRange",
    "JournalConfig",
    "Match",
    "PoolSize",
    "Pressure",
    "Retention",
    "SecretsConfig",
    "SessionShare",
    "SocketConfig",
    "default_socket",
    "load_config",
]

DEFAULT_PATH = Path("/etc/sandboxd/sandboxd.yaml")
RUNTIMES = ("auto", "builtin", "crun", "runc")
SYSTEM_SOCKET = Path("/run/sandboxd/sandboxd.sock")
MAX_ID = 2**32 - 2  # (uid_t)-1 means "no id", chown(2)
MAX_SOCKET_PATH = 107  # sun_path without its NUL, unix(7)
_GLOB = re.compile(r"[A-Z0-9_*?]{1,128}")
_PROGRAM = re.compile(r"[a-z0-9*?][a-z0-9_*?-]{0,63}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?")


def _size(value: object) -> object:
    if isinstance(value, str):
        return units.parse_size(value)
    raise ValueError("a size needs a unit, such as 512MiB")


def _duration(value: object) -> object:
    if isinstance(value, str):
        return units.parse_duration(value)
    raise ValueError("a duration needs a unit, such as 10s")


def _cpus(value: object) -> object:
    return units.parse_cpus(value) if isinstance(value, (int, float, str)) else value


def _count(value: object) -> object:
    return units.parse_count(value) if isinstance(value, str) else value


def _percent(value: object) -> object:
    share = re.fullmatch(r"([0-9]{1,3})\s?%", value) if isinstance(value, str) else None
    if share is None:
        raise ValueError('write a share such as "3%"')
    return int(share[1])


def _path(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("a path must be a text")  # noqa: TRY004  # pydantic collects ValueError only
    if not value.startswith("/") or "\0" in value or len(value) > 4095:
        raise ValueError(f"{value[:80]!r} is not an absolute path")
    return Path(value)


def _account(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is not the name of a user or group")
    return value


Size = Annotated[int, BeforeValidator(_size), Field(gt=0, le=units.MAX)]
Duration = Annotated[int, BeforeValidator(_duration), Field(gt=0, le=24 * 3600 * 10**6)]
YEARS = 3650 * 24 * 3600 * 10**6
LongDuration = Annotated[int, BeforeValidator(_duration), Field(ge=60 * 10**6, le=YEARS)]
Count = Annotated[int, BeforeValidator(_count), Field(strict=True, ge=0)]
AbsolutePath = Annotated[Path, BeforeValidator(_path)]
Account = Annotated[str, AfterValidator(_account)]
Id = Annotated[int, Field(strict=True, ge=0, le=MAX_ID)]


class Section(BaseModel):
    """The base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SocketConfig(Section):
    """Where the socket is bound. ``path`` None: see ``default_socket``. A missing group is left out."""

    path: AbsolutePath | None = None
    mode: int = 0o660
    group: Account = "sandboxd"

    @field_validator("path")
    @classmethod
    def _fits(cls, value: Path | None) -> Path | None:
        if value is not None and len(os.fsencode(value)) > MAX_SOCKET_PATH:
            raise ValueError(f"longer than the {MAX_SOCKET_PATH} bytes that a socket address holds")
        return value

    @field_validator("mode", mode="before")
    @classmethod
    def _octal(cls, value: object) -> object:
        if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
            raise ValueError('write the mode as octal digits, such as "0660"')
        if int(value, 8) & 0o002:
            raise ValueError("a socket that anybody may write to is refused")
        return int(value, 8)


class Budget(Section):
    """What all slots may hold together. ``memory`` is bytes, or a share of the host's memory."""

    memory: int | float = 0.75
    """An int is bytes; a float is a share of the host's memory, above 0 and at most 1."""
    slots: Annotated[Count, Field(ge=1, le=100_000)] = 64
    cpus: Annotated[int, BeforeValidator(_cpus), Field(ge=10)] | None = None
    """Thousandths of a CPU, by the calls' limits; None: CPUs are shared out, however many calls run."""
    inputs: Annotated[Size, Field(ge=2**20)] = 2**30
    """Bytes of bodies that are being read, and again of the inputs, tars and stdin of calls that have not
    ended: the daemon holds both in memory."""

    @field_validator("memory", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        if not isinstance(value, str):
            raise ValueError('write a share such as "75%" or a size such as 16GiB')  # noqa: TRY004  # as above
        share = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s?%", value)
        if share is None:
            size = units.parse_size(value)
            if size < 2**20:
                raise ValueError("less than 1MiB holds no slot")
            return size
        if not 0 < float(share[1]) <= 100:
            raise ValueError(f"{value} is not a share above 0% and up to 100%")
        return float(share[1]) / 100

    def bytes_of(self, total: int) -> int:
        """The budget in bytes on a host with ``total`` bytes of memory."""
        return int(total * self.memory) if isinstance(self.memory, float) else min(self.memory, total)


class Pressure(Section):
    """When the host has no room for more: nothing starts beside what runs. One call runs in any case."""

    available: Annotated[int, BeforeValidator(_percent), Field(ge=0, le=100)] = 3
    """Percent of the host's memory; less than that is pressure."""
    stalled: Annotated[int, BeforeValidator(_percent), Field(ge=1, le=100)] = 60
    """Percent of the last ten seconds in which some task waited for memory (PSI); more is pressure."""


class PoolSize(Section):
    """How many slots wait for a call, per shape, and for how long."""

    min: Annotated[Count, Field(le=10_000)] = 2
    max: Annotated[Count, Field(le=10_000)] = 16
    age: Duration = 600 * 10**6
    """A slot that has waited for so long is taken away, and so are those of a shape unused for so long."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class Match(Section):
    """Who a rule of ``callers`` speaks of; each key that is given must hold for the peer.

    Names are looked up when a peer connects, so a group made later works without a restart.
    """

    uid: Id | None = None
    gid: Id | None = None
    user: Account | None = None
    group: Account | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give at least one of uid, gid, user and group")
        return self


class SessionShare(Section):
    """What the sessions of one caller may be together."""

    count: Annotated[Count, Field(le=1_000_000)] = 100
    size: Size = 4 * 2**30
    """Bytes on disk that all their checkpoints hold."""
    inodes: Annotated[Count, Field(le=1_000_000_000)] = 1_000_000
    """Entries that all their checkpoints have."""
    containers: Annotated[Count, Field(le=10_000)] = 4
    """Containers that they keep at once (``isolation: session``)."""
    container_idle: Duration = 30 * 60 * 10**6
    """After so long without a call one of them is ended."""
    container_life: Annotated[int, BeforeValidator(_duration), Field(gt=0, le=YEARS)] = 24 * 3600 * 10**6
    """So long after it was made one of them is ended, as soon as no call runs in it."""


class CallerRule(Section):
    """Which role, which policies and which share the peers that match have."""

    match: Match
    role: Literal["operator", "agent"]
    policies: Annotated[tuple[str, ...], Field(max_length=1000)] = ("*",)
    concurrent: Annotated[Count, Field(ge=1, le=100_000)] | None = None
    """Calls that run at once; None: only the budget bounds them."""
    weight: Annotated[Count, Field(ge=1, le=1000)] = 1
    queued: Annotated[Count, Field(ge=1, le=1_000_000)] | None = None
    """Calls that wait; None: only the queue bounds them."""
    secrets: Annotated[tuple[str, ...], Field(max_length=1000)] | None = None
    """Names and globs of the secrets that a policy may give to calls of these; None: an operator's may have
    all, an agent's none."""
    sessions: SessionShare = SessionShare()
    """Of each caller that matches."""

    callback: Annotated[bool, Field(strict=True)] = False
    """Whether the daemon starts a process of theirs to tell a socket of theirs that a call has ended."""
    callbacks: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    """Names and globs of the programs of ``Config.callbacks`` that may be told of the ends of their calls."""

    @property
    def granted(self) -> tuple[str, ...]:
        """The same without a default."""
        if self.secrets is None:
            return ("*",) if self.role == "operator" else ()
        return self.secrets

    @field_validator("secrets", mode="after")
    @classmethod
    def _globs(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if not _GLOB.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is not a secret's name or a glob of one, such as GITHUB_*")
        return value

    @field_validator("callbacks", mode="after")
    @classmethod
    def _programs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _PROGRAM.fullmatch(name):
                raise ValueError(
                    f"{name[:80]!r} is not the name of a program of `callbacks`, or a glob of one"
                )
        return value

    @field_validator("policies", mode="after")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name or len(name) > 128:
                raise ValueError('a policy is "*" or a name of 1 to 128 characters')
        return value


class HttpLimits(Section):
    """Bounds on what a peer may send, and for how long it may take."""

    headers: Annotated[Size, Field(ge=1024, le=2**20)] = 32 * 2**10
    body: Annotated[Size, Field(ge=1024, le=2**31)] = 64 * 2**20
    header_timeout: Duration = 10 * 10**6
    """From the first byte of a request, or from connecting, to the end of its header."""
    body_timeout: Duration = 60 * 10**6
    """The longest pause between two pieces of a body."""
    body_time: Duration = 300 * 10**6
    """For the whole of a body that is read before anything is done: all but a stream of stdin."""
    spool: Annotated[Size, Field(ge=2**20, le=2**50)] = 8 * 2**30
    """Bytes on disk of all bodies of files and layers for sessions, until they are in their sessions."""
    keep_alive: Duration = 60 * 10**6
    """The longest pause between two requests of a connection."""
    connections: Annotated[Count, Field(ge=1, le=65_536)] = 512
    connections_per_uid: Annotated[Count, Field(ge=1, le=65_536)] = 256


class IdRange(Section):
    """The host uids and gids that slots take their ranges of 65,536 from: ``count`` ranges at ``base``."""

    base: Annotated[Id, Field(ge=65_536)] = 1_879_048_192
    count: Annotated[Count, Field(ge=1, le=32_768)] = 4096

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.base + self.count * 65_536 - 1 > MAX_ID:
            raise ValueError(f"{self.count} ranges of 65536 ids from {self.base} pass the last id, {MAX_ID}")
        return self


class DockerConfig(Section):
    """The Docker Engine of ``engine: docker``: its socket on this host, and one of its runtimes."""

    socket: Path = Path("/run/docker.sock")
    runtime: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")] | None = None
    """A runtime that the engine knows by this name, such as ``runsc``; without it, the engine's default."""

    timeout: Duration = 20 * 10**6
    """The longest that the engine may let a request wait."""

    @field_validator("socket", mode="before")
    @classmethod
    def _local(cls, value: object) -> object:
        if isinstance(value, str) and "://" in value and not value.startswith("unix://"):
            raise ValueError(
                f"{value[:80]!r} is a remote engine; sandboxd reads what is in force in a container from the "
                "kernel it runs on, so give the path of a Unix socket on this host"
            )
        return _path(value.removeprefix("unix://") if isinstance(value, str) else value)


class NetworkConfig(Section):
    """The processes that serve the connections of containers, and whom they ask for names."""

    host: Annotated[bool, Field(strict=True)] = False
    """Whether a policy may say ``network: {mode: host}``, which takes the network's boundary away."""
    nameservers: Annotated[tuple[IPvAnyAddress, ...], Field(max_length=8)] = ()
    """Without any, those of the host's /etc/resolv.conf when a process starts."""
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 53
    """Of the name servers."""
    authorities: Annotated[tuple[AbsolutePath, ...], Field(max_length=64)] = ()
    """Files of certificates (PEM) of who is believed beside the host's own, where rules look into HTTP."""
    uid: Annotated[Id, Field(ge=1)] = 1_878_982_656
    """The first of ``count`` host ids, user and group alike: each process has one that nobody else has."""
    count: Annotated[Count, Field(ge=1, le=65_536)] = 4096
    memory: Annotated[Size, Field(ge=64 * 2**20)] = 256 * 2**20
    """What each of them may hold."""
    cpus: Annotated[int, BeforeValidator(_cpus), Field(ge=10)] = 1000
    """Thousandths of a CPU that each may use."""


class SecretsConfig(Section):
    """The store of secrets."""

    key: AbsolutePath | None = None
    """A file, 0600, of 32 bytes or 64 hexadecimal digits. Without it: systemd's credential
    ``sandboxd-secrets-key``, else a file in the state directory that the daemon makes."""


class JournalConfig(Section):
    """The records of all calls."""

    key: AbsolutePath | None = None
    """A file, 0600, of an Ed25519 key in PEM, which heads are signed with. Without it: systemd's credential
    ``sandboxd-journal-key``, else a file in the state directory that the daemon makes."""


class Retention(Section):
    """How long bodies, output and artifacts are kept. Records and digests stay. Without keys: for ever."""

    age: LongDuration | None = None
    """Of a call, from its end."""
    size: Annotated[Size, Field(ge=2**20)] | None = None
    """Of bodies, output and artifacts together; the oldest calls go first."""


def _argument(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


class CallbackProgram(Section):
    """A program of the operator's that is told of the ends of calls which name it."""

    argv: Annotated[
        tuple[Annotated[str, Field(max_length=4096), AfterValidator(_argument)], ...],
        Field(min_length=1, max_length=64),
    ]
    """The command; no caller adds to it."""
    user: Account
    """Who it runs as, by name; never one of uid 0."""
    group: Account | None = None
    """Its one group; None: the user's own."""
    timeout: Annotated[Duration, Field(le=600 * 10**6)] = 30 * 10**6
    """It, and all that it started, is killed after that."""
    memory: Annotated[Size, Field(ge=4 * 2**20)] = 128 * 2**20
    pids: Annotated[Count, Field(ge=1, le=4096)] = 32
    cpus: Annotated[int, BeforeValidator(_cpus), Field(ge=10)] = 1000
    """Thousandths of a CPU that it may use."""

    @field_validator("argv", mode="after")
    @classmethod
    def _program(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _path(value[0])
        return value

    @field_validator("user", mode="after")
    @classmethod
    def _unprivileged(cls, value: str) -> str:
        if value == "root":
            raise ValueError("a program of `callbacks` does not run as root; give it a user of its own")
        return value


def _default_callers() -> tuple[CallerRule, ...]:
    return (
        CallerRule(match=Match(uid=0), role="operator"),
        CallerRule(
            match=Match(group="sandboxd"),
            role="agent",
            policies=("default", "strict", "python", "shell", "build"),
        ),
    )


class Config(Section):
    """The whole configuration, frozen."""

    engine: Literal["auto", "oci", "docker"] = "auto"
    runtime: Annotated[str, Field(min_length=1, max_length=4095)] = "auto"
    """``auto``, ``builtin``, ``crun``, ``runc``, or the absolute path of another OCI runtime."""
    docker: DockerConfig = DockerConfig()
    state: AbsolutePath = Path("/var/lib/sandboxd")
    socket: SocketConfig = SocketConfig()
    policies: Annotated[tuple[AbsolutePath, ...], Field(max_length=64)] = (Path("/etc/sandboxd/policies"),)
    """Directories beside the shipped one; a later policy of the same name wins."""
    floor: AbsolutePath | None = None
    """A floor beside the ``floor.yaml`` of each policy directory; one that is named must exist."""
    budget: Budget = Budget()
    pool: PoolSize = PoolSize()
    callers: Annotated[tuple[CallerRule, ...], Field(max_length=1000)] = Field(
        default_factory=_default_callers
    )
    http: HttpLimits = HttpLimits()
    queue: Annotated[Count, Field(ge=1, le=1_000_000)] = 1000
    """Calls that may wait."""
    ids: IdRange = IdRange()
    network: NetworkConfig = NetworkConfig()
    secrets: SecretsConfig = SecretsConfig()
    journal: JournalConfig = JournalConfig()
    pressure: Pressure = Pressure()
    retention: Retention = Retention()
    callbacks: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")], CallbackProgram],
        Field(max_length=100),
    ] = Field(default_factory=dict)
    """Programs that calls may have started at their end, by name."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        slots = range(self.ids.base, self.ids.base + self.ids.count * 65_536)
        if self.network.uid in slots or self.network.uid + self.network.count - 1 in slots:
            raise ValueError("network.uid: these ids are among those of ids.base; give it ids of its own")
        return self

    @field_validator("callers")
    @classmethod
    def _somebody(cls, value: tuple[CallerRule, ...]) -> tuple[CallerRule, ...]:
        if not value:  # after the items, lest a wrong item be reported as none
            raise ValueError("at least one rule is needed, or nobody gets in")
        return value

    @field_validator("runtime")
    @classmethod
    def _known_runtime(cls, value: str) -> str:
        if value in RUNTIMES or value.startswith("/"):
            return value
        meant = document.nearest(value, RUNTIMES)
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ValueError(f"{value[:80]!r} is not {', '.join(RUNTIMES)} or an absolute path{hint}")


def load_config(path: Path | None = None, *, default: Path = DEFAULT_PATH) -> Config:
    """The configuration of a file, or all defaults where the default file does not exist.

    Raises ConfigInvalid: a line ``file:line:column: message`` for each error, and the same as dicts in
    ``details["problems"]``. A file that was named and cannot be read is an error too.
    """
    file = default if path is None else path
    try:
        found = document.load(document.read_text(file), str(file))
    except FileNotFoundError as error:
        if path is None:
            return Config()
        raise _unreadable(file, error.strerror) from None
    except OSError as error:
        raise _unreadable(file, error.strerror) from None
    except InvalidRequest as error:
        raise _unreadable(file, str(error)) from None
    config = document.validate(found, Config)
    if config is None or found.problems:
        problems = sorted(found.problems, key=lambda problem: (problem.line, problem.column))
        raise ConfigInvalid("\n".join(map(str, problems)), problems=[asdict(problem) for problem in problems])
    return config


def _unreadable(file: Path, reason: str | None) -> ConfigInvalid:
    found = document.Document(str(file))
    problem = found.problem((), "unreadable", f"cannot be read: {reason}")
    return ConfigInvalid(str(problem), problems=[asdict(problem)])


def default_socket(environ: Mapping[str, str] | None = None) -> Path:
    """The socket that daemon and clients meet on where nobody names one.

    ``SANDBOXD_SOCKET``; else the system's, if it exists or we are root; else the one in
    ``XDG_RUNTIME_DIR``; else the system's.
    """
    environ = os.environ if environ is None else environ
    named, runtime = environ.get("SANDBOXD_SOCKET"), environ.get("XDG_RUNTIME_DIR")
    if named:
        return Path(named)
    if runtime and os.geteuid() != 0 and not SYSTEM_SOCKET.exists():
        return Path(runtime) / "sandboxd" / "sandboxd.sock"
    return SYSTEM_SOCKET
