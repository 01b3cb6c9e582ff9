"""System calls inside a real container: every number, every ABI, and what no policy can allow."""

from __future__ import annotations

import errno
import platform
import time
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE

from sandboxd.models import Cause
from sandboxd.policy import abi, seccomp

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon
    from programs import Programs

    from sandboxd.models import Invocation

    Probe = Callable[..., tuple[dict[str, str], Invocation]]

NATIVE = abi.native()
LAST = 480
POLICIES = {"bare": "strict", "default": "default", "build": "build"}
"""Policies and the base of each. ``bare`` is ``strict`` with time and processes for a sweep."""


@pytest.fixture(scope="module", autouse=True)
def bare(daemon: Daemon) -> None:
    text = (
        "version: 1\nname: bare\nextends: default\nimage: base\nsyscalls: {base: strict}\n"
        "limits: {wall: 60s, pids: 64}\n"
    )
    (daemon.policies / "bare.yaml").write_text(text)
    end = time.monotonic() + 10
    while "bare" not in {policy.name for policy in daemon.client().policies()}:
        assert time.monotonic() < end
        time.sleep(0.05)


def counted(found: Invocation) -> dict[str, int]:
    return {denial.name: denial.count for denial in found.denials}


@pytest.mark.parametrize("arg", ["0", "0xffffffffffffffff"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_number_is_answered_as_the_policy_says(probe: Probe, policy: str, arg: str) -> None:
    results, found = probe("sweep", "0", str(LAST), arg, policy=policy)
    assert [int(number) for number in results] == list(range(LAST + 1))
    program = seccomp.compile_filter(seccomp.resolve(POLICIES[policy], [], []))
    denied = counted(found)
    unfiltered = {NATIVE.numbers.get(name) for name in abi.UNFILTERED}
    expected = {}
    for number in range(LAST + 1):
        if number in unfiltered:
            continue
        verdict = program.judge(number, (int(arg, 0),) * 6)
        result = results[str(number)]
        if verdict == "denied":
            expected[number] = NATIVE.names.get(number, f"#{number}")
            assert int(result) == seccomp.errno_for(number, NATIVE.audit), number
        elif verdict == "enosys":
            assert int(result) == errno.ENOSYS, number
    assert denied == dict.fromkeys(expected.values(), 1)
    for denial in found.denials:
        number = next(number for number, name in expected.items() if name == denial.name)
        assert denial.errno == errno.errorcode[seccomp.errno_for(number, NATIVE.audit)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 alone has these ABIs")
@pytest.mark.parametrize("policy", POLICIES)
def test_the_32_bit_abi_is_closed_and_reported(probe: Probe, policy: str) -> None:
    results, found = probe("sweep", "1", "60", "0", "int80", policy=policy)
    if set(results.values()) == {"gone"}:
        return  # a kernel without 32-bit emulation: the instruction faults
    assert set(results.values()) == {str(errno.ENOSYS)}
    denied = counted(found)
    assert denied["i386:mount"] == 1
    assert sum(denied.values()) == 60
    assert {name.partition(":")[0] for name in denied} == {"i386"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 alone has this ABI")
def test_the_x32_abi_is_closed_and_reported(probe: Probe) -> None:
    first = 0x40000000
    results, found = probe("sweep", str(first), str(first + 40), "0", policy="build")
    assert set(results.values()) == {str(errno.ENOSYS)}
    assert {denial.name.partition(":")[0] for denial in found.denials} == {"x32"}
    assert sum(counted(found).values()) == 41


@pytest.mark.parametrize("policy", POLICIES)
def test_what_no_policy_allows_is_refused_and_reported_by_name(probe: Probe, policy: str) -> None:
    results, found = probe("refused", policy=policy)
    assert results.pop("clone3") == "ENOSYS"  # a probe of libc, not an attempt
    assert set(results.values()) == {"EPERM"}, results
    assert len(results) >= 50
    assert counted(found) == dict.fromkeys(results, 1)
    details = {denial.name: denial.detail for denial in found.denials}
    assert details["unshare"] == details["clone"].replace("clone", "unshare") == "unshare(CLONE_NEWUSER)"
    assert {denial.errno for denial in found.denials} == {"EPERM"}
    assert {denial.kind for denial in found.denials} == {"syscall"}


def test_denials_are_events_too(daemon: Daemon, programs: Programs) -> None:
    client = daemon.client()
    with client.stream(["./refused"], inputs=programs.input("refused")) as stream:
        events = list(stream)
    last = events[-1].invocation
    assert last is not None
    assert [event.denial for event in events if event.denial] == last.denials
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


def test_a_flood_of_denied_calls_stalls_only_itself(daemon: Daemon, programs: Programs) -> None:
    client = daemon.client()
    began = time.monotonic()
    flood = client.start(["./flood", "1000000"], inputs=programs.input("flood"), limits={"wall": "2s"})
    time.sleep(0.3)
    for _ in range(5):
        at = time.monotonic()
        beside = daemon.run("sh", "-c", "echo well")
        assert beside.stdout is not None
        assert beside.stdout.text == "well\n"
        assert time.monotonic() - at < 2 * PATIENCE
    ended = client.wait(flood.id, timeout=20 * PATIENCE)
    assert time.monotonic() - began < 12 * PATIENCE
    assert ended.outcome is not None
    assert ended.outcome.cause is Cause.WALL_TIME
    (denial,) = ended.denials
    assert denial.name == "ptrace"
    assert 100 < denial.count < 1_000_000


def test_many_different_denied_calls_are_bounded(probe: Probe) -> None:
    _, found = probe("flood", "numbers")
    assert 500 < len(found.denials) <= 1100
    assert sum(denial.count for denial in found.denials) == 1500
    assert found.outcome is not None
    assert found.outcome.exit_code == 0


def test_a_filter_of_the_tools_own_cannot_widen_it(probe: Probe) -> None:
    results, _ = probe("own_filter")
    assert results == {"listener": "EPERM", "allow all": "0", "mount": "EPERM", "unshare": "EPERM"}
