"""The system call policy: its data, its compiler against libseccomp, its reports."""

from __future__ import annotations

import errno
import tempfile

import pyseccomp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.policy import abi, bpf, seccomp
from sandboxd.policy.seccomp import ArgTest, Program, Rule, compile_filter, resolve

NATIVE_ARCH = abi.native()
BASES = ("strict", "default", "build")
CLONE_NEWUSER, CLONE_THREAD = 0x10000000, 0x00010000


def base(name: str) -> Program:
    return compile_filter(resolve(name, [], []))


# The data


def test_every_known_system_call_is_in_a_group_or_never_reachable() -> None:
    grouped = frozenset[str]().union(*(group.names for group in seccomp.groups().values()))
    assert seccomp.known_syscalls() == grouped | seccomp.never().keys()
    for machine in abi.ARCHES:  # a name here is new in libseccomp: judge it, and give it a reason
        assert not abi.arch_of(machine).numbers.keys() - seccomp.known_syscalls()
    assert grouped & seccomp.never().keys() == {"clone3"}  # there as an errno, not as an allowance


def test_every_group_and_rule_has_a_reason() -> None:
    for group in seccomp.groups().values():
        assert group.reason
        assert all(entry.reason for entry in group.entries)
        assert all(included in seccomp.groups() for included in group.includes)


def test_bases_grow() -> None:
    strict, default, build = (set(resolve(name, [], [])) for name in BASES)
    assert strict < default < build


@pytest.mark.parametrize("machine", list(abi.ARCHES))
@pytest.mark.parametrize("name", BASES)
def test_what_is_never_reachable_is_in_no_base(name: str, machine: str) -> None:
    program = compile_filter(resolve(name, [], []), machine)
    for syscall in seccomp.never():
        assert program.judge(syscall) in {"denied", "enosys"}, syscall
    for syscall in seccomp.groups()["@debug"].names - {"personality", "prctl"}:
        assert program.judge(syscall) == "denied", syscall
    assert program.judge("clone3") == "enosys"


PARKED = """
read write recvmsg sendmsg poll ppoll dup dup2 dup3 close close_range fcntl chdir fchdir umask
execve execveat exit exit_group rt_sigprocmask rt_sigaction rt_sigreturn brk munmap mprotect
setsid setpgid
"""


@pytest.mark.parametrize("name", BASES)
def test_the_parked_process_can_work_whatever_is_denied(name: str) -> None:
    start = seccomp.groups()["@start"]
    others = [group for group in seccomp.groups() if group != start.name]
    program = compile_filter(resolve(name, [], others))
    for syscall in PARKED.split():
        if syscall in NATIVE_ARCH.numbers:
            assert program.judge(syscall, (2**64 - 1,) * 6) == "allow", syscall
    huge = 0x40000
    assert program.judge("mmap", (2**64 - 1, 2**64 - 1, 2**64 - 1, ~huge & 2**64 - 1, 0, 0)) == "allow"
    assert program.judge("mmap", (0, 0, 0, huge, 0, 0)) == "denied"
    assert program.judge("ioctl", (0, 0x540E)) == "allow"
    assert program.judge("prctl", (1, 9)) == program.judge("prctl", (4, 0)) == "allow"


def test_debug_can_be_allowed() -> None:
    program = compile_filter(resolve("default", ["@debug"], []))
    assert program.judge("ptrace") == "allow"
    assert program.judge("personality", [0x0040000]) == "allow"
    assert program.judge("personality", [0x0400000]) == "denied"


# Resolving


@pytest.mark.parametrize("name", list(seccomp.never()))
def test_what_is_never_reachable_cannot_be_allowed(name: str) -> None:
    with pytest.raises(seccomp.NeverAllowed) as caught:
        resolve("default", [name], [])
    assert caught.value.name == name
    assert caught.value.why


@pytest.mark.parametrize(
    ("name", "nearest"), [("opennat", "openat"), ("@fiel", "@file"), ("x" * 100_000, None), ("", None)]
)
def test_an_unknown_name_comes_with_the_nearest(name: str, nearest: str | None) -> None:
    for allow, deny in (([name], []), ([], [name])):
        with pytest.raises(seccomp.UnknownSyscall) as caught:
            resolve("strict", allow, deny)
        assert caught.value.nearest == nearest


@pytest.mark.parametrize("name", ["read", "execve", "ioctl", "prctl", "@start"])
def test_what_the_parked_process_needs_cannot_be_denied(name: str) -> None:
    with pytest.raises(seccomp.RequiredSyscall):
        resolve("default", [], [name])


def test_an_unknown_base() -> None:
    with pytest.raises(ValueError, match="default"):
        resolve("defualt", [], [])


def test_deny_wins_and_order_does_not_matter() -> None:
    assert resolve("default", ["@aio", "@debug"], ["ptrace"]) == resolve(
        "default", ["@debug", "@aio", "@aio", "ptrace"], ["ptrace", "ptrace"]
    )
    program = compile_filter(resolve("default", ["ptrace"], ["ptrace", "personality"]))
    assert program.judge("ptrace") == "denied"
    assert program.judge("personality") == "denied"


def test_allowing_a_call_by_name_keeps_its_tests() -> None:
    program = compile_filter(resolve("strict", ["mknodat"], []))
    assert program.judge("mknodat", [0, 0, 0x1000]) == "allow"
    assert program.judge("mknodat", [0, 0, 0x2000]) == "denied"


def test_a_probe_that_is_only_noise_can_still_be_allowed() -> None:
    assert base("default").judge("set_mempolicy") == "enosys"
    assert compile_filter(resolve("default", ["@numa"], [])).judge("set_mempolicy") == "allow"
    assert compile_filter(resolve("strict", ["set_mempolicy"], [])).judge("set_mempolicy") == "allow"


def test_denying_a_group_leaves_what_others_have() -> None:
    program = compile_filter(resolve("default", [], ["@network-client", "@terminal"]))
    assert program.judge("socket", [1, 1, 0]) == "allow"
    assert program.judge("socket", [2, 1, 0]) == "denied"
    assert program.judge("ioctl", [0, 0x5401]) == "denied"
    assert program.judge("ioctl", [0, 0x540E]) == "allow"


def test_an_included_group_comes_along() -> None:
    program = compile_filter(resolve("strict", ["@network-client"], ["@terminal"]))
    assert program.judge("socket", [10, 1 | 0o2000000, 6]) == "allow"


def test_a_denied_probe_is_still_answered_enosys() -> None:
    assert compile_filter(resolve("strict", [], ["clone3"])).judge("clone3") == "enosys"


# What is decided by argument: (call, arguments, verdict under default)

HIGH = 1 << 32
ARGUMENTS = [
    ("socket", (1, 1), "allow"), ("socket", (1, 5 | 0o2004000), "allow"), ("socket", (1, 3), "denied"),
    ("socket", (2, 1, 0), "allow"), ("socket", (2, 2, 17), "allow"), ("socket", (10, 1, 6), "allow"),
    ("socket", (HIGH | 2, 1, HIGH), "allow"),  # the kernel takes an int: this is AF_INET
    ("socket", (2, 3, 1), "denied"), ("socket", (2, 3 | 0o2000000, 1), "denied"),
    ("socket", (2, 10, 0), "denied"), ("socket", (2, 1, 132), "denied"), ("socket", (2, 2, 1), "denied"),
    ("socket", (16, 3, 0), "allow"), ("socket", (16, 2, 0), "allow"), ("socket", (16, 3, 9), "denied"),
    ("socket", (16, 3, 12), "denied"), ("socket", (17, 3, 3), "denied"), ("socket", (17, 2, 0), "denied"),
    ("socket", (38, 5, 0), "denied"), ("socket", (40, 1, 0), "denied"), ("socket", (HIGH | 40, 1), "denied"),
    ("socketpair", (1, 1), "allow"), ("socketpair", (2, 1), "denied"), ("socketpair", (30, 5), "denied"),
    ("clone", (17,), "allow"), ("clone", (CLONE_THREAD | 0x3D0F00,), "allow"),
    ("clone", (CLONE_NEWUSER | 17,), "denied"), ("clone", (0x20000,), "denied"),
    ("clone", (0x02000000,), "denied"), ("clone", (0x40000000,), "denied"),
    ("ioctl", (0, 0x5401), "allow"), ("ioctl", (0, 0x5412), "denied"), ("ioctl", (0, 0x541C), "denied"),
    ("ioctl", (0, 0x5423), "denied"), ("ioctl", (0, HIGH | 0x5412), "denied"),
    ("ioctl", (0, (0xDEAD << 32) | 0x541C), "denied"),
    ("personality", (0,), "allow"), ("personality", (0xFFFFFFFF,), "allow"),
    ("personality", (2**64 - 1,), "allow"), ("personality", (8,), "denied"),
    ("personality", (0x0040000,), "denied"), ("personality", (HIGH | 0x0400000,), "denied"),
    ("prctl", (15,), "allow"), ("prctl", (38, 1), "allow"), ("prctl", (22, 2), "allow"),
    ("prctl", (0x53564D41,), "allow"), ("prctl", (35,), "denied"), ("prctl", (47, 1), "allow"),
    ("prctl", (47, 2), "denied"), ("prctl", (HIGH | 35,), "denied"), ("prctl", (53,), "denied"),
    ("mknodat", (0, 0, 0x1000 | 0o644), "allow"), ("mknodat", (0, 0, 0o644), "allow"),
    ("mknodat", (0, 0, 0x2000), "denied"), ("mknodat", (0, 0, 0x6000), "denied"),
    ("prlimit64", (0, 7), "allow"), ("prlimit64", (1, 7), "denied"), ("prlimit64", (HIGH, 7), "allow"),
    ("seccomp", (1, 0), "allow"), ("seccomp", (1, 8), "denied"), ("seccomp", (1, 9), "denied"),
    ("seccomp", (2, 8), "allow"), ("seccomp", (HIGH | 1, 8), "denied"),
]  # fmt: skip


@pytest.mark.parametrize("machine", list(abi.ARCHES))
def test_arguments(machine: str) -> None:
    program = compile_filter(resolve("default", [], []), machine)
    for name, args, verdict in ARGUMENTS:
        assert program.judge(name, args) == verdict, (name, args)


def test_the_filter_answers_mptcp_as_a_kernel_without_it() -> None:
    program = base("default")
    value = bpf.run(program.bpf, NATIVE_ARCH.numbers["socket"], NATIVE_ARCH.audit, (2, 1, 262))
    assert value == bpf.ERRNO | errno.EPROTONOSUPPORT


# The compiler


def test_judging_without_arguments_asks_for_any() -> None:
    assert base("default").judge("socket") == "allow"
    assert base("default").judge("socket", []) == "denied"
    assert base("default").judge("prctl") == "allow"
    assert base("default").judge("bpf") == "denied"


def test_judging_an_unknown_call() -> None:
    with pytest.raises(seccomp.UnknownSyscall):
        base("default").judge("opeen")
    assert compile_filter(resolve("default", [], []), "aarch64").judge("open") == "enosys"


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        compile_filter((), "riscv64")


@pytest.mark.parametrize("name", BASES)
def test_the_filter_is_short_and_closed(name: str) -> None:
    for machine in abi.ARCHES:
        program = compile_filter(resolve(name, [], []), machine)
        assert program.instructions < 700
        for foreign in (0x40000003, 0x40000028, 0xC00000F3, 0):
            assert bpf.run(program.bpf, 1, foreign, ()) == bpf.NOTIFY
        for number in (0x40000000, 0x40000001, 0x40000208, 0xFFFFFFFF, 471, 1000):
            assert program.judge(number, ()) == "denied"


def test_a_policy_has_one_program() -> None:
    assert base("default") is base("default")
    assert base("default").digest == base("default").digest != base("strict").digest


COMPARISONS = {
    "eq": pyseccomp.EQ, "ne": pyseccomp.NE, "lt": pyseccomp.LT, "le": pyseccomp.LE,
    "gt": pyseccomp.GT, "ge": pyseccomp.GE, "masked_eq": pyseccomp.MASKED_EQ,
}  # fmt: skip


def by_libseccomp(rules: tuple[Rule, ...], machine: str) -> bytes:
    """The same rules compiled by libseccomp; tests that it cannot express are left to the caller."""
    audit = abi.ARCHES[machine]
    reference = pyseccomp.SyscallFilter(pyseccomp.NOTIFY)
    reference.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.NOTIFY)
    reference.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    if audit != pyseccomp.system_arch():
        reference.add_arch(audit)
        reference.remove_arch(pyseccomp.system_arch())
    for rule in rules:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, rule.name)
        if rule.name not in abi.arch_of(machine).numbers or number == -1:
            continue
        action = pyseccomp.ALLOW if rule.errno is None else pyseccomp.ERRNO(getattr(errno, rule.errno))
        tests = [
            pyseccomp.Arg(test.index, pyseccomp.MASKED_EQ, test.bits, test.value)
            if test.op in {"eq", "masked_eq"}
            else pyseccomp.Arg(test.index, COMPARISONS[test.op], test.value)
            for test in rule.when
        ]
        reference.add_rule(action, number, *tests)
    with tempfile.TemporaryFile() as file:
        reference.export_bpf(file)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("machine", list(abi.ARCHES))
@pytest.mark.parametrize("name", BASES)
def test_every_number_gets_libseccomps_verdict(name: str, machine: str) -> None:
    # libseccomp takes one test per argument and rule: calls that need two are compared elsewhere
    twice = {
        rule.name
        for rule in resolve(name, [], [])
        if len({test.index for test in rule.when}) < len(rule.when) or any(t.op == "ne" for t in rule.when)
    }
    assert twice <= {"ioctl", "seccomp"}
    rules = tuple(rule for rule in resolve(name, [], []) if rule.name not in twice)
    ours, theirs = compile_filter(rules, machine).bpf, by_libseccomp(rules, machine)
    audit = abi.ARCHES[machine]
    later = set(abi.LATER.values()) | set(abi.LATER_X86_64.values())
    values = ((), (1,) * 6, (2, 1, 0), (2, 3, 1), (16, 3, 0), (17, 3, 3), (2**64 - 1,) * 6, (47, 1),
              (CLONE_NEWUSER,), (0, 0x1000, 0x1000), (0, 0x2000, 0x2000), (2, 1, 262))  # fmt: skip
    for number in [*range(600), 0x40000000, 0x40000001, 2**31, 2**32 - 1]:
        if number in later:
            continue
        for args in values:
            assert bpf.run(ours, number, audit, args) == bpf.run(theirs, number, audit, args), (number, args)


WORDS = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 3), st.integers(2**32 - 2, 2**32 + 2), st.just(2**64 - 1)
)


def holds(test: ArgTest, args: list[int]) -> bool:
    value = args[test.index]
    masked = value & test.bits
    return {
        "eq": masked == test.value, "masked_eq": masked == test.value, "ne": masked != test.value,
        "lt": value < test.value, "le": value <= test.value,
        "gt": value > test.value, "ge": value >= test.value,
    }[test.op]  # fmt: skip


@st.composite
def arg_tests(draw: st.DrawFn) -> ArgTest:
    op = draw(st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge", "masked_eq"]))
    mask = draw(WORDS) if op == "masked_eq" or (op in {"eq", "ne"} and draw(st.booleans())) else None
    value = draw(WORDS) & (2**64 - 1 if mask is None else mask)
    return ArgTest(draw(st.integers(0, 5)), op, value, mask)  # type: ignore[arg-type]


@given(
    st.lists(st.lists(arg_tests(), max_size=4), min_size=1, max_size=4),
    st.lists(st.lists(WORDS, min_size=6, max_size=6), min_size=1, max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_argument_tests_mean_what_they_say(alternatives: list[list[ArgTest]], calls: list[list[int]]) -> None:
    rules = tuple(Rule("read", "allow", when=tuple(tests)) for tests in alternatives)
    program = compile_filter(rules)
    number = NATIVE_ARCH.numbers["read"]
    for args in calls:
        allowed = any(all(holds(test, args) for test in tests) for tests in alternatives)
        verdict = bpf.run(program.bpf, number, NATIVE_ARCH.audit, args)
        assert verdict == (bpf.ALLOW if allowed else bpf.NOTIFY)


@pytest.mark.parametrize(
    ("index", "op", "value", "mask"),
    [(6, "eq", 0, None), (0, "eq", 2, 1), (0, "lt", 0, 1), (0, "masked_eq", 0, None), (0, "eq", -1, None)],
)
def test_a_test_that_means_nothing(index: int, op: str, value: int, mask: int | None) -> None:
    with pytest.raises(ValueError):
        ArgTest(index, op, value, mask)  # type: ignore[arg-type]


def test_a_filter_that_is_too_long() -> None:
    many = tuple(Rule("read", "allow", when=(ArgTest(0, "eq", value),)) for value in range(1000))
    with pytest.raises(ValueError, match="4096"):
        compile_filter(many)


# Reports


@pytest.mark.parametrize(
    ("name", "args", "detail"),
    [
        ("socket", (17, 0o2000003, 768), "socket(AF_PACKET, SOCK_RAW, 768)"),
        ("socket", (99, 1, 0), "socket(0x63, SOCK_STREAM)"),
        ("clone", (CLONE_NEWUSER | 0x20011,), "clone(CLONE_NEWNS|CLONE_NEWUSER)"),
        ("unshare", (CLONE_NEWUSER,), "unshare(CLONE_NEWUSER)"),
        ("ioctl", (0, HIGH | 0x5412), "ioctl(TIOCSTI)"),
        ("prctl", (35, 1), "prctl(PR_SET_MM)"),
        ("mknodat", (0, 0, 0x21A4), "mknodat(S_IFCHR)"),
        ("mount", (), "mount"),
    ],
)
def test_describe(name: str, args: tuple[int, ...], detail: str) -> None:
    number = NATIVE_ARCH.numbers[name]
    assert seccomp.describe(NATIVE_ARCH.audit, number, args) == (name, detail)
    assert seccomp.errno_for(number, NATIVE_ARCH.audit) == errno.EPERM


def test_describe_what_has_no_name() -> None:
    x86 = abi.ARCHES["x86_64"]
    assert seccomp.describe(x86, 999, ())[0] == "#999"
    assert seccomp.describe(x86, -1, ())[0] == "#-1"
    assert seccomp.describe(0x40000003, 21, ())[0] == "i386:mount"
    assert seccomp.describe(x86, 0x40000029, ())[0] == "x32:socket"
    assert seccomp.describe(0x1234, 5, ())[0] == "0x1234:#5"
    for arch, number in ((x86, 999), (x86, -1), (0x40000003, 21), (x86, 0x40000029), (0, 0)):
        assert seccomp.errno_for(number, arch) == seccomp.answer(arch, number) == errno.ENOSYS
