"""The section ``retry`` of a policy: which ends of an attempt are followed by another.

A fault of ours is tried again by its code; an outcome of the tool's own only where the policy names it, and
an exit status only where it names that too: a test that fails is an answer, and not a mishap.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from sandboxd import units
from sandboxd.policy.quantities import NUMBER, Duration, Memory, Size
from sandboxd.policy.section import Section

__all__ = ["OWN_CAUSES", "Raise", "Retry", "RetryCause", "RetryExited", "RetrySignalled"]

MAX_PAUSE = 3600 * 10**6  # microseconds
MAX_CODE = 255


class Raise(Section):
    """Limits of the next attempt."""

    memory: Memory | None = None
    wall: Duration | None = None
    cpu_time: Duration | None = None
    stdout: Size | None = None
    stderr: Size | None = None


class RetryCause(Section):
    """How often a call that ended by its own fault is run again."""

    times: Annotated[int, Field(ge=1, le=100)] = 1
    raise_: Annotated[Raise, Field(alias="raise")] = Raise()
    """Limits that the next attempt gets."""

    @property
    def said(self) -> str:
        """Which ends of this cause are meant, for a person; empty: all."""
        return ""

    def covers(self, exit_code: int | None, signal: str | None) -> bool:  # noqa: ARG002  (it is for the others)
        """Whether an attempt of this cause that ended so is meant."""
        return True


def _code(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= MAX_CODE:
        why = "0 is a success, which is not tried again" if value == 0 else f"{value} is no exit status"
        raise ValueError(f"{why}; write statuses from 1 to {MAX_CODE}")
    return value


ExitCode = Annotated[
    int, BeforeValidator(_code), Field(json_schema_extra={"minimum": 1, "maximum": MAX_CODE})
]  # fmt: skip
SignalName = Literal[
    "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGUSR1",
    "SIGSEGV", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGSTKFLT", "SIGXCPU", "SIGXFSZ", "SIGVTALRM",
    "SIGPROF", "SIGIO", "SIGPWR", "SIGSYS",
]  # fmt: skip
"""Those that end a process which does nothing about them (signal(7)), as an outcome's ``signal_name``."""


class RetryExited(RetryCause):
    """Which statuses of a command that exited are tried again, and how often."""

    codes: Annotated[tuple[ExitCode, ...], Field(min_length=1, max_length=MAX_CODE)]
    """Exit statuses from 1 to 255, such as 75; any other is the outcome."""

    @property
    def said(self) -> str:
        """The statuses."""
        return f"for status {', '.join(map(str, self.codes))}"

    def covers(self, exit_code: int | None, signal: str | None) -> bool:  # noqa: ARG002  (it has none)
        """Whether the status is one of these."""
        return exit_code in self.codes


class RetrySignalled(RetryCause):
    """Which signals that ended a command are tried again, and how often."""

    signals: Annotated[tuple[SignalName, ...], Field(min_length=1, max_length=64)] | None = None
    """Names such as SIGSEGV; without this key, any signal."""

    @property
    def said(self) -> str:
        """The signals."""
        return f"for {'any signal' if self.signals is None else ', '.join(self.signals)}"

    def covers(self, exit_code: int | None, signal: str | None) -> bool:  # noqa: ARG002  (it has none)
        """Whether the signal is one of these."""
        return self.signals is None or signal in self.signals


_PAUSE = re.compile(rf"{NUMBER}(us|ms|s|m|h)\.\.{NUMBER}(us|ms|s|m|h)")


def _range(value: str) -> str:
    if not _PAUSE.fullmatch(value):
        raise ValueError(f"{value!r} is not a range such as 1s..30s")
    low, high = map(units.parse_duration, value.split(".."))
    if not 0 < low <= high <= MAX_PAUSE:
        raise ValueError(f"{value!r} is not a range from a shorter to a longer pause of at most 1h")
    return value


Pause = Annotated[str, AfterValidator(_range)]
Fault = Literal["failed", "engine", "host", "interrupted", "control_not_enforced", "internal",
                "secrets_unavailable"]  # fmt: skip


class Retry(Section):
    """Which causes are tried again, each attempt from the same checkpoint."""

    failed: Annotated[int, Field(ge=0, le=100)] = 0
    """How often a fault of ours is tried again."""
    backoff: Pause = "1s..30s"
    """The first and the longest pause between attempts."""
    on: Annotated[tuple[Fault, ...], Field(max_length=16)] = ("engine", "host", "interrupted")
    """Which faults of ours, by code; failed stands for all of them."""
    safe: bool = False
    """True says that running the call twice does no harm, also with a network."""
    memory: RetryCause | None = None
    """A call that needed more memory than it had."""
    wall_time: RetryCause | None = None
    """A call that ran for longer than limits.wall."""
    cpu_time: RetryCause | None = None
    """A call that used more than limits.cpu_time."""
    exited: RetryExited | None = None
    """A command that exited with one of these statuses."""
    signalled: RetrySignalled | None = None
    """A command that was ended by a signal of its own."""
    output: RetryCause | None = None
    """A call that wrote more than limits.stdout or limits.stderr, where on_limit is kill."""

    def covers(self, code: str) -> bool:
        """Whether a fault of ours of this code is tried again."""
        return code in self.on or "failed" in self.on

    def of(self, cause: str) -> RetryCause | None:
        """What is said of a cause that is the tool's own."""
        found: RetryCause | None = getattr(self, cause, None) if cause in OWN_CAUSES else None
        return found

    def pause(self, before: int) -> int:
        """Microseconds until the next attempt, after so many that were followed by one: doubled each time."""
        low, high = map(units.parse_duration, self.backoff.split(".."))
        return int(min(high, low * 2 ** min(before, 32)))


OWN_CAUSES = ("memory", "wall_time", "cpu_time", "exited", "signalled", "output")
