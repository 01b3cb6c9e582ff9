"""Examples are judged by the compiled filter and the mounts."""

from __future__ import annotations

from typing import Any

import pytest

from sandboxd.engine import bundle
from sandboxd.policy import ExampleError, abi, filesystem, judge, load_policies, seccomp, shipped_policies

SHIPPED = load_policies([shipped_policies()])


@pytest.mark.parametrize(
    ("policy", "example", "allowed"),
    [
        ("default", "syscall openat", True),
        ("default", "syscall ptrace", False),
        ("default", "syscall socket 2 1 0", True),
        ("default", "syscall socket 0x11 3 0", False),
        ("strict", "syscall socket 2 1 0", False),
        ("default", "write /workspace", True),
        ("default", "write /workspace/a b", True),
        ("default", "write /workspaces", False),
        ("default", "write /tmp/x", True),
        ("default", "write /dev/null", True),
        ("default", "write /dev/mem", False),
        ("default", "write /dev/shm/x", True),
        ("default", "write /usr/bin/python3", False),
        ("build", "write /usr/bin/python3", True),
        ("build", "write /proc/sys/kernel/core_pattern", False),
        ("build", "write /sys/fs/cgroup/x", True),  # there is no /sys: it would be a file of the overlay
        ("default", "write /sys/fs/cgroup/x", False),
        ("build", "write /dev/mine", True),
        ("build", "write /dev/pts/mine", False),
        ("build", "write /dev/.sandboxd", False),
        ("default", "write /dev/mine", False),
        ("default", "write /dev/ptmx", True),
        ("default", "read /etc/passwd", True),
        ("default", "read /proc/kcore", False),
        ("default", "connect example.org:443", False),
        ("default", "connect [::1]:80", False),
    ],
)
def test_judge(policy: str, example: str, allowed: bool) -> None:  # noqa: FBT001
    assert judge(SHIPPED.get(policy), example)[0] is allowed


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("", "no kind of example"),
        ("sycall read", "did you mean 'syscall'"),
        ("syscall", "write what syscall is about"),
        ("syscall ptrase", "did you mean 'ptrace'"),
        ("syscall socket AF_INET", "numbers"),
        ("syscall socket 1 2 3 4 5 6 7", "numbers"),
        ("syscall socket 99999999999999999999", "64 bits"),
        ("write usr", "not absolute"),
        ("write /usr/../etc", "not normalised"),
        ("write /proc/self/comm", "about the process itself"),
        ("write /dev/stdout", "about the process itself"),
        ("connect example.org", "HOST:PORT"),
        ("connect example.org:0", "HOST:PORT"),
        ("connect example.org:99999", "HOST:PORT"),
        ("request GET", "METHOD URL"),
        ("request GET example.org/x", "METHOD URL"),
        ("request get https://example.org/x", "METHOD URL"),
        ("request GET https://u@example.org/x", "METHOD URL"),
        ("request GET https://example.org:0x/x", "METHOD URL"),
        ("request GET https://example.org/x y", "METHOD URL"),
    ],
)
def test_what_cannot_be_judged_says_why(folder: Any, example: str, said: str) -> None:
    with pytest.raises(ExampleError, match=said):
        judge(SHIPPED.get("default"), example)
    folder.write("p", f"examples:\n  denies:\n    - '{example}'\n")
    (problem,) = folder.load().problems
    assert (problem.code, problem.line) == ("bad_value", 5)


def test_mounts_of_the_policy_count(folder: Any) -> None:
    folder.write(
        "p", "filesystem: {root: overlay, size: 1MiB}\nmounts: [{source: /srv/data, target: /data}]\n"
    )
    policy = folder.load().get("p")
    assert judge(policy, "write /data/x") == (False, "/data is read-only")
    assert judge(policy, "read /data/x") == (True, "/data is read-only")
    assert judge(policy, "write /other") == (True, "/ is writable")


def test_what_programs_trust_where_rules_look_into_http_cannot_be_written(folder: Any) -> None:
    network = "network: {allow: [{host: a.test, ports: [443], methods: [GET]}]}\n"
    folder.write("p", f"filesystem: {{root: overlay, size: 1MiB}}\nprocess: {{user: 0}}\n{network}")
    policy = folder.load().get("p")
    assert judge(policy, "write /dev/.sandboxd-ca.pem") == (False, "/dev/.sandboxd-ca.pem is read-only")
    assert judge(policy, "read /dev/.sandboxd-ca.pem")[0]
    folder.write("p", "process: {user: 0}\n")
    assert judge(folder.load().get("p"), "write /dev/.sandboxd-ca.pem") == (True, "/dev is writable")


def test_a_filter_that_changes_makes_the_example_wrong(folder: Any) -> None:
    text = "examples: {denies: [syscall ptrace]}\n"
    folder.write("p", text)
    assert folder.codes() == []
    folder.write("p", text + "syscalls: {allow: ['@debug']}\n")
    assert folder.codes() == [("wrong_example", 3)]


def test_what_is_judged_as_closed_is_closed_by_the_engine() -> None:
    assert set(filesystem.MASKED) == set(bundle.MASKED)
    assert set(filesystem.READ_ONLY) == set(bundle.READ_ONLY)


LOOK = """
cut -d' ' -f5 /proc/self/mountinfo
echo --
for path; do
    if [ -d "$path" ]; then
        (: > "$path/.probe") 2>/dev/null && echo "writable $path"
        [ -n "$(ls -A "$path")" ] || echo "empty $path"
    else
        [ -w "$path" ] && echo "writable $path"
        case $path in
            /proc/*) [ "$(head -c1 "$path" | wc -c)" != 0 ] || echo "empty $path" ;;
        esac
    fi
done
"""


@pytest.mark.parametrize("name", ["default", "build"])
def test_the_table_is_what_a_container_has(daemon: Any, name: str) -> None:
    table = filesystem.mount_table(SHIPPED.get(name).spec)
    found = daemon.run("sh", "-c", LOOK, "sh", *(row.target for row in table), policy=name).stdout.text
    mounts, _, lines = found.partition("--\n")
    seen = dict.fromkeys(lines.splitlines())
    there = set(mounts.splitlines())
    ptmx = {"/dev/ptmx", "/dev/pts/ptmx"}  # files of other mounts, which differ from those
    optional = {*filesystem.MASKED, *filesystem.READ_ONLY}  # a kernel may not have them
    targets = {row.target for row in table} - ptmx
    assert there <= targets
    assert targets - there <= optional
    for row in table:
        if row.target in there | ptmx:
            # a masked file is the null device, which takes anything and keeps nothing
            assert (f"writable {row.target}" in seen) is row.writable or not row.readable, row
            assert row.readable or f"empty {row.target}" in seen, row


def test_examples_are_not_inherited(folder: Any) -> None:
    folder.write("p", "examples: {denies: [syscall ptrace]}\n")
    folder.write("q", "extends: p\nsyscalls: {allow: [ptrace]}\n")
    assert folder.codes() == []
    assert folder.load().get("q").spec.examples.denies == ()


def test_a_call_that_one_machine_lacks_is_judged_by_the_filter_of_the_other() -> None:
    """So a policy that is in force on x86-64 is in force on arm64."""
    assert "vfork" not in abi.arch_of("aarch64").numbers
    assert abi.machine_with("vfork") == "x86_64"
    assert abi.machine_with("openat") == abi.native().machine
    build = SHIPPED.get("build")
    assert judge(build, "syscall vfork")[0]
    for text, allowed in [
        *((text, True) for text in build.spec.examples.allows),
        *((text, False) for text in build.spec.examples.denies),
    ]:
        kind, _, name = text.partition(" ")
        for machine, audit in abi.ARCHES.items():
            if kind == "syscall" and name in abi.arch_of(machine).numbers:
                answer = seccomp.compile_filter(build.syscalls, machine).judge(name)
                assert (answer == "allow") == allowed, (text, machine, audit)


@pytest.mark.parametrize(
    ("example", "allowed"),
    [
        ("request GET https://api.test/open/x?q", True),
        ("request GET http://api.test/open/x", False),  # the port is in no rule
        ("request GET https://api.test:8443/open/x", True),
        ("request POST https://api.test/open/x", False),
        ("request GET https://api.test/open/%2e%2e/x", False),
        ("request GET https://api.test/open/secret", False),
        ("request GET https://api.test", False),
        ("request PUT https://plain.test/anything", True),
        ("request PUT https://other.test/anything", False),
    ],
)
def test_requests_are_judged_by_the_rules_of_http(folder: Any, example: str, allowed: bool) -> None:  # noqa: FBT001
    folder.write(
        "p",
        "network:\n  allow:\n"
        "    - {host: api.test, ports: [443, 8443], methods: [GET], paths: [/open/**]}\n"
        "    - {host: plain.test, ports: [443]}\n"
        "  deny:\n    - {host: api.test, paths: [/open/secret]}\n"
        f"examples:\n  {'allows' if allowed else 'denies'}:\n    - {example}\n",
    )
    assert folder.load().problems == ()
