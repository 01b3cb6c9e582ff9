"""How an attempt came to its end, and the outcome that follows from it and from the kernel's counters.

Pure. The first ending that happens counts; a later one is what the first one caused. A status is
never guessed at: 137 is ``memory`` only when the cgroup counted an OOM kill.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sandboxd import units
from sandboxd.models import Cause, LimitReached, Outcome, signal_name

if TYPE_CHECKING:
    from sandboxd.plan import Limits

__all__ = [
    "CommandFailed",
    "Deadline",
    "Ended",
    "Ending",
    "Evidence",
    "Lost",
    "Stopped",
    "classify",
    "limits_reached",
]


@dataclass(frozen=True)
class Deadline:
    """When a call as a whole has to be over: a time of ``time.monotonic()``, and the microseconds asked."""

    at: float
    asked: int


@dataclass(frozen=True)
class Ended:
    """The tool process ended by itself, or by a signal that was not ours. ``status`` as wait(2) gives it."""

    status: int


@dataclass(frozen=True)
class CommandFailed:
    """The command could not be executed."""

    errno: int


@dataclass(frozen=True)
class Stopped:
    """We ended the call: a limit was reached, or somebody cancelled it."""

    why: Literal["wall", "deadline", "cpu_time", "stdout", "stderr", "cancelled"]


@dataclass(frozen=True)
class Lost:
    """PID 1 is gone without a report."""

    reason: str


Ending = Ended | CommandFailed | Stopped | Lost


@dataclass(frozen=True)
class Evidence:
    """Counters of the cgroup and the file systems, read when everything was dead."""

    oom_kills: int
    pids_denied: int
    cpu_total: int
    """Microseconds since hand-over."""
    stdout_dropped: int
    stderr_dropped: int
    workspace_full: bool
    workspace_inodes_gone: bool
    tmp_full: bool


def classify(
    ending: Ending, evidence: Evidence, limits: Limits, argv0: str, deadline: Deadline | None
) -> Outcome | None:
    """The outcome; None when PID 1 was lost and no counter says why, which is a failure of ours."""
    facts: dict[str, Any] = {
        "oom_kills": evidence.oom_kills,
        "pids_denied": evidence.pids_denied,
        "cpu_total": evidence.cpu_total,
    }
    match ending:
        case Stopped(why):
            return _stopped(why, limits, deadline, facts)
        case CommandFailed(number):
            name = errno.errorcode.get(number, str(number))
            return Outcome(
                cause=Cause.EXEC_FAILED,
                errno=name,
                evidence=facts,
                message=f"{argv0!r} could not be executed: {_explain_errno(number)}.",
            )
        case Ended(status) if evidence.oom_kills and status != 0:
            return _memory(limits, {**facts, "status": status})
        case Lost() if evidence.oom_kills:
            return _memory(limits, facts)
        case Ended(status) if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return Outcome(
                cause=Cause.SIGNALLED,
                signal=number,
                signal_name=signal_name(number),
                evidence=facts,
                message=f"The command was ended by {signal_name(number)}{_hint(number)}.",
            )
        case Ended(status):
            code = os.WEXITSTATUS(status)
            return Outcome(
                cause=Cause.EXITED,
                exit_code=code,
                evidence=facts,
                message=f"The command exited with status {code}.",
            )
        case Lost():
            return None


def _stopped(why: str, limits: Limits, deadline: Deadline | None, facts: dict[str, Any]) -> Outcome:
    match why:
        case "wall":
            return Outcome(
                cause=Cause.WALL_TIME,
                evidence=facts,
                message=f"The command ran for its wall-clock limit of "
                f"{units.format_duration(limits.wall)} and was ended.",
            )
        case "deadline":
            asked = 0 if deadline is None else deadline.asked
            return Outcome(
                cause=Cause.WALL_TIME,
                evidence={**facts, "deadline": asked},
                message=f"The call's deadline of {units.format_duration(asked)} passed and it was ended.",
            )
        case "cpu_time":
            return Outcome(
                cause=Cause.CPU_TIME,
                evidence=facts,
                message=f"The command used its CPU time of "
                f"{units.format_duration(limits.cpu_time or 0)} and was ended.",
            )
        case "cancelled":
            return Outcome(cause=Cause.CANCELLED, evidence=facts, message="The call was cancelled.")
        case stream:
            cap = limits.stdout if stream == "stdout" else limits.stderr
            return Outcome(
                cause=Cause.OUTPUT,
                evidence={**facts, "stream": stream},
                message=f"The command wrote more than {units.format_size(cap)} to {stream} and was ended.",
            )


def _memory(limits: Limits, facts: dict[str, Any]) -> Outcome:
    return Outcome(
        cause=Cause.MEMORY,
        evidence=facts,
        message=f"The command needed more than its {units.format_size(limits.memory)} of memory "
        "(files in /tmp, /dev/shm and /workspace count) and the kernel killed "
        f"{facts['oom_kills']} of its processes.",
    )


def _explain_errno(number: int) -> str:
    hints = {
        errno.ENOENT: "no such file in the container "
        "(or its interpreter, its loader or the directory to start in is missing)",
        errno.EACCES: "it is not an executable file, or its directory cannot be entered",
        errno.ENOEXEC: "it is not a program for this machine, or a script without a #! line",
        errno.E2BIG: "the arguments and environment are larger than the kernel takes",
    }
    return hints.get(number, os.strerror(number))


def _hint(number: int) -> str:
    return ": it wrote a file larger than limits.file_size" if number == signal.SIGXFSZ else ""


def limits_reached(
    ending: Ending, evidence: Evidence, limits: Limits, deadline: Deadline | None
) -> list[LimitReached]:
    """Every limit that was reached, whether or not it ended the call."""
    why = ending.why if isinstance(ending, Stopped) else None
    signalled = isinstance(ending, Ended) and os.WIFSIGNALED(ending.status)
    over_file_size = signalled and isinstance(ending, Ended) and os.WTERMSIG(ending.status) == signal.SIGXFSZ
    bad_end = isinstance(ending, Lost) or (isinstance(ending, Ended) and ending.status != 0)
    found: list[tuple[bool, str, int | None, bool, int | None]] = [
        (why == "wall", "wall", limits.wall, True, None),
        (why == "deadline", "deadline", None if deadline is None else deadline.asked, True, None),
        (
            limits.cpu_time is not None and (why == "cpu_time" or evidence.cpu_total >= limits.cpu_time),
            "cpu_time",
            limits.cpu_time,
            why == "cpu_time",
            None,
        ),
        (evidence.oom_kills > 0, "memory", limits.memory, bad_end, evidence.oom_kills),
        (evidence.pids_denied > 0, "pids", limits.pids, False, evidence.pids_denied),
        (why == "stdout" or evidence.stdout_dropped > 0, "stdout", limits.stdout, why == "stdout", None),
        (why == "stderr" or evidence.stderr_dropped > 0, "stderr", limits.stderr, why == "stderr", None),
        (over_file_size, "file_size", limits.file_size, True, None),
        (evidence.workspace_full, "workspace.size", limits.workspace_size, False, None),
        (evidence.workspace_inodes_gone, "workspace.inodes", limits.workspace_inodes, False, None),
        (evidence.tmp_full, "tmp", limits.tmp_size, False, None),
    ]
    return [
        LimitReached(limit=name, value=value or 0, ended=ended, count=count)
        for reached, name, value, ended, count in found
        if reached
    ]
