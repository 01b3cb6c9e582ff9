"""Clients across a daemon that is killed and started again: nothing is lost, nothing is told or run twice."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from daemons import RUN_IN_SANDBOX, until

from sandboxd import AsyncClient, Client, errors, models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import Event, Invocation

ONE = "budget: {slots: 1}\n"
COUNT = "i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"
AGAIN = "version: 1\nname: again\nextends: default\nretry: {failed: 1, backoff: 50ms..50ms}\n"


class Waiting(threading.Thread):
    """Something that blocks, beside the test; ``result`` joins it."""

    def __init__(self, what: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._what = what
        self._found: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._what()
        except BaseException as error:  # noqa: BLE001 - told by ``result``
            self._error = error

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._found


def cause(found: Invocation) -> str:
    assert found.outcome is not None
    return found.outcome.cause


def whole(events: list[Event]) -> None:
    """Numbered once, without a gap, and offsets likewise."""
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    at = {"stdout": 0, "stderr": 0}
    for event in events:
        if event.type == "output":
            assert event.stream is not None
            assert event.data is not None
            assert event.offset == at[event.stream]
            at[event.stream] += len(event.data.decode())


def start(daemon_factory: Callable[..., Daemon], **fields: Any) -> Daemon:
    """A daemon on the same socket as the one before."""
    daemon = daemon_factory(config=ONE, **fields)
    (daemon.policies / "again.yaml").write_text(AGAIN)
    until(lambda: "again" in [each.name for each in daemon.client().policies()], "the policy is loaded")
    return daemon


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_stream_goes_on_after_kill_9(daemon_factory: Callable[..., Daemon], kind: str) -> None:
    first = start(daemon_factory)
    argv = ["sh", "-c", COUNT]
    seen: list[Event] = []

    async def stream() -> None:
        nonlocal seen
        async with await AsyncClient(first.socket).stream(argv, policy="again", key="s") as events:
            async for event in events:
                seen += [event]

    def streamed() -> None:
        if kind == "async":
            anyio.run(stream)
        else:
            with first.client().stream(argv, policy="again", key="s") as events:
                seen.extend(iter(events))

    waiting = Waiting(streamed)
    if kind == "sync":
        until(lambda: first.client().list(state="running").invocations, "it runs")
        time.sleep(0.3)
    else:
        until(lambda: any(event.type == "output" for event in seen), "there is output")
    first.stop(signal.SIGKILL)
    second = start(daemon_factory, state=first.state)
    waiting.result()
    whole(seen)
    types = [event.type for event in seen]
    assert types.count("retry") == 1
    ended = seen[-1].invocation
    assert ended is not None
    assert (cause(ended), ended.attempts) == ("exited", 2)
    text = "".join((event.data.text or "") for event in seen if event.data)
    [failed] = ended.retried
    assert text[failed.stdout :] == "".join(f"line {n}\n" for n in range(30))
    with second.client().events(ended.id) as events:
        assert [event.seq for event in events] == [event.seq for event in seen]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_who_waits_gets_the_outcome_that_the_next_daemon_gave(
    daemon_factory: Callable[..., Daemon], kind: str
) -> None:
    first = start(daemon_factory)

    def run(**fields: Any) -> Callable[[], Invocation]:
        if kind == "sync":
            return lambda: first.client().run(["sleep", "1000"], **fields)
        return lambda: anyio.run(lambda: AsyncClient(first.socket).run(["sleep", "1000"], **fields))

    tied = Waiting(run())
    until(lambda: first.client().list(state="running").invocations, "it runs")
    queued = Waiting(run(limits={"wall": "1s"}, key="queued"))
    until(lambda: first.client().list(state="queued").invocations, "the other waits")
    time.sleep(0.3)  # the heads of their answers have come
    first.stop(signal.SIGKILL)
    second = start(daemon_factory, state=first.state)
    found = tied.result()
    assert cause(found) == "failed"
    assert found.outcome.error.code == "interrupted"
    found = queued.result()
    assert (cause(found), found.attempts) == ("wall_time", 1)
    assert second.client().run(["sleep", "1000"], limits={"wall": "1s"}, key="queued").id == found.id


def test_the_command_line_goes_on_after_kill_9_and_loses_nothing(
    daemon_factory: Callable[..., Daemon],
) -> None:
    first = start(daemon_factory)
    options = ["--socket", str(first.socket), "--key", "k", "--policy", "again"]
    command: list[Any] = [RUN_IN_SANDBOX, *options, "--"]
    process = subprocess.Popen([*command, "sh", "-c", COUNT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: first.client().list(state="running").invocations, "it runs")
    time.sleep(0.4)
    first.stop(signal.SIGKILL)
    second = start(daemon_factory, state=first.state)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert b"the daemon went away" in stderr
    [call] = second.client().list(policy="again").invocations
    assert stdout == b"".join(second.client().stdout(call.id))
    assert stdout.endswith(b"".join(b"line %d\n" % n for n in range(30)))


def test_a_tied_command_of_a_dead_daemon_says_how_it_ended(daemon_factory: Callable[..., Daemon]) -> None:
    first = start(daemon_factory)
    process = subprocess.Popen(
        [RUN_IN_SANDBOX, "--socket", first.socket, "--", "sh", "-c", "echo up; sleep 1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    until(lambda: first.client().list(state="running").invocations, "it runs")
    time.sleep(0.3)
    first.stop(signal.SIGKILL)
    start(daemon_factory, state=first.state)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (125, b"up\n")
    assert b"failed: the daemon ended while the call was in flight" in stderr


def test_a_queued_call_survives_a_graceful_restart_for_who_waits_for_it(
    daemon_factory: Callable[..., Daemon],
) -> None:
    first = start(daemon_factory)
    client = first.client()
    blocker = client.start(["sleep", "1000"])
    waiting = Waiting(lambda: client.run(["echo", "late"], key="late"))
    until(lambda: client.list(state="queued").invocations, "it waits")
    time.sleep(0.3)
    first.process.send_signal(signal.SIGTERM)
    until(lambda: client.health().status == "draining", "it drains")
    first.stop(signal.SIGTERM)
    start(daemon_factory, state=first.state)
    found = waiting.result()
    assert found.stdout.text == "late\n"
    assert cause(client.get(blocker.id)) == "cancelled"


def test_a_daemon_that_does_not_come_back_is_given_up(daemon_factory: Callable[..., Daemon]) -> None:
    first = start(daemon_factory)
    client = Client(first.socket, reconnect=1.0)
    waiting = Waiting(lambda: client.run(["sleep", "1000"], key="k"))
    until(lambda: first.client().list(state="running").invocations, "it runs")
    time.sleep(0.3)
    first.stop(signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(errors.Unavailable):
        waiting.result()
    assert time.monotonic() - began < 20
    with pytest.raises(errors.Unavailable):  # and nobody waits for one that was never there
        Client(first.socket).run(["true"], key="k2")


def test_input_that_a_dead_daemon_had_reaches_the_next(daemon_factory: Callable[..., Daemon]) -> None:
    first = start(daemon_factory)
    client = first.client()
    client.start(["sleep", "1000"])
    data = bytes(range(256)) * 12_000  # more than is kept at once
    process = subprocess.Popen(
        [RUN_IN_SANDBOX, "--socket", str(first.socket), "--key", "fed", "-i", "--", "cksum"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    fed = Waiting(lambda: process.communicate(data, timeout=60))
    until(lambda: client.list(state="queued").invocations, "it waits")
    time.sleep(0.5)  # the first of its input is on its way
    first.stop(signal.SIGKILL)
    start(daemon_factory, state=first.state)
    stdout, stderr = fed.result()
    assert process.returncode == 0, stderr
    wanted = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout
    assert stdout == wanted


REQUESTS: list[dict[str, Any]] = [
    {"argv": ["sh", "-c", f"sleep 0.2; exit {number}"], "labels": {"of": "batch"}} for number in range(12)
]
KEYED = [request | {"policy": "again", "key": f"b{number}"} for number, request in enumerate(REQUESTS)]


def told(client: Client, found: dict[int, Invocation]) -> list[int]:
    """Numbers of requests whose calls the first daemon took along; all others did what was asked, once."""
    assert sorted(found) == list(range(12))
    assert len(client.list(label="of=batch", limit=100).invocations) == 12  # nothing ran twice
    lost = []
    for number, call in found.items():
        assert call.outcome is not None
        if cause(call) == "failed":
            assert call.outcome.error is not None
            assert call.outcome.error.code == "interrupted"
            lost.append(number)
        else:
            assert (cause(call), call.outcome.exit_code) == ("exited", number)
    return lost


@pytest.mark.parametrize(("kind", "keyed"), [("sync", True), ("async", False)])
def test_a_batch_goes_on_after_kill_9(
    daemon_factory: Callable[..., Daemon], kind: str, *, keyed: bool
) -> None:
    first = start(daemon_factory)
    requests = KEYED if keyed else REQUESTS
    seen: list[Any] = []

    async def run() -> None:
        async with await AsyncClient(first.socket).batch(requests, parallel=4) as results:
            async for result in results:
                seen.append(result)  # noqa: PERF401 - others look at it meanwhile

    def ran() -> None:
        if kind == "async":
            anyio.run(run)
        else:
            with first.client().batch(requests, parallel=4) as results:
                seen.extend(iter(results))

    waiting = Waiting(ran)
    until(lambda: len(first.client().list(label="of=batch", cause="exited").invocations) >= 2, "some ended")
    first.stop(signal.SIGKILL)
    second = start(daemon_factory, state=first.state)
    waiting.result()
    assert len(seen) == 12  # none is told twice
    lost = told(second.client(), {result.index: result.invocation for result in seen})
    assert len(lost) <= (0 if keyed else 1)  # the one that ran


def test_a_batch_of_the_command_line_goes_on_after_kill_9(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    first = start(daemon_factory)
    file = tmp_path / "batch"
    file.write_text("".join(f"{json.dumps(request)}\n" for request in KEYED))
    command: list[Any] = [RUN_IN_SANDBOX, "--socket", first.socket, "--batch", file, "--parallel", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: len(first.client().list(label="of=batch", cause="exited").invocations) >= 2, "some ended")
    first.stop(signal.SIGKILL)
    second = start(daemon_factory, state=first.state)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == b"run-in-sandbox: the daemon went away; waiting for it\n"
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert len(lines) == 12
    found = {line["index"]: models.Invocation.model_validate(line["invocation"]) for line in lines}
    assert told(second.client(), found) == []


def test_a_batch_goes_on_after_a_graceful_restart(daemon_factory: Callable[..., Daemon]) -> None:
    first = start(daemon_factory)
    client = first.client()

    def ran() -> list[Any]:
        with client.batch(REQUESTS, parallel=4) as results:
            return list(results)

    waiting = Waiting(ran)
    until(lambda: len(client.list(label="of=batch", cause="exited").invocations) >= 2, "some ended")
    first.stop(signal.SIGTERM)
    second = start(daemon_factory, state=first.state)
    seen = waiting.result()
    assert len(seen) == 12
    assert told(second.client(), {result.index: result.invocation for result in seen}) == []


def test_who_leaves_a_batch_of_a_client_takes_its_calls_along(daemon_factory: Callable[..., Daemon]) -> None:
    client = start(daemon_factory).client()
    sleeping = {"argv": ["sleep", "1000"], "labels": {"of": "batch"}}
    with client.batch([*([sleeping] * 3), sleeping | {"key": "own"}], parallel=4):
        until(lambda: len(client.list(label="of=batch").invocations) == 4, "all wait or run")
    until(lambda: len(client.list(label="of=batch", cause="cancelled").invocations) == 3, "they are gone")
    [left] = [one for one in client.list(label="of=batch").invocations if one.state != "ended"]
    assert left.key == "own"
    client.cancel(left.id)
