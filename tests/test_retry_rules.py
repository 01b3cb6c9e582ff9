"""What follows an attempt, for any course of attempts: no oftener than the policy says, and of its causes."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.models import Cause, FailedAttempt, Failure, Narrowing, Outcome, Request, signal_name
from sandboxd.narrowing import make_plan
from sandboxd.plan import ImageRef, Plan, make_shape
from sandboxd.policy import load_policies
from sandboxd.retries import Retries

if TYPE_CHECKING:
    from sandboxd.policy.schema import PolicyFile

TEXT = """
limits: {memory: 64MiB, wall: 10s, cpu_time: 5s, workspace: {size: 8MiB}, tmp: {size: 8MiB},
         stdout: {size: 1MiB, on_limit: kill}, stderr: {size: 1MiB}}
retry:
  failed: 2
  on: [engine]
  memory: {times: 1, raise: {memory: 128MiB}}
  wall_time: {times: 2, raise: {wall: 20s, cpu_time: 6s}}
  exited: {times: 3, codes: [69, 75], raise: {stderr: 2MiB}}
  signalled: {signals: [SIGSEGV, SIGBUS]}
  output: {times: 2, raise: {stdout: 4MiB}}
"""
TIMES = {"failed": 2, "memory": 1, "wall_time": 2, "exited": 3, "signalled": 1, "output": 2}


@cache
def made(text: str, **lowered: int) -> tuple[PolicyFile, Plan]:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "p.yaml").write_text(f"version: 1\nname: p\n{text}")
        policy = load_policies([Path(directory)]).get("p")
    request = Request(argv=["x"], limits=Narrowing(**lowered))
    return policy.spec, make_plan(policy, make_shape(policy, ImageRef("base", "sha256:0")), request)


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    cause = draw(st.sampled_from(list(Cause)))
    fields: dict[str, Any] = {}
    if cause is Cause.EXITED:
        fields["exit_code"] = draw(st.sampled_from([0, 1, 69, 75, 255]))
    elif cause is Cause.SIGNALLED:
        fields["signal"] = draw(st.sampled_from([7, 9, 11, 15, 35]))
        fields["signal_name"] = signal_name(fields["signal"])
    elif cause is Cause.FAILED:
        code = draw(st.sampled_from(["engine", "host", "internal"]))
        fields["error"] = Failure(code=code, message="m")
    elif cause is Cause.WALL_TIME and draw(st.booleans()):
        fields["evidence"] = {"deadline": 1}
    return Outcome(cause=cause, message="m", **fields)


def named(outcome: Outcome) -> bool:
    """Whether the policy above names an end, said again in other words."""
    match outcome:
        case Outcome(cause=Cause.EXITED, exit_code=code):
            return code in {69, 75}
        case Outcome(cause=Cause.SIGNALLED, signal=number):
            return number in {7, 11}
        case Outcome(cause=Cause.FAILED, error=Failure(code=code)):
            return code == "engine"
        case Outcome(cause=Cause.WALL_TIME):
            return not outcome.evidence
        case _:
            return outcome.cause in {Cause.MEMORY, Cause.OUTPUT}


@given(st.lists(st.tuples(outcomes(), st.booleans()), max_size=20))
def test_a_call_is_tried_again_by_the_rule_and_no_oftener(course: list[tuple[Outcome, bool]]) -> None:
    spec, plan = made(TEXT)
    retries, counts = Retries(spec.retry), Counter[str]()
    before: list[FailedAttempt] = []
    first = plan
    for outcome, signalled in course:
        again = retries.after(outcome, plan, before, handed_over=True, signalled=signalled)
        cause = outcome.cause.value
        asked_for = signalled and cause in {"exited", "signalled"}
        wanted = named(outcome) and not asked_for and counts[cause] < TIMES[cause]
        assert (again is not None) is wanted
        if again is None:
            return
        counts[cause] += 1
        now, then = again.plan.limits, plan.limits
        assert all(
            getattr(now, name) >= getattr(then, name) for name in ("memory", "wall", "stdout", "stderr")
        )
        assert {name: getattr(now, name) for name in again.raised} == again.raised
        assert now == again.plan.shape.limits
        before.append(
            FailedAttempt(
                number=len(before) + 1,
                ended=1,
                plan=plan.digest,
                raised=again.raised,
                **outcome.model_dump(include={"cause", "message", "exit_code", "signal", "signal_name"}),
            )
        )
        plan = again.plan
        # a later daemon, which has what was recorded alone, comes to the same plan
        assert retries.resumed(first, before).digest == plan.digest


@pytest.mark.parametrize("handed_over", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_with_a_network_no_cause_is_tried_again_that_may_have_done_harm(
    *, safe: bool, handed_over: bool
) -> None:
    spec, plan = made(TEXT)
    assert spec.retry is not None
    networked = replace(plan, shape=replace(plan.shape, host_network=True))
    rule = spec.retry.model_copy(update={"safe": safe})
    for outcome in (
        Outcome(cause=Cause.EXITED, message="", exit_code=75),
        Outcome(cause=Cause.SIGNALLED, message="", signal=11, signal_name="SIGSEGV"),
        Outcome(cause=Cause.OUTPUT, message=""),
        Outcome(cause=Cause.FAILED, message="", error=Failure(code="engine", message="")),
    ):
        again = Retries(rule).after(outcome, networked, [], handed_over=handed_over)
        assert (again is not None) is (safe or not handed_over), outcome.cause
    streamed = replace(plan, command=replace(plan.command, stdin="stream"))
    assert Retries(rule).after(outcome, streamed, [], handed_over=True) is None


@pytest.mark.parametrize(
    ("lowered", "cause", "tried"),
    [
        ({"stdout": 1024}, Cause.OUTPUT, False),
        ({"stderr": 1024}, Cause.OUTPUT, True),
        ({"stderr": 1024}, Cause.EXITED, False),
        ({"wall": 10**6}, Cause.WALL_TIME, False),
        ({"memory": 2**25}, Cause.OUTPUT, True),
        ({"memory": 2**25}, Cause.MEMORY, False),
    ],
)
def test_what_a_request_lowered_is_not_raised_for_any_cause(
    lowered: dict[str, int], cause: Cause, *, tried: bool
) -> None:
    spec, plan = made(TEXT, **lowered)
    outcome = Outcome(cause=cause, message="", exit_code=75 if cause is Cause.EXITED else None)
    assert (Retries(spec.retry).after(outcome, plan, [], handed_over=True) is not None) is tried


def test_what_was_raised_for_a_status_is_not_when_the_policy_names_it_no_more() -> None:
    spec, plan = made(TEXT)
    failed = FailedAttempt(
        number=1,
        ended=1,
        plan=plan.digest,
        cause=Cause.EXITED,
        message="",
        exit_code=75,
        raised={"stderr": 2**21},
    )
    assert Retries(spec.retry).resumed(plan, [failed]).limits.stderr == 2**21
    other, _ = made(TEXT.replace("69, 75", "69"))
    assert Retries(other.retry).resumed(plan, [failed]).limits.stderr == 2**20
    assert Retries(None).resumed(plan, [failed]) == plan
