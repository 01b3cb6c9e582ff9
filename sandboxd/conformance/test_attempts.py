"""One call, one outcome: keys, attempts that follow one another, many calls in one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import errors
from sandboxd.conformance.case import outcome, text
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.policies import PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import BatchResult, Invocation

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


# what an attempt before it left would be seen
ANEW = "[ -e seen ] && echo dirty; mkdir -p out; echo $$ > out/pid; touch seen; cat in; "
ENDS = {
    "a status that is named": (f"{ANEW} exit 75", "in\nin\nin\n", [75, 75], []),
    "another status": (f"{ANEW} exit 76", "in\n", [], []),
    "a success": (f"{ANEW} exit 0", "in\n", [], []),
    "a signal that is named": (f"{ANEW} kill -SEGV $$; sleep 60", "in\nin\n", [], ["SIGSEGV"]),
    "another signal": (f"{ANEW} kill -TERM $$; sleep 60", "in\n", [], []),
}


@pytest.mark.parametrize("what", ENDS)
def test_ends_of_the_tools_own_are_tried_again_where_the_policy_names_them(
    subject: Subject, what: str
) -> None:
    script, written, codes, signals = ENDS[what]
    session = subject.client.create_session()
    subject.run("sh", "-c", "echo in > in", session=session.id)
    found = subject.run("sh", "-c", script, policy="again", session=session.id)
    assert text(found) == written
    assert [each.exit_code for each in found.retried if each.cause == "exited"] == codes
    assert [each.signal_name for each in found.retried if each.cause == "signalled"] == signals
    assert found.attempts == len(found.retried) + 1
    assert [each.path for each in found.artifacts] == ["out/pid"]  # once, of the last
    left = subject.client.session_files(session.id)
    kept = outcome(found).cause == "exited"
    assert ("seen" in [each.path for each in left.files]) is kept
    history = subject.client.checkpoints(session.id)
    assert len(history.checkpoints) == (3 if kept else 2)
    subject.client.delete_session(session.id)


def test_output_over_its_limit_is_tried_again_with_more(subject: Subject) -> None:
    found = subject.run("sh", "-c", "head -c 40000 /dev/zero; sleep 1", policy="again")
    assert (outcome(found).cause, found.attempts) == ("exited", 2)
    [failed] = found.retried
    assert (failed.cause, failed.stdout, failed.raised) == ("output", 16384, {"stdout": 65536})
    assert found.stdout is not None
    assert found.stdout.size == 16384 + 40000
    found = subject.run("sh", "-c", "head -c 100000 /dev/zero; sleep 60", policy="again")
    assert (outcome(found).cause, found.attempts) == ("output", 2)
    lowered = subject.run(
        "sh", "-c", "head -c 40000 /dev/zero; sleep 60", policy="again", limits={"stdout": "8KiB"}
    )
    assert (outcome(lowered).cause, lowered.attempts) == ("output", 1)


def is_up(subject: Subject, call: Invocation) -> bool:
    stdout = subject.client.get(call.id).stdout
    return stdout is not None and stdout.size == len("up\n")


def test_a_signal_that_the_caller_sent_is_not_tried_again(subject: Subject) -> None:
    script = "trap 'exit 75' TERM; echo up; while :; do sleep 0.1; done"
    for sent, cause in (("SIGTERM", "exited"), ("SIGSEGV", "signalled")):
        call = subject.start("sh", "-c", script, policy="again")
        subject.until(partial(is_up, subject, call), "it is up")
        subject.client.signal(call.id, sent)
        found = subject.wait(call)
        assert (outcome(found).cause, found.attempts) == (cause, 1)


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
