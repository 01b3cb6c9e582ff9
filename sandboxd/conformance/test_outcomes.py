"""Outcomes: each cause, by a program that comes to it, with what it says and how ``run-in-sandbox`` exits."""

from __future__ import annotations

import io
import signal
import struct
import tarfile
import time
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import errors, models
from sandboxd.conformance.case import Case, outcome, program, sh, text
from sandboxd.conformance.policies import PREFIX

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject


def file(content: bytes, mode: int = 0o755) -> dict[str, Any]:
    return {"inputs": [models.Input(path="file", content=models.Bytes.of(content), mode=mode)]}


# An ELF header of a machine that this is not: e_machine is EM_S390.
FOREIGN = b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HHI", 2, 22, 1) + bytes(48)


def unexecutable(errno: str, argv: list[str], **request: Any) -> Case:
    status = 127 if errno in {"ENOENT", "ENOTDIR"} else 126
    return Case(argv, request=request, cause="exec_failed", errno=errno, status=status)


def by_signal(number: int, argv: list[str]) -> Case:
    return Case(argv, cause="signalled", signal=number, status=128 + number)


CASES = {
    "exited": Case(["true"], status=0),
    "exited with 7": Case(sh("exit 7"), code=7, status=7),
    "exited with 137, which is no verdict": Case(sh("exit 137"), code=137, status=137),
    "exited though children go on": Case(sh("sleep 60 & sleep 60 & exit 3"), code=3, status=3),
    "exited though a child crashed": Case(sh("sh -c 'kill -SEGV $$'; exit 4"), code=4, status=4),
    **{
        f"signalled, {number.name}": by_signal(number, sh(f"kill -{int(number)} $$; sleep 60"))
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGPIPE)
    },
    "signalled, of real time": by_signal(35, ["bash", "-c", "kill -35 $$; sleep 60"]),
    "no such program": unexecutable("ENOENT", ["no-such-program"]),
    "no such path": unexecutable("ENOENT", ["/usr/bin/no-such-program"]),
    "a file in the way": unexecutable("ENOTDIR", ["/usr/bin/env/x"]),
    "not executable": unexecutable("EACCES", ["./file"], **file(b"#!/bin/sh\n", 0o644)),
    "a directory": unexecutable("EACCES", ["/usr"]),
    "of another machine": unexecutable("ENOEXEC", ["./file"], **file(FOREIGN)),
    "of no format": unexecutable("ENOEXEC", ["./file"], **file(bytes(range(64)))),
    "its interpreter is missing": unexecutable("ENOENT", ["./file"], **file(b"#!/no/such/program\n")),
    "a name that is too long": unexecutable("ENAMETOOLONG", ["x" * 300]),
    "arguments that are too long": unexecutable("E2BIG", ["true", *["x" * 131_000] * 30]),
    "a directory to work in that is missing": unexecutable("ENOENT", ["true"], cwd="/no/such"),
    "a directory to work in that is a file": unexecutable("ENOTDIR", ["true"], cwd="/etc/passwd"),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_how_a_call_ends(subject: Subject, what: str) -> None:
    found = subject.hold(CASES[what])
    ended = outcome(found)
    assert ended.message
    assert ended.error is None
    if ended.signal is not None:
        assert ended.signal_name == models.signal_name(ended.signal)
    assert subject.client.get(found.id).outcome == ended


@pytest.mark.parametrize(
    ("argv", "code", "policy"),
    [
        (["true"], 0, "plain"),
        (["sh", "-c", "exit 7"], 7, "plain"),
        (["sh", "-c", "kill -TERM $$"], 143, "plain"),
        (["no-such-program"], 127, "plain"),
        (["/usr"], 126, "plain"),
        (["yes"], 124, "kill"),
    ],
)
def test_run_in_sandbox_exits_with_it(subject: Subject, argv: list[str], code: int, policy: str) -> None:
    assert subject.command("--policy", PREFIX + policy, "--", *argv).returncode == code


def test_cancelled(subject: Subject) -> None:
    call = subject.start("sleep", "60")
    subject.until(lambda: subject.client.get(call.id).state == "running", "it runs")
    subject.client.cancel(call.id)
    found = outcome(subject.wait(call))
    assert (found.cause, found.exit_status()) == ("cancelled", 130)
    assert outcome(subject.client.cancel(call.id)) == found  # it keeps its outcome


@pytest.mark.parametrize("milliseconds", [0, 2, 5, 10, 20, 40])
def test_cancelled_at_any_moment(subject: Subject, milliseconds: int) -> None:
    call = subject.start("sleep", "60", deadline=subject.duration(30))
    time.sleep(milliseconds / 1000)
    subject.client.cancel(call.id)
    assert outcome(subject.wait(call)).cause == "cancelled"


def test_cancelled_when_its_caller_goes_away(subject: Subject) -> None:
    with subject.client.stream(["sleep", "60"], policy=PREFIX + "plain") as events:
        call = next(events).id
    assert call is not None
    found = subject.client.wait(call, timeout=subject.seconds(20))
    assert outcome(found).cause == "cancelled"


def test_a_key_outlives_its_caller_and_gives_one_outcome(subject: Subject) -> None:
    fields: dict[str, Any] = {"policy": PREFIX + "plain", "key": f"conformance {subject.directory.name}"}
    argv = ["sh", "-c", "sleep 0.3; date +%s%N"]
    with subject.client.stream(argv, **fields) as events:
        call = next(events).id
    again = [subject.client.run(argv, **fields) for _ in range(2)]
    assert {one.id for one in again} == {call}
    assert len({text(one) for one in again}) == 1
    with pytest.raises(errors.KeyConflict):
        subject.client.run(["true"], **fields)


def test_a_signal_of_the_callers(subject: Subject) -> None:
    call = subject.start("bash", "-c", "trap 'echo got; exit 9' USR1; echo on; while :; do sleep 0.05; done")
    subject.until(lambda: b"on" in b"".join(subject.client.stdout(call.id)), "the trap is set")
    subject.client.signal(call.id, "SIGUSR1")
    found = subject.wait(call)
    assert (outcome(found).exit_code, text(found)) == (9, "on\ngot\n")
    with pytest.raises(errors.StateConflict):
        subject.client.signal(call.id, "SIGUSR1")


def test_failed_says_why(subject: Subject) -> None:
    """That the members of a tar are in each other's way is found out when it is unpacked."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("a", "a/b"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    found = outcome(subject.run("true", tar=out.getvalue()))
    assert (found.cause, found.exit_status()) == ("failed", 125)
    assert found.error.code == "invalid_request"
    assert found.error.message


DENIED = {
    "mount": [0, 0, 0, 0, 0],
    "unshare": [0x10000000],
    "ptrace": [16, 1, 0, 0],
    "bpf": [5, 0, 0],
    "io_uring_setup": [1, 0],
    "add_key": [0, 0, 0, 0, 0],
    "perf_event_open": [0, 0, -1, -1, 0],
    "userfaultfd": [1],
}


def test_denied_system_calls_are_counted_and_no_fault(subject: Subject) -> None:
    calls = [call for count, call in enumerate(DENIED.items(), 1) for _ in range(count)]
    code = f"from attempt import *\nfor name, args in {calls!r}: print(attempt(syscall, name, *args))"
    found = subject.run("python3", "-c", code, policy="python", **program("proof"))
    assert set(text(found).split()) == {"EPERM"}, text(found, "stderr")
    assert {one.name: one.count for one in found.denials} == {
        name: count for count, name in enumerate(DENIED, 1)
    }
    assert {(one.kind, one.errno) for one in found.denials} == {("syscall", "EPERM")}
    assert next(one.detail for one in found.denials if one.name == "unshare") == "unshare(CLONE_NEWUSER)"
    assert outcome(found).cause == "exited"


def test_the_smallest_base_denies_more(subject: Subject) -> None:
    code = "import socket; socket.socket(socket.AF_INET)"
    found = subject.run("python3", "-c", code, policy="strict")
    assert outcome(found).exit_code == 1
    assert {one.name for one in found.denials} >= {"socket"}
    assert outcome(subject.run("python3", "-c", code, policy="python")).exit_code == 0


def test_usage_is_what_it_used(subject: Subject) -> None:
    code = "for n in $(seq 100000); do :; done; head -c 4000000 /dev/zero > x; echo 12345; sleep 0.1"
    found = subject.run("sh", "-c", code)
    usage = found.usage
    assert usage is not None
    assert usage.wall >= 100_000
    assert usage.cpu_user + usage.cpu_system > 10_000
    assert 4_000_000 < usage.memory_peak < 64 * 2**20
    assert usage.stdout == 6
    assert found.times.ended is not None
    assert found.times.started is not None
    assert found.times.accepted <= found.times.started <= found.times.ended


def test_every_cause_has_a_case() -> None:
    from sandboxd.conformance.test_limits import ENDS  # noqa: PLC0415

    own = {"cancelled", "failed"}
    own |= {case.cause for case in (*CASES.values(), *ENDS.values())}
    assert own == {cause.value for cause in models.Cause} - {"denied"}  # which nothing in this version does
