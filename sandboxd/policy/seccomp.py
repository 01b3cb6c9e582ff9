"""System call policy: from a base, additions and removals to rules, a filter, and names for reports.

Theory of operation. The filter is an allow-list. What it does not allow it *notifies*: the tool's
thread waits in the kernel, the daemon (``kernel/notify.py``) counts the call, answers it with the
errno of ``errno_for``, and never lets it continue, so a race on the caller's memory wins nothing.
Calls of another ABI (i386, x32, 32-bit ARM) are notified too: a denial that is reported beats a
process that dies of SIGSYS without a word. Only probes of C libraries, which are no attempts, are
answered by the filter itself.

``resolve`` and ``compile_filter`` are pure. The rules go into a ``Shape``, so they are data with one
order; the program is made from them alone.
"""

from __future__ import annotations

import difflib
import errno as errnos
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

from sandboxd import canonical
from sandboxd.policy import abi, bpf
from sandboxd.policy.rule import (
    INT,
    ArgTest,
    Entry,
    Group,
    NeverAllowed,
    RequiredSyscall,
    Rule,
    UnknownSyscall,
)
from sandboxd.policy.syscalls import BASES, CONSTANTS, GROUPS, NAMESPACE_FLAGS, START
from sandboxd.policy.unreachable import NEVER

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "ArgTest",
    "Entry",
    "Group",
    "NeverAllowed",
    "Program",
    "RequiredSyscall",
    "Rule",
    "UnknownSyscall",
    "answer",
    "bases",
    "compile_filter",
    "describe",
    "errno_for",
    "groups",
    "known_syscalls",
    "never",
    "resolve",
]

Verdict = Literal["allow", "denied", "enosys", "kill"]


def groups() -> dict[str, Group]:
    """The named groups, by name (``@file``), each with its reason and its rules' reasons."""
    return dict(GROUPS)


def bases() -> dict[str, tuple[str, ...]]:
    """The names of the groups of each base."""
    return dict(BASES)


def never() -> dict[str, str]:
    """What no policy can allow, and why."""
    return dict(NEVER)


@cache
def known_syscalls() -> frozenset[str]:
    """Every name that a policy may write, the same on every host: what is in a group or in ``never``.

    A call that a newer libseccomp knows and nobody has judged yet is unknown, and therefore denied.
    """
    return frozenset(NEVER).union(*(group.names for group in GROUPS.values()))


def _check(name: str) -> None:
    valid: Iterable[str] = GROUPS if name.startswith("@") else known_syscalls()
    if name not in valid:
        nearest = difflib.get_close_matches(name[:64], list(valid), n=1)
        raise UnknownSyscall(name, nearest[0] if nearest else None)


def _with_includes(name: str) -> tuple[str, ...]:
    return (*(inner for other in GROUPS[name].includes for inner in _with_includes(other)), name)


def _rules_of(name: str) -> tuple[Rule, ...]:
    """What allowing a name brings: a group's rules, or a call's rules in the first group that has it."""
    _check(name)
    if name.startswith("@"):
        return tuple(rule for group in _with_includes(name) for rule in GROUPS[group].rules)
    if name in NEVER:
        raise NeverAllowed(name, NEVER[name])
    for group in GROUPS.values():
        if name in group.names and group.name != START:
            return tuple(rule for rule in group.rules if rule.name == name)
    return tuple(rule for rule in GROUPS[START].rules if rule.name == name)


def resolve(base: str, allow: Sequence[str], deny: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of a base with calls or groups added and taken away; ``deny`` wins over ``allow``.

    Allowing a call by name brings the tests that its group makes of its arguments; denying a group
    takes the group's own rules away, denying a call all rules of it. Order and repetition of
    ``allow`` and ``deny`` do not change the result. Raises UnknownSyscall, NeverAllowed,
    RequiredSyscall, and ValueError for an unknown base.
    """
    if base not in BASES:
        raise ValueError(f"unknown base {base!r}; there is {', '.join(BASES)}")
    wanted = {rule for group in BASES[base] for rule in GROUPS[group].rules}
    wanted |= {rule for name in allow for rule in _rules_of(name)}
    required = GROUPS[START]
    for name in deny:
        _check(name)
        if name == START or name in required.names - NEVER.keys():
            why = next((e.reason for e in required.entries if e.rule.name == name), required.reason)
            raise RequiredSyscall(name, why)
        taken = set(GROUPS[name].rules) if name.startswith("@") else {r for r in wanted if r.name == name}
        wanted -= taken - set(required.rules)
    order = {rule: at for at, rule in enumerate(r for group in GROUPS.values() for r in group.rules)}
    return tuple(sorted(wanted, key=lambda rule: (rule.name, order[rule])))


@dataclass(frozen=True)
class Program:
    """A compiled filter: ``bpf`` is an array of ``struct sock_filter``, as seccomp(2) takes it."""

    bpf: bytes = field(repr=False)
    digest: str
    arch: str
    """``uname -m`` of the architecture it is for."""

    @property
    def instructions(self) -> int:
        """How many instructions the program has."""
        return len(self.bpf) // bpf.INSTRUCTION.size

    def judge(self, syscall: str | int, args: Sequence[int] | None = None) -> Verdict:
        """What the filter does with a call, found by running the bytes that are installed.

        Without ``args`` the answer is ``allow`` if the call is allowed with *some* arguments; with
        them, missing ones are 0. A call that this architecture does not have is ``enosys``. Raises
        UnknownSyscall for a name that no architecture has.
        """
        arch = abi.arch_of(self.arch)
        if isinstance(syscall, str):
            _check(syscall)
            if syscall not in arch.numbers:
                return "enosys"
            syscall = arch.numbers[syscall]
        if args is None:
            return _verdict(bpf.run_any(self.bpf, syscall, arch.audit))
        return _verdict(bpf.run(self.bpf, syscall, arch.audit, args))


def _verdict(value: int) -> Verdict:
    match value & 0xFFFF0000:
        case bpf.ALLOW:
            return "allow"
        case bpf.NOTIFY:
            return "denied"
        case bpf.ERRNO:
            return "enosys" if value & 0xFFFF == errnos.ENOSYS else "denied"
        case _:
            return "kill"


def compile_filter(rules: tuple[Rule, ...], arch: str | None = None) -> Program:
    """The filter of these rules for an architecture (``uname -m``), by default this machine's.

    Rules for calls that the architecture lacks are left out. Raises ValueError for an architecture
    that no filter can be made for, and for rules that do not fit into 4096 instructions.
    """
    return _compile(rules, abi.native().machine if arch is None else arch)


@lru_cache(maxsize=256)
def _compile(rules: tuple[Rule, ...], machine: str) -> Program:
    arch = abi.arch_of(machine)
    alternatives: dict[int, bpf.Block] = {}
    for rule in rules:
        if rule.name not in arch.numbers:
            continue
        value = bpf.ALLOW if rule.errno is None else bpf.ERRNO | int(getattr(errnos, rule.errno))
        number = arch.numbers[rule.name]
        alternatives[number] = (*alternatives.get(number, ()), (rule.when, value))
    verdicts = {number: block if block[0][0] else block[0][1] for number, block in alternatives.items()}
    code = bpf.assemble(arch.audit, verdicts, bpf.NOTIFY)
    return Program(code, canonical.digest_bytes(code), machine)


def _by_audit(audit: int, number: int) -> abi.Arch | None:
    for machine, value in abi.ARCHES.items():
        if value == audit and not (machine == "x86_64" and number >= 0 and number & abi.X32_BIT):
            return abi.arch_of(machine)
    return None


def errno_for(nr: int, arch: int) -> int:
    """The errno of a denied call; ``arch`` is an AUDIT_ARCH value as the kernel reports it.

    EPERM for a call that has a name. ENOSYS for a number that has none and for another ABI, as a
    kernel without them answers, because programs try newer calls and fall back on that alone.
    """
    table = _by_audit(arch, nr)
    return errnos.EPERM if table is not None and nr in table.names else errnos.ENOSYS


def answer(arch: int, nr: int) -> int:
    """``errno_for`` in the order of arguments that ``kernel.notify`` calls with."""
    return errno_for(nr, arch)


def _flags(value: int) -> str:
    return "|".join(name for name, bit in NAMESPACE_FLAGS.items() if value & bit) or hex(value)


def _constant(call: str, index: int, value: int) -> str:
    return CONSTANTS[call, index].get(value, hex(value))


def _arguments(name: str, values: Sequence[int]) -> tuple[str, ...]:
    """The arguments of a call that say why it was denied; none where its name says it all."""
    found: tuple[str, ...] = ()
    match name:
        case "socket" | "socketpair":
            protocol = (str(values[2]),) if values[2] else ()
            kind = _constant("socket", 1, values[1] & 0xF)
            found = (_constant("socket", 0, values[0]), kind, *protocol)
        case "clone" | "unshare":
            found = (_flags(values[0]),)
        case "setns":
            found = (_flags(values[1]),)
        case "ioctl":
            found = (_constant("ioctl", 1, values[1]),)
        case "prctl":
            found = (_constant("prctl", 0, values[0]),)
        case "personality":
            found = (hex(values[0]),)
        case "mknod" | "mknodat":
            mode = values[1 if name == "mknod" else 2]
            found = ({0x2000: "S_IFCHR", 0x6000: "S_IFBLK"}.get(mode & 0xF000, oct(mode)),)
        case "ptrace" | "seccomp" | "keyctl" | "bpf" | "prlimit64" | "kill":
            found = (str(values[0]), str(values[1]))
    return found


def describe(arch: int, nr: int, args: Sequence[int]) -> tuple[str, str]:
    """The name of a denied call and what it asked for, such as ``socket(AF_PACKET, SOCK_RAW)``.

    ``arch`` is an AUDIT_ARCH value. A call of another ABI is named ``i386:mount``, a number without
    a name ``#999``. The text holds only names and numbers, never what the tool's memory holds.
    """
    table = _by_audit(arch, nr)
    if table is None:
        name = ":".join(abi.foreign_name(arch, nr))
        return name, f"{name} (a call of another ABI)"
    name = table.names.get(nr, f"#{nr}")
    found = _arguments(name, [argument & INT for argument in (*args, 0, 0, 0, 0, 0, 0)[:6]])
    return name, f"{name}({', '.join(found)})" if found else name
