"""A consumer that knows the last event it took, and goes on from there."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import until

from sandboxd import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

SOON = 20.0
"""Seconds: a client of this test looks for a daemon that went away for longer."""
PATIENT = 3 * SOON
KINDS = pytest.mark.parametrize("kind", ["sync", "async"])


def types(daemon: Daemon, kind: str, id_: str, after: int, reconnect: float = PATIENT) -> list[str]:
    """What is read of a call's events, within ``SOON``."""

    async def read() -> list[str]:
        with anyio.fail_after(SOON):
            client = AsyncClient(daemon.socket, reconnect=reconnect)
            async with await client.events(id_, after=after) as events:
                return [str(event.type) async for event in events]

    if kind == "async":
        return anyio.run(read)
    began = time.monotonic()
    with Client(daemon.socket, reconnect=reconnect).events(id_, after=after) as events:
        found = [str(event.type) for event in events]
    assert time.monotonic() - began < SOON
    return found


@KINDS
def test_who_has_all_events_gets_none(daemon: Daemon, kind: str) -> None:
    call = daemon.client().run(["echo", "x"])
    with daemon.client().events(call.id) as events:
        last = [event.seq for event in events][-1]
    assert types(daemon, kind, call.id, last) == []
    assert types(daemon, kind, call.id, last + 1000) == []
    assert types(daemon, kind, call.id, last, reconnect=0) == []  # this looks for no other daemon
    assert types(daemon, kind, call.id, last - 1) == ["ended"]
    assert [event.seq for event in daemon.client().events(call.id, after=last, follow=False)] == []


@KINDS
def test_a_number_that_no_event_of_a_running_call_will_have(daemon: Daemon, kind: str) -> None:
    call = daemon.client().start(["sh", "-c", "cat; echo x"], stdin="stream")
    found: list[list[str]] = []
    reader = threading.Thread(target=lambda: found.append(types(daemon, kind, call.id, 1000)))
    reader.start()
    until(lambda: daemon.client().get(call.id).state == "running", "it runs")
    time.sleep(0.3)  # the reader waits for its events
    assert reader.is_alive()
    daemon.client().write_stdin(call.id, b"", eof=True)
    reader.join(SOON)
    assert not reader.is_alive()
    assert found == [[]]


@KINDS
def test_a_reader_at_the_end_of_what_runs_goes_on_with_the_next_daemon(
    daemon_factory: Callable[..., Daemon], kind: str
) -> None:
    """The empty answer of a daemon that stops is no end: the call goes on to its own with the next."""
    first = daemon_factory(config="budget: {slots: 1}\n")
    client = first.client()
    running = client.start(["sleep", "50"])
    until(lambda: client.get(running.id).state == "running", "it runs")
    waiting = client.start(["echo", "x"])  # is left to the next daemon
    with client.events(waiting.id, follow=False) as events:
        last = [event.seq for event in events][-1]
    found: list[list[str]] = []
    reader = threading.Thread(target=lambda: found.append(types(first, kind, waiting.id, last)))
    reader.start()
    time.sleep(0.5)
    stopper = threading.Thread(target=first.stop)
    stopper.start()
    until(lambda: client.health().status == "draining", "it stops")
    client.cancel(running.id)
    stopper.join(SOON)
    daemon_factory(config="budget: {slots: 1}\n", state=first.state)
    reader.join(SOON)
    assert not reader.is_alive()
    assert found[0][-1] == "ended"
    assert "started" in found[0]
