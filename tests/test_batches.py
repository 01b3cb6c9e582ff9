"""Batches that are larger than the queue: they pace themselves, and take nobody's place."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from daemons import until

from sandboxd.client import transport, wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

OTHER = 54_321
NARROW = (
    "budget: {slots: 2}\ncallers:\n  - {match: {uid: 0}, role: operator, queued: 3, concurrent: 1}\n"
    f"  - {{match: {{uid: {OTHER}}}, role: agent}}\n"
)


def opened(daemon: Daemon, requests: list[Any], parallel: int, **more: Any) -> transport.Answer:
    body = json.dumps({"requests": requests, "parallel": parallel, **more}).encode()
    exchange = wire.Exchange("POST", "/v1/batches", body, waits=True)
    return transport.exchange([str(daemon.socket)], exchange, connect_timeout=5, timeout=60)


def batch(daemon: Daemon, requests: list[Any], parallel: int, **more: Any) -> dict[int, dict[str, Any]]:
    """What came of each request, by its number."""
    with opened(daemon, requests, parallel, **more) as answer:
        lines = [json.loads(line) for line in answer.lines()]
    assert len(lines) == len(requests)
    return {line["index"]: line for line in lines}


def test_a_batch_is_held_back_by_its_callers_limits_and_not_refused(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory(config=NARROW)
    requests = [{"argv": ["sh", "-c", f"exit {number % 7}"]} for number in range(24)]
    found = batch(daemon, requests, 24)
    codes = {index: line["invocation"]["outcome"]["exit_code"] for index, line in found.items()}
    assert codes == {number: number % 7 for number in range(24)}
    accepted = sorted(found, key=lambda index: found[index]["invocation"]["id"])
    assert accepted == list(range(24))  # in their order
    assert not (daemon.client().health().queued)


def test_one_of_the_whole_queues_size_is_too(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="budget: {slots: 2}\nqueue: 4\n")
    found = batch(daemon, [{"argv": ["true"]}] * 20, 20)
    assert {line["invocation"]["outcome"]["cause"] for line in found.values()} == {"exited"}


def test_what_is_held_back_takes_nobodys_place(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="budget: {slots: 1}\nqueue: 5\n" + NARROW.partition("\n")[2])
    daemon.admit_everybody()
    client = daemon.client()
    lines: list[dict[str, Any]] = []

    def read() -> None:
        lines.extend(batch(daemon, [{"argv": ["sleep", "0.2"]}] * 14, 14).values())

    reading = threading.Thread(target=read)
    reading.start()
    until(lambda: client.health().queued == 3, "as many wait as may")
    os.seteuid(OTHER)
    try:
        theirs = [client.run(["true"]) for _ in range(3)]
    finally:
        os.seteuid(0)
    reading.join(60)
    started = sorted(line["invocation"]["times"]["started"] for line in lines)
    assert len(started) == 14
    for one in theirs:
        assert one.outcome is not None
        assert one.outcome.cause == "exited"
        assert one.times.started is not None
        between = [each for each in started if one.times.accepted < each < one.times.started]
        assert len(between) <= 1  # theirs was next, whatever the batch holds back
    assert any(each > theirs[-1].times.accepted for each in started)


def test_a_request_waits_for_room_no_longer_than_its_deadline(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=NARROW)
    client = daemon.client()
    blockers = [client.start(["sleep", "1000"]).id for _ in range(4)]
    until(lambda: client.health().queued == 3, "the queue is full")
    began = time.monotonic()
    found = batch(daemon, [{"argv": ["true"], "deadline": "300ms"}] * 3, 3)
    assert 0.3 <= time.monotonic() - began < 20
    assert {line["problem"]["code"] for line in found.values()} == {"queue_full"}
    assert len(client.list(limit=100).invocations) == len(blockers)
    for each in reversed(blockers):
        client.cancel(each)


def test_who_leaves_while_it_is_held_back_begins_nothing_more(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=NARROW)
    client = daemon.client()
    blockers = [client.start(["sleep", "1000"]).id for _ in range(4)]
    requests = [{"argv": ["true"]}, {"argv": ["true"], "key": "k"}, {"argv": ["true"]}]
    with opened(daemon, requests, 3):
        time.sleep(1)
    time.sleep(0.2)
    for each in reversed(blockers):
        client.cancel(each)
    time.sleep(2)
    assert len(client.list(limit=100).invocations) == len(blockers)


def test_a_key_may_be_tied_to_who_asks(daemon: Daemon) -> None:
    client = daemon.client()
    requests = [
        {"argv": ["sleep", "50"], "labels": {"of": "tied"}, "key": key} for key in ("tied", "not-tied")
    ]
    with opened(daemon, requests, 2, tied=[0]):
        until(lambda: len(client.list(label="of=tied").invocations) == 2, "both are there")
    until(lambda: client.list(label="of=tied", cause="cancelled").invocations, "one has ended")
    states = {one.key: one.state for one in client.list(label="of=tied").invocations}
    assert states["tied"] == "ended"
    assert states["not-tied"] != "ended"
    client.run(["sleep", "50"], labels={"of": "tied"}, key="tied")  # its outcome stays
    client.cancel(next(one.id for one in client.list(label="of=tied").invocations if one.key == "not-tied"))
