"""What an invocation's JSON means for a shell: the exit status, and the lines that explain it.

Works on the plain document and imports nothing, since ``run-in-sandbox`` starts through here;
``models.Outcome.exit_status`` says the same on the typed value, and a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sandboxd.cli.usage import visible

__all__ = ["exit_status", "explain"]

_FIXED = {
    "wall_time": 124,
    "cpu_time": 124,
    "output": 124,
    "denied": 125,
    "failed": 125,
    "cancelled": 130,
    "memory": 137,
}
SHOWN = 6  # names of a list in one line


def exit_status(invocation: dict[str, Any]) -> int:
    """The status to exit with; 125 for a cause that this version does not know."""
    outcome = invocation.get("outcome") or {}
    cause = outcome.get("cause")
    if cause == "exited":
        return int(outcome.get("exit_code") or 0) & 0xFF
    if cause == "signalled":
        return (128 + int(outcome.get("signal") or 0)) & 0xFF
    if cause == "exec_failed":
        return 127 if outcome.get("errno") in {"ENOENT", "ENOTDIR"} else 126
    return _FIXED.get(str(cause), 125)


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(visible(item) for item in items[:SHOWN]) + more


def _facts(invocation: dict[str, Any], *, artifacts: bool, plain: bool) -> list[str]:
    facts = []
    if invocation.get("pruned"):
        facts.append("its output and artifacts were removed by retention; its record has their digests")
    if retried := invocation.get("retried"):  # its output is that of all of them
        ends = [visible(str(each.get("cause"))) for each in retried]
        facts.append(f"{len(retried) + 1} attempts, after {_listed(ends)}")
    denials = [
        f"{one.get('detail') or one.get('name')}" + (f" ({count} times)" if count > 1 else "")
        for one, count in ((each, int(each.get("count", 1))) for each in invocation.get("denials", []))
    ]
    # A program that probes for a call and does without it has not failed; one that ended with 0 is
    # taken at its word.
    if denials and not plain:
        facts.append(f"the policy denied {_listed(denials)}")
    reached = [
        f"{one.get('limit')} ({one.get('value')})"
        for one in invocation.get("limits_reached", [])
        if not one.get("ended")
    ]
    if reached:
        facts.append(f"limits reached: {_listed(reached)}")
    for name in ("stdout", "stderr"):
        stream = invocation.get(name) or {}
        if stream.get("truncated"):
            facts.append(f"{name} was cut, {stream.get('dropped', 0)} bytes dropped")
    container = invocation.get("container") or {}
    if lost := container.get("lost"):
        facts.append(f"the session had lost its container before: {visible(str(lost.get('why')))}")
    if ended := container.get("ended"):
        facts.append(f"the session's container has ended: {visible(str(ended))}")
    withheld = [f"{one.get('path')} ({one.get('reason')})" for one in invocation.get("withheld", [])]
    if withheld and artifacts:
        facts.append(f"artifacts withheld: {_listed(withheld)}")
    return facts


def explain(invocation: dict[str, Any], *, artifacts: bool) -> list[str]:
    """At most two lines about anything but a plain exit: the cause, then what stood in the way.

    Before them, one for each boundary that the policy took away, whatever the exit.
    ``artifacts``: the caller asked for files and has to know which were withheld.
    """
    outcome = invocation.get("outcome") or {}
    plain = outcome.get("cause") == "exited" and not outcome.get("exit_code")
    lines = [
        f"WARNING: {visible(str(each))}" for each in (invocation.get("receipt") or {}).get("warnings", [])
    ]
    if outcome.get("cause") != "exited":
        lines.append(
            f"{outcome.get('cause', 'failed')}: {visible(str(outcome.get('message', 'no outcome')))}"
        )
    facts = _facts(invocation, artifacts=artifacts, plain=plain)
    if facts:
        lines.append("; ".join(facts))
    return lines
