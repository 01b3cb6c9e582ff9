"""What a hostile tool tries: against PID 1 and the kernel, against other calls, and against the host."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.conformance.case import Case, outcome, program, said, sh, text
from sandboxd.conformance.plugin import needs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Invocation

CLOSED = frozenset({"EPERM", "EACCES", "EROFS"})
NOWHERE = CLOSED | {"ENOENT"}
NOTHING = NOWHERE | {"ENODATA"}
ONLY_OURS = frozenset({"EPERM", "ESRCH", "ENOENT"})

# The first pattern that a try's name matches says with which errnos it may end.
REFUSED: dict[str, frozenset[str]] = {
    "kill everybody": frozenset({"ESRCH"}),
    "kill 1 .*|tgkill 1|pidfd of 1|prlimit 1|priority of 1|affinity of 1": ONLY_OURS,
    "ptrace.*|read memory of 1": frozenset({"EPERM"}),
    "proc 1 .*|above the root": NOWHERE,
    "new namespace by clone3": frozenset({"ENOSYS"}),
    "new namespace.*|set namespace": frozenset({"EPERM"}),
    "mount|remount|bind|unmount|fsopen|open_tree|mount_setattr|pivot_root|chroot|open by handle": frozenset(
        {"EPERM"}
    ),
    "keyring.*|io_uring|bpf|perf|userfaultfd|module|kexec|reboot|swapon|syslog|set the clock": frozenset(
        {"EPERM"}
    ),
    "huge pages.*": frozenset({"EPERM"}),
    ".* socket|vsock|.* netlink": frozenset({"EPERM", "EACCES", "EAFNOSUPPORT"}),
    "device, .*|setuid|setgroups|capset|ambient capability|terminal.*": frozenset({"EPERM"}),
    "chmod of a device": CLOSED,
    "removing .*|writing to init": CLOSED | {"EBUSY", "ETXTBSY"},
    "oom score": frozenset({"EACCES"}),
    "proc .*|shadow": NOTHING,
    ".*": NOWHERE,
}
# As root inside, which owns the files of the image and has the uid of PID 1: PID 1 of a namespace takes no
# signal that it has not asked for, as the outcome of this very call shows; the rest is refused all the same.
AS_ROOT: dict[str, frozenset[str]] = {
    "kill 1 .*|tgkill 1|pidfd of 1|priority of 1|affinity of 1|prlimit 1": ONLY_OURS | {"done"},
    "setuid|a new file in dev": frozenset({"done", "EPERM"}),
    **REFUSED,
}


@pytest.mark.parametrize(
    ("policy", "expected"), [("python", REFUSED), pytest.param("root", AS_ROOT, marks=needs("a root inside"))]
)
def test_nothing_beyond_the_container_can_be_reached(
    subject: Subject, policy: str, expected: dict[str, frozenset[str]]
) -> None:
    found = subject.run("python3", "hostile.py", policy=policy, **program("hostile"))
    results = said(found)
    assert results.pop("ids of its own") == (["0"] if policy == "root" else ["1000"])
    wrong = {}
    for name, result in results.items():
        allowed = next(errnos for pattern, errnos in expected.items() if re.fullmatch(pattern, name))
        if result not in allowed:
            wrong[name] = result
    assert not wrong
    assert len(results) > 100
    assert {"mount", "unshare", "ptrace", "bpf", "io_uring_setup"} <= {one.name for one in found.denials}


FLOOD = 'n=10; while eval "exec $n</dev/null" 2>/dev/null; do n=$((n+1)); done; [ $n -gt 900 ] && echo full'
SIGNALS = "for n in $(seq 64); do kill -$n 1 2>/dev/null; done; exit 42"
ORPHANS = """
for n in 1 2 3; do
    setsid bash -c 'trap "" TERM HUP; while :; do echo x; sleep .01; done' & disown
done
sleep 0.1; exit 7
"""
BOMBS = {
    "fork bomb": Case(["bash", "-c", ":(){ :|:& };:; while :; do :; done"], request={"limits": {"wall": 0.5}},
                      cause="wall_time", reached={"wall": True, "pids": False}),
    "memory bomb": Case(sh("while :; do x=$x$x.; done"), cause="memory", reached={"memory": True}),
    "tail of nothing": Case(sh("tail /dev/zero; echo $?"), stdout="137\n", reached={"memory": False}),
    "output flood": Case(sh("yes & yes >&2 & wait"), policy="kill", cause="output", reached=None),
    "output flood that is cut": Case(sh("yes & yes >&2 & wait"), policy="cut", cause="wall_time",
                                     request={"limits": {"wall": 0.4}}, reached=None),
    "descriptor flood": Case(["bash", "-c", FLOOD], stdout="full\n", reached={}),
    "kill -1": Case(["bash", "-c", "sleep 60 & kill -9 -1; wait; echo alone"], stdout="alone\n"),
    "every signal to PID 1": Case(["bash", "-c", SIGNALS], code=42),
    "stopped": Case(sh("kill -STOP $$"), request={"limits": {"wall": 0.3}}, cause="wall_time",
                    reached={"wall": True}),
    "deaf": Case(["bash", "-c", "trap '' $(seq 1 64); while :; do sleep 1; done"], cause="wall_time",
                 request={"limits": {"wall": 0.3}}, reached={"wall": True}),
    "orphans that go on": Case(["bash", "-c", ORPHANS], code=7),
    "core dump": Case(sh("ulimit -c unlimited 2>/dev/null; sh -c 'kill -SEGV $$'; ls -A"), stdout=""),
    "set-id copy": Case(sh("cp /usr/bin/id i; chmod 6755 i; ./i -u; ./i -g; ./i -ru"), stdout="1000\n" * 3),
    "set-id program of the image": Case(
        sh("su -c true root </dev/null >/dev/null 2>&1 || echo no; grep -h NoNewPrivs /proc/self/status"),
        stdout="no\nNoNewPrivs:\t1\n"),
    "init itself": Case(["/dev/.sandboxd"], code=125),
    "a hundred thousand names": Case(sh("seq -f n%.0f 100000 | xargs touch 2>/dev/null; ls | wc -l"),
                            reached={"workspace.inodes": False}),
    "deep directories": Case(sh("for n in $(seq 900); do mkdir d && cd d || break; done; echo $n"),
                             stdout="900\n", reached=None),
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
def test_it_ends_and_the_next_call_is_served(subject: Subject, what: str) -> None:
    began = time.monotonic()
    subject.hold(BOMBS[what])
    assert time.monotonic() - began < subject.seconds(20)
    assert text(subject.run("echo", "served")) == "served\n"


@needs("a root inside")
def test_a_root_inside_cannot_end_pid_1(subject: Subject) -> None:
    subject.hold(Case(["bash", "-c", SIGNALS], policy="root", code=42))


LOOKED = {
    "abstract socket": "ECONNREFUSED",
    **dict.fromkeys(["shared memory", "semaphores", "message queue", "posix message queue"], "ENOENT"),
    "lock on a file of the image": "done",
    "files": [],
    "processes": False,
    "everybody": "ESRCH",
}


def look(subject: Subject) -> dict[str, Any]:
    return said(subject.run("python3", "meet.py", "look", policy="python", **program("meet")))


@pytest.fixture
def resident(subject: Subject) -> Iterator[Invocation]:
    """A call that has left something everywhere and stays."""
    argv = ("python3", "meet.py", "leave", "stay")
    call = subject.start(*argv, policy="python", **program("meet"))
    subject.until(lambda: b"left" in b"".join(subject.client.stdout(call.id)), "it has left everything")
    yield call
    subject.client.cancel(call.id)
    subject.wait(call)


def test_two_calls_at_once_do_not_meet(subject: Subject, resident: Invocation) -> None:
    found = look(subject)
    assert subject.client.get(resident.id).state == "running"
    assert found == LOOKED


def test_two_calls_one_after_the_other_do_not_meet(subject: Subject) -> None:
    for _ in range(4):
        found = subject.run("python3", "meet.py", "leave", policy="python", **program("meet"))
        assert (outcome(found).exit_code, text(found)) == (0, "left\n"), text(found, "stderr")
        assert look(subject) == LOOKED


@needs("ids of each container's own")
def test_calls_at_once_have_ids_of_their_own(subject: Subject) -> None:
    calls = [subject.start("sleep", "60") for _ in range(4)]

    def running() -> bool:
        return all(subject.client.get(call.id).state == "running" for call in calls)

    subject.until(running, "all run")
    for call in calls:
        subject.client.cancel(call.id)
    receipts = [subject.wait(call).receipt for call in calls]
    ids = {one.in_force for found in receipts if found for one in found.controls if one.name == "user"}
    assert len(ids) == 4


def test_calls_at_once_have_namespaces_of_their_own(subject: Subject) -> None:
    code = "for n in pid ipc mnt net uts; do readlink /proc/self/ns/$n; done; sleep 60"
    calls = [subject.start("sh", "-c", code) for _ in range(4)]

    def names() -> list[str]:
        return [name for call in calls for name in b"".join(subject.client.stdout(call.id)).decode().split()]

    subject.until(lambda: len(names()) == 20, "all have looked")
    seen = names()
    for call in calls:
        subject.client.cancel(call.id)
        subject.wait(call)
    assert len(set(seen)) == len(seen) == 20


def test_a_bomb_holds_up_nobody_else(subject: Subject) -> None:
    bomb = subject.start(
        "bash", "-c", ":(){ :|:& };:; while :; do :; done", limits={"wall": subject.duration(20)}
    )
    flood = subject.start("sh", "-c", "yes", policy="loud", limits={"wall": subject.duration(20)})
    time.sleep(0.2)
    began = time.monotonic()
    assert text(subject.run("sh", "-c", "echo fine | cat")) == "fine\n"
    assert time.monotonic() - began < subject.seconds(5)
    for call in (bomb, flood):
        subject.client.cancel(call.id)
        assert outcome(subject.wait(call)).cause == "cancelled"


def test_denied_calls_in_a_flood_stall_only_themselves(subject: Subject) -> None:
    code = "from attempt import *\nwhile True: attempt(syscall, 'ptrace', 16, 1, 0, 0)"
    wall = {"wall": subject.duration(1)}
    call = subject.start("python3", "-c", code, policy="python", limits=wall, **program("meet"))
    time.sleep(0.2)
    began = time.monotonic()
    assert text(subject.run("echo", "fine")) == "fine\n"
    assert time.monotonic() - began < subject.seconds(3)
    found = subject.wait(call)
    assert outcome(found).cause == "wall_time"
    assert [one.name for one in found.denials] == ["ptrace"]
    assert found.denials[0].count > 20


@needs("the engine's processes on this host")
def test_the_host_is_as_it_was(subject: Subject) -> None:
    """What a tool would have changed first, had any of the above worked."""
    places = ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward")
    before = [Path(place).read_text() for place in places], Path("/dev/null").stat().st_mode
    said(subject.run("python3", "hostile.py", policy="root", **program("hostile")))
    after = [Path(place).read_text() for place in places], Path("/dev/null").stat().st_mode
    assert before == after
    assert not any("|/bin/sh" in value for value in after[0])


def test_control_characters_do_no_harm(subject: Subject) -> None:
    found = subject.run("printf", r"\033]0;x\007\r\n%s", "\x1b[2J\r\n", labels={"a": "\x1b[31m\n"})
    again = subject.client.get(found.id)
    assert (again.argv, again.stdout, again.labels) == (found.argv, found.stdout, {"a": "\x1b[31m\n"})
    assert "\x1b" not in subject.log()


def test_what_the_container_shows_of_the_host(subject: Subject) -> None:
    found = text(
        subject.run(
            "sh", "-c", "cat /proc/self/mountinfo /proc/self/cgroup /proc/net/unix /etc/hostname; env"
        )
    )
    assert " /workspace " in found
    for secret in (str(subject.directory), str(subject.socket)):
        assert secret not in found
