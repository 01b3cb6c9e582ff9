"""The nouns of a system call policy: a test of one argument, a rule, a named group of rules.

A rule speaks of one system call by name. The rules of one name are tried in order and the first one
whose tests all hold decides; where none does, the call is denied.
"""

from __future__ import annotations

import errno as errnos
from dataclasses import dataclass
from typing import Literal

__all__ = ["INT", "ArgTest", "Entry", "Group", "NeverAllowed", "RequiredSyscall", "Rule", "UnknownSyscall"]

ALL_BITS = 2**64 - 1
INT = 2**32 - 1
"""The bits of an argument that the kernel declares ``int`` or ``unsigned int``: it ignores the rest."""


class UnknownSyscall(ValueError):
    """Raised for a name that is no system call and no group; ``nearest`` is a valid one, or None."""

    def __init__(self, name: str, nearest: str | None) -> None:
        hint = f"; did you mean {nearest}?" if nearest else ""
        kind = "group of system calls" if name.startswith("@") else "system call"
        super().__init__(f"unknown {kind} {name!r}{hint}")
        self.name = name
        self.nearest = nearest


class NeverAllowed(ValueError):
    """Raised when a policy allows what no policy may; ``why`` is one clause."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} can never be allowed: {why}")
        self.name = name
        self.why = why


class RequiredSyscall(ValueError):
    """Raised when a policy denies what every tool process needs before its first instruction."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} cannot be denied: {why}")
        self.name = name
        self.why = why


@dataclass(frozen=True)
class ArgTest:
    """One test of one argument, unsigned, 64 bits wide unless ``mask`` says less.

    ``eq``, ``ne`` and ``masked_eq`` compare ``argument & mask`` with ``value``; the other operators
    take no mask. Raises ValueError for a test that the kernel could not mean.
    """

    index: int
    op: Literal["eq", "ne", "lt", "le", "gt", "ge", "masked_eq"]
    value: int
    mask: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index <= 5:
            raise ValueError(f"a system call has arguments 0 to 5, not {self.index}")
        if self.op == "masked_eq" and self.mask is None:
            raise ValueError("masked_eq needs a mask")
        if self.mask is not None and self.op not in {"eq", "ne", "masked_eq"}:
            raise ValueError(f"{self.op} takes no mask")
        if not 0 <= self.bits <= ALL_BITS or self.value & ~self.bits:
            raise ValueError(f"{self.value:#x} has bits outside of {self.bits:#x}")

    @property
    def bits(self) -> int:
        """The mask, all ones where there is none."""
        return ALL_BITS if self.mask is None else self.mask


@dataclass(frozen=True)
class Rule:
    """What happens to one system call when all of ``when`` hold. ``errno`` is a name such as ``ENOSYS``."""

    name: str
    action: Literal["allow", "errno"]
    errno: str | None = None
    when: tuple[ArgTest, ...] = ()

    def __post_init__(self) -> None:
        if (self.action == "errno") != (self.errno is not None):
            raise ValueError("errno goes with the action errno, and only with it")
        if self.errno is not None and not hasattr(errnos, self.errno):
            raise ValueError(f"{self.errno!r} is not the name of an errno")


@dataclass(frozen=True)
class Entry:
    """A rule and the reason why it is there."""

    rule: Rule
    reason: str


@dataclass(frozen=True)
class Group:
    """Rules with one purpose. ``includes`` come along when the group is allowed, not when it is denied."""

    name: str
    reason: str
    entries: tuple[Entry, ...]
    includes: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The group's own rules, in order."""
        return tuple(entry.rule for entry in self.entries)

    @property
    def names(self) -> frozenset[str]:
        """The system calls that the group's own rules speak of."""
        return frozenset(entry.rule.name for entry in self.entries)
