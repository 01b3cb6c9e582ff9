"""The pool: a call in a container that has waited comes to what it comes to in one that is made for it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.conformance.case import Case, outcome, sh, text
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.policies import PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Invocation

pytestmark = needs("a daemon of the suite's own")

CASES = {
    "output": Case(sh("id; pwd; umask; ls -A / /tmp /dev /workspace; cat /proc/self/limits; env | sort")),
    "a signal": Case(sh("kill -TERM $$"), cause="signalled", signal=15),
    "no program": Case(["no-such-program"], cause="exec_failed", errno="ENOENT"),
    "memory": Case(sh("tail /dev/zero; echo $?"), stdout="137\n", reached={"memory": False}),
    "inputs and artifacts": Case(sh("mkdir out; sort in > out/a; cat out/a"), policy="files", stdout="a\nb\n",
                                 request={"inputs": {"in": "b\na\n"}}),
    "narrowed": Case(sh("true"), request={"limits": {"memory": "32MiB", "pids": 5, "cpus": 0.5}}),
    "denied": Case(sh("unshare -U true; exit 3"), code=3),
}  # fmt: skip


@pytest.fixture(scope="module")
def cold(subject: Subject) -> Any:
    """A second daemon, whose containers are all made for their call."""
    from sandboxd.conformance.subject import open_subject  # noqa: PLC0415

    with open_subject(subject.options, config="pool: {min: 0, max: 0}\n", share=2) as running:
        yield running


def waited(found: Invocation) -> bool:
    assert found.receipt is not None, found.outcome
    return found.receipt.read_at < found.times.accepted


def filled(subject: Subject, policy: str) -> None:
    """Wait until a container waits for a policy."""

    def waits() -> bool:
        return any(one.state == "waiting" and one.policy == PREFIX + policy for one in subject.client.slots())

    if not waits():
        subject.run("true", policy=policy)
        subject.until(waits, f"a container waits for {policy}")


def seen(found: Invocation) -> dict[str, Any]:
    """All that a caller sees, but for times, ids, and what names the one container."""
    assert found.receipt is not None
    own = ("mount ", "user", "group", "parent", "processes")
    return {
        "outcome": outcome(found).model_dump(exclude={"evidence"}),
        "stdout": text(found),
        "stderr": text(found, "stderr"),
        "denials": found.denials,
        "limits": [(one.limit, one.ended) for one in found.limits_reached],
        "artifacts": found.artifacts,
        "controls": {
            one.name: (one.asked, one.in_force)
            for one in found.receipt.controls
            if not one.name.startswith(own) and "namespace" not in one.name
        },
        "lines": [one.name for one in found.receipt.controls],
    }


@pytest.mark.parametrize("what", CASES)
def test_a_warm_call_is_as_a_cold_one(subject: Subject, cold: Subject, what: str) -> None:
    case = CASES[what]
    one = cold.hold(case)
    filled(subject, case.policy)
    other = subject.hold(case)
    assert (waited(one), waited(other)) == (False, True)
    assert seen(one) == seen(other)


def test_usage_counts_from_hand_over(subject: Subject) -> None:
    filled(subject, "plain")
    time.sleep(0.3)
    found = subject.run("true")
    assert waited(found)
    assert found.usage is not None
    assert found.usage.wall < subject.seconds(0.25) * 1e6


def test_no_container_is_used_twice(subject: Subject) -> None:
    with ThreadPoolExecutor(8) as threads:
        calls = list(threads.map(lambda _: subject.run("sh", "-c", "ls -A /tmp; touch /tmp/x"), range(32)))
    assert [outcome(call) for call in calls if (outcome(call).exit_code, text(call)) != (0, "")] == []
    processes = [
        one.in_force
        for call in calls
        if call.receipt
        for one in call.receipt.controls
        if one.name == "processes"
    ]
    assert len(set(processes)) == 32


def test_a_changed_policy_is_in_force_for_the_next_call(
    another: Callable[[str], Subject],
) -> None:
    own = another("pool: {min: 1, max: 1}\n")
    filled(own, "plain")
    file = own.directory / "policies" / f"{PREFIX}plain.yaml"
    file.write_text(file.read_text().replace("pids: 32", "pids: 31"))

    def pids() -> str:
        receipt = own.run("true").receipt
        assert receipt is not None
        return next(one.in_force for one in receipt.controls if one.name == "pids")

    own.until(lambda: pids() == "31", "the edit is in force")
