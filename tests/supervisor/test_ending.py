"""Classification is total: each ending with each evidence has one outcome, or is a failure of ours."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.engine.probe import probe_shape
from sandboxd.models import Cause
from sandboxd.supervisor.ending import (
    CommandFailed,
    Deadline,
    Ended,
    Ending,
    Evidence,
    Lost,
    Stopped,
    classify,
    limits_reached,
)

WHY = ("wall", "deadline", "cpu_time", "stdout", "stderr", "cancelled")
LIMITS = replace(probe_shape().limits, cpu_time=2_000_000)
NOTHING = Evidence(
    oom_kills=0,
    pids_denied=0,
    cpu_total=0,
    stdout_dropped=0,
    stderr_dropped=0,
    workspace_full=False,
    workspace_inodes_gone=False,
    tmp_full=False,
)

exits = st.integers(0, 255).map(lambda code: Ended(code << 8))
deaths = st.tuples(st.integers(1, 64), st.booleans()).map(lambda pair: Ended(pair[0] | pair[1] << 7))
endings: st.SearchStrategy[Ending] = st.one_of(
    exits,
    deaths,
    st.integers(1, 133).map(CommandFailed),
    st.sampled_from(WHY).map(Stopped),  # type: ignore[arg-type]
    st.text(max_size=20).map(Lost),
)
counts = st.integers(0, 3)
evidences = st.builds(
    Evidence,
    oom_kills=counts,
    pids_denied=counts,
    cpu_total=st.integers(0, 10**9),
    stdout_dropped=counts,
    stderr_dropped=counts,
    workspace_full=st.booleans(),
    workspace_inodes_gone=st.booleans(),
    tmp_full=st.booleans(),
)


def test_every_way_to_be_stopped_is_known() -> None:
    assert set(get_args(get_type_hints(Stopped)["why"])) == set(WHY)


deadlines = st.none() | st.builds(Deadline, at=st.floats(0, 1e9), asked=st.integers(1, 10**12))


@given(ending=endings, evidence=evidences, deadline=deadlines)
def test_each_combination_has_one_outcome(
    ending: Ending, evidence: Evidence, deadline: Deadline | None
) -> None:
    outcome = classify(ending, evidence, LIMITS, "tool", deadline)
    if outcome is None:
        assert isinstance(ending, Lost)
        assert evidence.oom_kills == 0
        return
    assert outcome.cause not in {Cause.DENIED, Cause.FAILED}
    assert outcome.message.endswith(".")
    assert 0 <= outcome.exit_status() <= 255
    assert (outcome.exit_code is not None) == (outcome.cause is Cause.EXITED)
    assert (outcome.signal is not None) == (outcome.cause is Cause.SIGNALLED)
    assert (outcome.errno is not None) == (outcome.cause is Cause.EXEC_FAILED)
    assert outcome.error is None


@given(ending=endings, evidence=evidences)
def test_memory_is_what_the_kernel_counted_and_nothing_else(ending: Ending, evidence: Evidence) -> None:
    outcome = classify(ending, evidence, LIMITS, "tool", None)
    killed = evidence.oom_kills > 0 and (
        isinstance(ending, Lost) or (isinstance(ending, Ended) and ending.status != 0)
    )
    assert (outcome is not None and outcome.cause is Cause.MEMORY) == killed


@given(ending=endings, evidence=evidences)
def test_what_ended_a_call_is_among_the_limits_that_were_reached(ending: Ending, evidence: Evidence) -> None:
    outcome = classify(ending, evidence, LIMITS, "tool", None)
    reached = limits_reached(ending, evidence, LIMITS, None)
    names = [limit.limit for limit in reached]
    assert len(names) == len(set(names))
    ended = {limit.limit for limit in reached if limit.ended}
    if outcome is not None and outcome.cause is Cause.MEMORY:
        assert "memory" in ended
    if isinstance(ending, Stopped) and ending.why != "cancelled":
        assert ended == {ending.why}
    for limit, count in (("pids", evidence.pids_denied), ("memory", evidence.oom_kills)):
        assert (limit in names) == (count > 0)


def test_a_deadline_is_told_as_it_was_asked() -> None:
    deadline = Deadline(at=0.0, asked=1_500_000)
    outcome = classify(Stopped("deadline"), NOTHING, LIMITS, "tool", deadline)
    assert outcome is not None
    assert outcome.evidence["deadline"] == 1_500_000
    assert "1500ms" in outcome.message
    [limit] = limits_reached(Stopped("deadline"), NOTHING, LIMITS, deadline)
    assert (limit.limit, limit.value, limit.ended) == ("deadline", 1_500_000, True)


def test_a_status_of_137_without_an_oom_kill_is_no_memory_limit() -> None:
    outcome = classify(Ended(137 << 8), NOTHING, LIMITS, "tool", None)
    assert outcome is not None
    assert (outcome.cause, outcome.exit_code) == ("exited", 137)
    killed = classify(Ended(signal.SIGKILL), NOTHING, LIMITS, "tool", None)
    assert killed is not None
    assert (killed.cause, killed.signal_name, killed.exit_status()) == ("signalled", "SIGKILL", 137)


def test_an_oom_kill_that_the_command_survived_is_a_limit_reached_and_not_its_end() -> None:
    evidence = replace(NOTHING, oom_kills=1)
    outcome = classify(Ended(0), evidence, LIMITS, "tool", None)
    assert outcome is not None
    assert outcome.exit_code == 0
    [limit] = limits_reached(Ended(0), evidence, LIMITS, None)
    assert (limit.limit, limit.ended, limit.count) == ("memory", False, 1)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.E2BIG, errno.ELOOP])
def test_a_command_that_cannot_be_executed_says_why(number: int) -> None:
    outcome = classify(CommandFailed(number), NOTHING, LIMITS, "tool", None)
    assert outcome is not None
    assert outcome.errno == errno.errorcode[number]
    assert "'tool'" in outcome.message
    assert outcome.exit_status() == (127 if number == errno.ENOENT else 126)


def test_statuses_are_those_of_wait() -> None:
    for code in (0, 1, 255):
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {code}"], {})
        _, status = os.waitpid(pid, 0)
        outcome = classify(Ended(status), NOTHING, LIMITS, "sh", None)
        assert outcome is not None
        assert outcome.exit_code == code
