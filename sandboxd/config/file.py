"""The daemon's own configuration: one strict YAML file, or none at all.

Every key has a default. Errors name file, line, column and the nearest valid word, and all errors of
the file come at once, in one ``ConfigInvalid``. Durations are microseconds, sizes bytes, as
everywhere else; in the file they are texts with a unit.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sandboxd import document
from sandboxd.config.callers import CallbackProgram, CallerRule, default_callers
from sandboxd.config.sections import (
    Budget,
    DockerConfig,
    HttpLimits,
    IdRange,
    JournalConfig,
    NetworkConfig,
    PoolSize,
    Pressure,
    Retention,
    SecretsConfig,
    SocketConfig,
)
from sandboxd.config.values import AbsolutePath, Count, Section
from sandboxd.errors import ConfigInvalid, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT_PATH", "SYSTEM_SOCKET", "Config", "default_socket", "load_config"]

DEFAULT_PATH = Path("/etc/sandboxd/sandboxd.yaml")
RUNTIMES = ("auto", "builtin", "crun", "runc")
AHEAD = 4
"""Ranges of ids beside those of ``budget.slots``: of what is made ahead for the next containers."""
SYSTEM_SOCKET = Path("/run/sandboxd/sandboxd.sock")


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
        default_factory=default_callers
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
    def _ids(self) -> Self:
        slots = range(self.ids.base, self.ids.base + self.ids.count * 65_536)
        if self.network.uid in slots or self.network.uid + self.network.count - 1 in slots:
            raise ValueError("network.uid: these ids are among those of ids.base; give it ids of its own")
        least = self.budget.slots + AHEAD
        if self.engine != "docker" and self.ids.count < least:
            raise ValueError(
                f"ids.count: {self.ids.count} ranges are too few for {self.budget.slots} containers at the "
                f"same time (budget.slots) and those that are made ahead; it has to be at least {least}"
            )
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
