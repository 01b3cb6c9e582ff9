"""One call, one outcome: keys, attempts that follow one another, many calls in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import errors
from sandboxd.conformance.case import outcome, text
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.policies import PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import BatchResult

MIB = 2**20
# what it writes before it needs more than it has says whether it began anew
EATS = "[ -e seen ] && echo dirty; touch seen; cat in; x=$(head -c 120M /dev/zero | tr '\\0' a); echo ${#x}"


def test_a_key_with_another_request_says_what_differs(subject: Subject) -> None:
    fields: dict[str, Any] = {"key": f"differs {subject.directory.name}", "env": {"TOKEN": "hush-1"}}
    first = subject.run("true", **fields)
    assert subject.run("true", **fields).id == first.id
    with pytest.raises(errors.KeyConflict) as caught:
        subject.run("echo", "x", **fields | {"env": {"TOKEN": "hush-2"}})
    assert [each["field"] for each in caught.value.details["differs"]] == ["argv", "env.TOKEN"]
    assert "hush" not in str(caught.value.details)


def test_another_attempt_has_what_was_raised_and_starts_from_the_same_inputs(subject: Subject) -> None:
    found = subject.run("sh", "-c", EATS, policy="patient", inputs={"in": "in\n"})
    assert (outcome(found).exit_code, found.attempts) == (0, 2)
    assert text(found) == f"in\nin\n{120 * MIB}\n"
    [failed] = found.retried
    assert (failed.cause, failed.stdout, failed.raised) == ("memory", 3, {"memory": 256 * MIB})
    assert found.receipt is not None
    [memory] = [each for each in found.receipt.controls if each.name == "memory"]
    assert memory.in_force == str(256 * MIB)
    with subject.client.events(found.id) as events:
        told = list(events)
    assert [event.seq for event in told] == list(range(1, len(told) + 1))
    assert [event.type for event in told].count("retry") == 1


def test_what_the_request_lowered_is_not_raised(subject: Subject) -> None:
    found = subject.run("sh", "-c", EATS, policy="patient", inputs={"in": ""}, limits={"memory": "64MiB"})
    assert (outcome(found).cause, found.attempts) == ("memory", 1)


def test_a_batch_answers_each(subject: Subject) -> None:
    plain = PREFIX + "plain"
    requests: list[dict[str, Any]] = [
        {"argv": ["sh", "-c", f"exit {number}"], "policy": plain} for number in range(4)
    ]
    requests.append({"argv": [], "policy": plain})
    with subject.client.batch(requests, parallel=2) as results:
        found = {each.index: each for each in results}
    ended = [each for n in range(4) if (each := found[n].invocation) is not None]
    assert [outcome(each).exit_code for each in ended] == [0, 1, 2, 3]
    assert found[4].problem is not None
    assert found[4].problem.code == "invalid_request"


@needs("a daemon of the suite's own")
def test_a_batch_goes_on_with_the_next_daemon(another: Callable[[str], Subject]) -> None:
    own = another("pool: {min: 0, max: 0}\nbudget: {slots: 1}\nqueue: 2\n")
    more: dict[str, Any] = {"policy": PREFIX + "plain", "labels": {"of": "batch"}}
    requests = [more | {"argv": ["sh", "-c", f"sleep 0.3; exit {number}"]} for number in range(8)]
    found: list[BatchResult] = []
    with own.client.batch(requests, parallel=4) as results:  # more than the queue has places for
        found += [next(results) for _ in range(2)]
        assert own.process is not None
        own.process.kill()
        own.process.wait(timeout=own.seconds(60))
        own.launch()
        found += list(results)
    assert sorted(each.index for each in found) == list(range(8))
    assert len(own.client.list(label="of=batch").invocations) == 8  # each of them once
    ends = {each.index: outcome(each.invocation) for each in found if each.invocation is not None}
    assert len(ends) == 8
    done = {index: end.exit_code for index, end in ends.items() if end.cause == "exited"}
    assert all(index == code for index, code in done.items())
    assert len(done) >= 7  # but for the one that ran
    own.stop()
