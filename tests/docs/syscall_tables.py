"""The tables of docs/syscalls.md, made of the groups that filters are made of.

    .venv/bin/python tests/docs/syscall_tables.py > docs/syscalls.md

writes the page again; a test fails while the page is not what this prints.
"""

from __future__ import annotations

import sys

from sandboxd.policy.syscalls import BASES, GROUPS
from sandboxd.policy.unreachable import NEVER, PROBED

HEAD = """\
# System calls

A policy's filter is an allow-list: `syscalls.base` names one of three bases, `allow` adds system calls and
`@groups`, `deny` takes them away and wins. What is not on the list is answered with `EPERM` and reported as a
[denial](calls.md#denials). A number that is no system call, and a call through another ABI (32-bit, x32), is
answered with `ENOSYS` and reported too. `sandboxd policy explain NAME` shows how many calls are allowed.

This page is made from the code that makes the filters, and a test compares the two.

A call in *italics* is allowed for some arguments only: `sandboxd/policy/syscalls.py` has each rule with its
reason.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_groups(), "", *_calls(), "", *_never()]) + "\n"


def _groups() -> list[str]:
    lines = ["## Groups", "", "| group | in the bases | what for |", "|---|---|---|"]
    for group in GROUPS.values():
        bases = ", ".join(base for base, names in BASES.items() if group.name in names) or "none"
        more = f" (includes {', '.join(f'`{name}`' for name in group.includes)})" if group.includes else ""
        lines.append(f"| `{group.name}` | {bases} | {group.reason}{more} |")
    return lines


def _calls() -> list[str]:
    lines = ["## What is in each group"]
    for group in GROUPS.values():
        names: dict[str, bool] = {}
        for entry in group.entries:
            if entry.rule.action == "allow":
                names[entry.rule.name] = names.get(entry.rule.name, False) or not entry.rule.when
        shown = ", ".join(f"`{name}`" if always else f"*{name}*" for name, always in names.items())
        lines += ["", f"**`{group.name}`**: {shown}"]
    return lines


def _never() -> list[str]:
    lines = ["## What no policy can allow", "", "`allow` refuses these, also by a group.", ""]
    lines += ["| system calls | why |", "|---|---|"]
    reasons: dict[str, list[str]] = {}
    for name, why in NEVER.items():
        reasons.setdefault(why, []).append(f"`{name}`")
    lines += [f"| {' '.join(names)} | {why} |" for why, names in reasons.items()]
    probed = "; ".join(f"`{name}`: {why}" for name, why in PROBED.items())
    return [*lines, "", f"Answered `ENOSYS` by the filter itself, and not reported: {probed}."]


if __name__ == "__main__":
    sys.stdout.write(page())
