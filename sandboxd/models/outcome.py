"""How a call ended, and what it used and met on the way."""

from __future__ import annotations

import signal as signals
from enum import StrEnum
from typing import Any

from pydantic import Field

from sandboxd.models.wire import Wire

__all__ = ["Cause", "Denial", "Failure", "LimitReached", "Outcome", "Usage", "signal_name"]


class Cause(StrEnum):
    """How a call ended. All but the last two speak of the tool."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    WALL_TIME = "wall_time"
    CPU_TIME = "cpu_time"
    MEMORY = "memory"
    OUTPUT = "output"
    CANCELLED = "cancelled"
    EXEC_FAILED = "exec_failed"
    DENIED = "denied"
    FAILED = "failed"


class Failure(Wire):
    """Why an attempt failed through a fault of ours; ``code`` is one of ``errors.AttemptFailed``'s."""

    code: str
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


class Outcome(Wire):
    """How the call ended: one cause, with the evidence for it."""

    cause: Cause
    message: str
    """One sentence for a person, or for an agent that decides what to do next."""
    exit_code: int | None = None
    signal: int | None = None
    signal_name: str | None = None
    errno: str | None = None
    """The name of the errno of ``exec_failed``, such as ``ENOENT``."""
    error: Failure | None = None
    evidence: dict[str, Any] = Field(default_factory=dict)
    """The kernel's counters that the cause was read from."""
    redacted: int | None = None
    """How many places of output, names and texts had a secret of the call; None: it was granted none."""

    def exit_status(self) -> int:
        """The status that ``run-in-sandbox`` exits with."""
        match self.cause:
            case Cause.EXITED:
                return self.exit_code or 0
            case Cause.SIGNALLED:
                return 128 + (self.signal or 0)
            case Cause.EXEC_FAILED:
                return 127 if self.errno in {"ENOENT", "ENOTDIR"} else 126
            case Cause.WALL_TIME | Cause.CPU_TIME | Cause.OUTPUT:
                return 124
            case Cause.MEMORY:
                return 137
            case Cause.CANCELLED:
                return 130
            case Cause.DENIED | Cause.FAILED:
                return 125


class Usage(Wire):
    """What the call used, read from its cgroup and its tool process's rusage."""

    wall: int = 0
    cpu_user: int = 0
    cpu_system: int = 0
    memory_peak: int = 0
    pids_peak: int | None = None
    """None where the kernel does not count it (cgroup v2 before 6.1, cgroup v1 before ``pids.peak``)."""
    io_read: int = 0
    io_written: int = 0
    stdout: int = 0
    stderr: int = 0
    connections: int = 0
    """Of a policy with a network, and so are the bytes."""
    requests: int = 0
    """Of HTTP, where rules look into it."""
    network_in: int = 0
    network_out: int = 0


class Denial(Wire):
    """Something that the policy refused while the tool ran."""

    kind: str
    """``syscall``, ``connection``, ``request`` of HTTP, or ``name``: one that was asked of the resolver."""
    name: str
    """Of a connection, the host or address and the port."""
    count: int
    detail: str = ""
    """What the first of them asked for, such as ``socket(AF_PACKET)``; or why it was refused."""
    errno: str = ""
    rule: str = ""
    """File and line of the rule that refused it; empty where no rule allowed it."""


class LimitReached(Wire):
    """A limit that was reached; it ended the call only where ``ended`` says so."""

    limit: str
    value: int
    ended: bool = False
    count: int | None = None


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; real-time and unknown signals are ``SIG<number>``."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIG{number}"
