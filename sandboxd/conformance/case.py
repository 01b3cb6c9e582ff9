"""A row of a table: a call, and what has to come of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.policy import abi

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd.models import Control, Invocation

__all__ = ["Case", "controls", "outcome", "program", "said", "sh", "text"]

PROGRAMS = Path(__file__).parent / "programs"


def sh(code: str) -> list[str]:
    """The argv of a shell script."""
    return ["sh", "-c", code]


def program(name: str) -> dict[str, Any]:
    """The fields of a request whose workspace has a program of this package, and what that needs."""
    names = ("attempt.py", f"{name}.py")
    return {
        "inputs": {one: (PROGRAMS / one).read_text() for one in names},
        "env": {"SYSCALLS": json.dumps(abi.native().numbers)},
    }


@dataclass(frozen=True)
class Case:
    """A call and its verdict. What is None is not compared."""

    argv: Sequence[str]
    policy: str = "plain"
    request: Mapping[str, Any] = field(default_factory=dict)
    program: str | None = None
    """A program of this package that ``argv`` runs."""
    cause: str = "exited"
    code: int | None = 0
    """The exit code, of ``exited`` alone."""
    signal: int | None = None
    errno: str | None = None
    status: int | None = None
    """What ``run-in-sandbox`` exits with."""
    stdout: str | None = None
    reached: Mapping[str, bool] | None = field(default_factory=dict)
    """The limits that were reached, and whether each ended the call."""

    def fields(self) -> dict[str, Any]:
        """The fields of the request beside ``argv`` and the policy."""
        own = program(self.program) if self.program else {}
        return own | dict(self.request)

    def check(self, found: Invocation) -> None:
        """Assert that a call came to what it has to."""
        ended = outcome(found)
        why = f"{ended!r}\nstdout: {text(found)[:500]}\nstderr: {text(found, 'stderr')[:500]}"
        assert ended.cause == self.cause, why
        assert ended.exit_code == (self.code if self.cause == "exited" else None), why
        assert (ended.signal, ended.errno) == (self.signal, self.errno), why
        if self.status is not None:
            assert ended.exit_status() == self.status, why
        if self.reached is not None:
            reached = {limit.limit: limit.ended for limit in found.limits_reached}
            assert reached == dict(self.reached), f"{reached}\n{why}"
        if self.stdout is not None:
            assert text(found) == self.stdout, why


def outcome(found: Invocation) -> Any:
    """The outcome of a call that has ended."""
    assert found.state == "ended", found
    assert found.outcome is not None, found
    return found.outcome


def text(found: Invocation, stream: str = "stdout") -> str:
    """What a call printed, as text."""
    content = getattr(found, stream)
    return "" if content is None else content.decode().decode(errors="backslashreplace")


def said(found: Invocation) -> dict[str, Any]:
    """What a program of this package said: one JSON object."""
    assert outcome(found).exit_code == 0, (found.outcome, text(found), text(found, "stderr"))
    answer: dict[str, Any] = json.loads(text(found))
    return answer


def controls(found: Invocation) -> dict[str, Control]:
    """The lines of a call's receipt by their names."""
    assert found.receipt is not None, found.outcome
    return {control.name: control for control in found.receipt.controls}
