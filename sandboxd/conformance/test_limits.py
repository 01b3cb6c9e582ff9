"""Limits: each is reached by a program, ends the call or refuses, and is in the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.conformance.case import Case, outcome, program, said, sh, text

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject

MIB = 2**20


def take(thing: str, **fields: Any) -> Case:
    return Case(["python3", "take.py", *thing.split()], program="take", **fields)


ENDS = {
    "wall": Case(["sleep", "60"], request={"limits": {"wall": 0.3}}, cause="wall_time", status=124,
                 reached={"wall": True}),
    "wall, of a policy that says more": take(
        "cpu", policy="python", request={"limits": {"wall": 0.4}}, cause="wall_time", reached={"wall": True}),
    "deadline": Case(["sleep", "60"], request={"deadline": 0.5}, cause="wall_time", status=124,
                     reached={"deadline": True}),
    "cpu_time": Case(sh("while :; do :; done"), policy="cpu", cause="cpu_time", status=124,
                     reached={"cpu_time": True}),
    "cpu_time, of all processes together": Case(
        sh("for n in 1 2 3; do (while :; do :; done) & done; wait"), policy="cpu", cause="cpu_time",
        reached={"cpu_time": True}),
    "cpu_time, of processes that have ended": Case(
        sh("while :; do (n=0; while [ $n -lt 2000 ]; do n=$((n+1)); done); done"), policy="cpu",
        cause="cpu_time", reached={"cpu_time": True}),
    **{
        thing: take(thing, policy="small", cause="memory", status=137, reached={"memory": True})
        for thing in ("memory", "shared memory", "files in memory")
    },
    "files and memory": take("files and memory", policy="small", cause="memory", reached=None),
    "buffers of sockets": take("buffers", policy="small", cause="memory", reached=None),
    "memory of a child": Case(
        ["sh", "-c", "python3 take.py memory; echo $?"], policy="small", program="take", stdout="137\n",
        reached={"memory": False}),
    "file_size": take("a large file", policy="few", cause="signalled", signal=25, status=128 + 25,
                      reached={"file_size": True}),
    "stdout, cut": Case(sh("head -c 100000 /dev/zero"), policy="cut", reached={"stdout": False}),
    "stderr, cut": Case(sh("head -c 100000 /dev/zero >&2"), policy="cut", reached={"stderr": False}),
    "stdout at its size": Case(sh("head -c 65536 /dev/zero"), policy="cut", reached={}),
    "stdout, ended": Case(["yes"], policy="kill", cause="output", status=124, reached={"stdout": True}),
    "stderr, ended": Case(sh("yes >&2"), policy="kill", cause="output", status=124, reached={"stderr": True}),
}  # fmt: skip


@pytest.mark.parametrize("what", ENDS)
def test_a_limit(subject: Subject, what: str) -> None:
    found = subject.hold(ENDS[what])
    assert outcome(found).message
    for limit in found.limits_reached:
        assert limit.value > 0


REFUSES = {
    # what is taken: policy, least and most that there is, the errno after it, limits that were reached
    "processes": ("few", 8, 11, "EAGAIN", {"pids"}),
    "threads": ("few", 8, 11, "EAGAIN", {"pids"}),
    "descriptors": ("few", 20, 29, "EMFILE", set[str]()),
    "workspace": ("small", 5 * MIB, 6 * MIB, "ENOSPC", {"workspace.size"}),
    "names": ("small", 180, 199, "ENOSPC", {"workspace.inodes"}),
    "tmp": ("small", 4 * MIB, 4 * MIB, "ENOSPC", {"tmp"}),
    "names in tmp": ("small", 95, 99, "ENOSPC", {"tmp"}),
    "shm": ("small", 4 * MIB, 4 * MIB, "ENOSPC", set[str]()),
}


@pytest.mark.parametrize("thing", REFUSES)
def test_no_more_of_it_is_to_be_had(subject: Subject, thing: str) -> None:
    policy, least, most, errno, reached = REFUSES[thing]
    found = subject.run("python3", "take.py", *thing.split(), policy=policy, **program("take"))
    amount, ended = said(found)[thing]
    assert (least <= amount <= most, ended) == (True, errno), (amount, ended)
    # A file system that was full and is so no more is not noticed, which is no matter: nothing was lost.
    assert {limit.limit for limit in found.limits_reached} in (reached, reached - {
        "workspace.size", "workspace.inodes", "tmp"})  # fmt: skip
    assert not any(limit.ended for limit in found.limits_reached)


FULL = {
    "workspace.size": "head -c 40M /dev/zero > x",
    "workspace.inodes": "n=0; while : > f$n; do n=$((n+1)); done",
    "tmp": "head -c 40M /dev/zero > /tmp/x",
}


@pytest.mark.parametrize("limit", FULL)
def test_what_is_full_at_the_end_is_in_the_result(subject: Subject, limit: str) -> None:
    found = subject.run("sh", "-c", f"({FULL[limit]}) 2>/dev/null; true", policy="plain")
    assert [(one.limit, one.ended) for one in found.limits_reached] == [(limit, False)]


def test_refused_forks_are_counted(subject: Subject) -> None:
    code = "import os\nfor _ in range(30):\n try: os.fork() or os._exit(0)\n except OSError: pass"
    code = code.replace("os._exit(0)", "__import__('time').sleep(9)")
    found = subject.run("python3", "-c", code, policy="few", limits={"wall": subject.duration(1)})
    (pids,) = (limit for limit in found.limits_reached if limit.limit == "pids")
    assert (pids.value, pids.ended) == (12, False)
    assert pids.count is not None
    assert pids.count >= 10
    assert found.usage is not None
    assert found.usage.pids_peak in {None, 12}


def test_memory_is_told_by_the_kernels_count(subject: Subject) -> None:
    found = subject.run("python3", "take.py", "memory", policy="small", **program("take"))
    assert outcome(found).evidence["oom_kills"] >= 1
    assert found.usage is not None
    assert 20 * MIB < found.usage.memory_peak <= 32 * MIB
    assert outcome(subject.run("sh", "-c", "exit 137")).cause == "exited"


@pytest.mark.parametrize(("stream", "size"), [("stdout", 65536), ("stderr", 16384)])
def test_what_is_cut_off_is_counted(subject: Subject, stream: str, size: int) -> None:
    to = {"stdout": "", "stderr": " >&2"}[stream]
    found = subject.run("sh", "-c", f"head -c 100000 /dev/zero{to}", policy="cut")
    content = getattr(found, stream)
    assert (content.size, content.truncated, content.dropped) == (size, True, 100_000 - size)
    assert len(text(found, stream)) == size
    assert getattr(found.usage, stream) == size


def test_cpus_slow_down_and_end_nothing(subject: Subject) -> None:
    code = "import time; b, u = time.monotonic(), time.process_time()\nwhile time.monotonic() - b < 1: pass\n"
    code += "print((time.process_time() - u) / (time.monotonic() - b))"
    found = subject.run("python3", "-c", code, policy="python", limits={"cpus": 0.25})
    assert outcome(found).cause == "exited"
    assert float(text(found)) < 0.4
    assert found.limits_reached == []


def test_a_wall_that_passes_takes_everything_with_it(subject: Subject) -> None:
    code = "trap '' TERM INT HUP; (trap '' TERM; sleep 50) & setsid sleep 50 & while :; do sleep 1; done"
    found = subject.hold(Case(sh(code), request={"limits": {"wall": 0.3}}, cause="wall_time",
                              reached={"wall": True}))  # fmt: skip
    assert found.usage is not None
    assert found.usage.wall < subject.seconds(0.3 + 5) * 1e6
