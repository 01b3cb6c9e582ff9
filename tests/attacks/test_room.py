"""One caller fills what the daemon holds for all of them: queue places, inputs, bodies that never end."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import anyio
import pytest
from acting import acting_as

from sandboxd import errors
from sandboxd.room import Held, Room
from sandboxd.scheduler import Scheduler, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

MEBI = 2**20
CONFIG = "budget: {inputs: 8MiB, slots: 1}\n"


def _fill_up(held: Held) -> None:
    for _ in range(1000):
        try:
            held.grow(MEBI)
        except errors.QueueFull:
            return
    pytest.fail("the room has no end")


def test_however_many_fill_their_part_there_is_some_for_one_more() -> None:
    room = Room(1000 * MEBI)
    taken = []
    for uid in range(4):
        held = Held(room, uid)
        _fill_up(held)
        taken.append(held)
    Held(room, 99).grow(0)
    taken[0].release()
    Held(room, 99).grow(200 * MEBI)


def test_what_is_larger_than_the_room_is_taken_when_nobody_else_holds_anything() -> None:
    room = Room(MEBI)
    with room.held(1) as held:
        held.grow(3 * MEBI)
        with pytest.raises(errors.QueueFull):
            Held(room, 2).grow(1)
    Held(room, 2).grow(1)


async def _fill(scheduler: Scheduler, uid: int, tasks: anyio.abc.TaskGroup) -> int:
    async def wait() -> None:
        async with scheduler.admitted(Ticket(uid, 1)):
            await anyio.sleep_forever()

    for count in range(1000):
        try:
            scheduler.check_room(uid)
        except errors.QueueFull:
            return count
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
    pytest.fail("the queue has no end")


def test_one_caller_cannot_take_every_place_of_the_queue() -> None:
    async def attack() -> None:
        scheduler = Scheduler(memory=100, slots=1, queue=100)
        async with anyio.create_task_group() as tasks:
            assert 70 <= await _fill(scheduler, 1, tasks) <= 90
            assert 5 <= await _fill(scheduler, 2, tasks) < 20
            scheduler.check_room(3)
            assert scheduler.queued < 100
            tasks.cancel_scope.cancel()

    anyio.run(attack)


def test_inputs_of_waiting_calls_do_not_fill_the_daemons_memory(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory(config=CONFIG)
    client = daemon.client()
    ids = [client.start(["sleep", "50"]).id]
    large = b"x" * MEBI
    refused = 0
    for _ in range(12):
        try:
            ids.append(client.start(["true"], stdin=large).id)
        except errors.QueueFull:
            refused += 1
    assert refused in range(4, 9)
    ids.append(client.start(["true"]).id)  # it brings nothing, so nothing is in its way
    for each in reversed(ids):
        client.cancel(each)
    again = client.run(["wc", "-c"], stdin=large)
    assert again.stdout is not None
    assert again.stdout.text == f"{MEBI}\n"


def _begin(daemon: Daemon, stack: ExitStack, size: int) -> socket.socket:
    """A request whose body is announced and sent up to ``size`` bytes, and then no further."""
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.settimeout(20)
    sock.connect(str(daemon.socket))
    head = "POST /v1/invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {60 * MEBI}\r\n\r\n".encode() + b" " * size)
    return sock


def test_bodies_that_never_end_do_not_fill_the_daemons_memory(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=CONFIG)
    with ExitStack() as stack:
        slow = [_begin(daemon, stack, MEBI) for _ in range(12)]
        refused = 0
        for sock in slow:
            sock.settimeout(0.5)
            try:
                answer = sock.recv(4096)
            except TimeoutError:
                continue
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "queue_full"
            refused += 1
        assert refused in range(4, 9)
    done = daemon.run("true")
    assert done.outcome is not None
    assert done.outcome.cause == "exited"


def test_agents_that_hold_every_connection_do_not_keep_an_operator_out(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory(
        config="http: {connections: 4, connections_per_uid: 4}\ncallers:\n"
        "  - {match: {uid: 0}, role: operator}\n  - {match: {gid: 0}, role: agent}\n"
    )
    with ExitStack() as stack:
        daemon.admit_everybody()
        with acting_as(65_534):
            held = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(5)]
            for sock in held:
                sock.connect(str(daemon.socket))
        held[-1].settimeout(5)
        assert held[-1].recv(4096).startswith(b"HTTP/1.1 503 ")
        assert daemon.client().health().status == "ready"
