"""Who may call, what they may have, and what is told of the ends of their calls."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from sandboxd.config.values import (
    YEARS,
    Account,
    Count,
    Cpus,
    Duration,
    Id,
    Section,
    Size,
    absolute_path,
    duration,
)

__all__ = ["CallbackProgram", "CallerRule", "Match", "SessionShare", "default_callers"]

_GLOB = re.compile(r"[A-Z0-9_*?]{1,128}")
_PROGRAM = re.compile(r"[a-z0-9*?][a-z0-9_*?-]{0,63}")


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
    container_life: Annotated[int, BeforeValidator(duration), Field(gt=0, le=YEARS)] = 24 * 3600 * 10**6
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
    cpus: Cpus = 1000
    """Thousandths of a CPU that it may use."""

    @field_validator("argv", mode="after")
    @classmethod
    def _program(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        absolute_path(value[0])
        return value

    @field_validator("user", mode="after")
    @classmethod
    def _unprivileged(cls, value: str) -> str:
        if value == "root":
            raise ValueError("a program of `callbacks` does not run as root; give it a user of its own")
        return value


def default_callers() -> tuple[CallerRule, ...]:
    """Root is an operator, and the group an agent with the shipped policies."""
    return (
        CallerRule(match=Match(uid=0), role="operator"),
        CallerRule(
            match=Match(group="sandboxd"),
            role="agent",
            policies=("default", "strict", "python", "shell", "build"),
        ),
    )
