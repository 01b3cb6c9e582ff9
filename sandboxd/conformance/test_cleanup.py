"""Cleanup: however a call, or its daemon, ends, nothing of it is left on the host. Runs last."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.conformance.case import outcome, text
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.subject import MARK
from sandboxd.conformance.traces import Traces, mounts_naming, processes_with

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Invocation

pytestmark = needs("the engine's processes on this host")

STUBBORN = """
trap '' TERM HUP INT
for n in 1 2 3; do setsid sh -c 'trap "" TERM HUP; while :; do sleep 1; done' & done
"""
ENDINGS = {
    # how the call ends: the rest of its script, its limits, what is done to it
    "exit": ("sleep 0.5; exit 0", {}, ""),
    "a signal": ("sleep 0.5; kill -KILL $$", {}, ""),
    "wall": ("while :; do sleep 1; done", {"wall": 0.5}, ""),
    "memory": ("sleep 0.5; while :; do x=$x$x.; done", {}, ""),
    "cancel": ("while :; do sleep 1; done", {}, "cancel"),
}


def start(subject: Subject, rest: str, **fields: Any) -> tuple[Invocation, Traces]:
    """A call with orphans that ignore signals, and what it has on the host."""
    word = f"conformance-{uuid.uuid4().hex}"
    call = subject.start("bash", "-c", STUBBORN + rest, word, **fields)
    found: list[Traces] = []

    def there() -> bool:
        try:
            found[:] = [Traces.of(word)]
        except LookupError:
            return False
        return len(found[0].processes) >= 4

    subject.until(there, "its processes run")
    traces = found[0]
    assert len(traces.namespaces) == 6
    assert traces.cgroups
    return call, traces


def gone(subject: Subject, traces: Traces) -> None:
    subject.until(lambda: not traces.left(), "everything is gone")


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_of_a_call_is_left(subject: Subject, ending: str) -> None:
    rest, limits, then = ENDINGS[ending]
    call, traces = start(
        subject, rest, limits={name: subject.duration(value) for name, value in limits.items()}
    )
    if then == "cancel":
        subject.client.cancel(call.id)
    subject.wait(call)
    gone(subject, traces)


@needs("a daemon of the suite's own")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_nothing_of_a_daemon_is_left(another: Callable[[str], Subject], number: int) -> None:
    own = another("pool: {min: 1, max: 2}\n")
    call, traces = start(own, "while :; do sleep 1; done", key="again")
    assert own.process is not None
    own.process.send_signal(number)
    if number == signal.SIGTERM:
        own.until(lambda: own.client.health().status == "draining", "it drains")
        own.process.send_signal(number)  # the second one cancels what runs
    own.process.wait(timeout=own.seconds(60))
    if number == signal.SIGTERM:
        gone(own, traces)
    else:
        own.until(
            lambda: not [line for line in traces.left() if line.startswith("process")], "all have ended"
        )
        own.launch()
        gone(own, traces)
        ended = outcome(own.client.get(call.id))
        assert (ended.cause, ended.error.code) == ("failed", "interrupted")
        again = own.start("bash", "-c", "true", key="other")
        assert outcome(own.wait(again)).exit_code == 0
        own.stop()
    mark = f"{MARK}={own.directory.name}"
    own.until(lambda: not processes_with(mark), f"no process is left: {processes_with(mark)}")
    assert mounts_naming(own.directory.name) == []


@needs("a daemon of the suite's own")
def test_nothing_of_the_whole_run_is_left(subject: Subject) -> None:
    """The daemon that all tests have used; so this is the last one."""
    call, traces = start(subject, "while :; do sleep 1; done")
    subject.client.cancel(call.id)
    subject.wait(call)
    trees = {path.parent for path in traces.cgroups}
    assert text(subject.run("echo", "alive")) == "alive\n"
    health = subject.client.health()
    subject.until(lambda: subject.client.health().running == 0, "the last turn is over")
    assert (health.queued, [str(one) for one in health.problems]) == (0, [])
    assert subject.stop() == 0
    mark = f"{MARK}={subject.directory.name}"
    subject.until(lambda: not processes_with(mark), f"no process is left: {processes_with(mark)}")
    assert mounts_naming(subject.directory.name) == []
    gone(subject, traces)
    own = {tree for tree in trees if tree.name.startswith("sandboxd")}  # and not an engine's
    assert [child for tree in own if tree.exists() for child in tree.iterdir() if child.is_dir()] == []
    assert [place for tree in own if (place := Path("/run", tree.name)).exists()] == []
