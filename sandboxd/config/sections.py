"""The sections of the configuration file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, IPvAnyAddress, field_validator, model_validator

from sandboxd import units
from sandboxd.config.values import (
    MAX_ID,
    AbsolutePath,
    Account,
    Count,
    Cpus,
    Duration,
    Id,
    LongDuration,
    Percent,
    Section,
    Size,
    absolute_path,
)

__all__ = [
    "MAX_SOCKET_PATH",
    "Budget",
    "DockerConfig",
    "HttpLimits",
    "IdRange",
    "JournalConfig",
    "NetworkConfig",
    "PoolSize",
    "Pressure",
    "Retention",
    "SecretsConfig",
    "SocketConfig",
]

MAX_SOCKET_PATH = 107  # sun_path without its NUL, unix(7)


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
    cpus: Cpus | None = None
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

    available: Annotated[Percent, Field(ge=0, le=100)] = 3
    """Percent of the host's memory; less than that is pressure."""
    stalled: Annotated[Percent, Field(ge=1, le=100)] = 60
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
        return absolute_path(value.removeprefix("unix://") if isinstance(value, str) else value)


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
    cpus: Cpus = 1000
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
