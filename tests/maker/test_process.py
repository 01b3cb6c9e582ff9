"""The daemon and the process of its engine: what goes between them, and what each is without the other."""

from __future__ import annotations

import fcntl
import os
import pickle
import resource
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import slots_of, until

from sandboxd import errors
from sandboxd.engine.probe import probe_shape
from sandboxd.kernel.notify import NotifyServer
from sandboxd.maker.channel import Channel, failure, raised
from sandboxd.maker.transfer import unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    made = [Channel(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    yield made[0], made[1]
    for one in made:
        one.close()


def open_descriptors() -> set[str]:
    return {one.name for one in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("size", [0, 100, 300_000, 3 << 20])
def test_a_message_comes_whole_with_its_descriptors(ends: tuple[Channel, Channel], size: int) -> None:
    reader, writer = os.pipe()
    try:
        anyio.run(ends[0].send, b"x" * size, [writer])
        received = ends[1].receive()
        assert received is not None
        message, [fd] = received
        assert message == b"x" * size
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.write(fd, b"through")
        os.close(fd)
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
        os.close(writer)


def test_who_sends_waits_for_who_does_not_read(ends: tuple[Channel, Channel]) -> None:
    async def flood() -> int:
        sent = 0
        with anyio.move_on_after(0.5):
            while True:
                await ends[0].send(b"x" * 100_000)
                sent += 1
        return sent

    sent = anyio.run(flood)
    for _ in range(sent):
        received = ends[1].receive()
        assert received is not None
        assert len(received[0]) == 100_000
    with pytest.raises(BlockingIOError):
        ends[1].receive()


def test_any_number_of_tasks_wait_for_who_does_not_read(ends: tuple[Channel, Channel]) -> None:
    async def flood(sent: list[int]) -> None:
        while True:
            await ends[0].send(b"x" * 100_000)
            sent.append(1)

    async def both() -> int:
        sent: list[int] = []
        with anyio.move_on_after(0.5):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(flood, sent)
        return len(sent)

    for _ in range(anyio.run(both)):
        assert ends[1].receive() is not None
    with pytest.raises(BlockingIOError):
        ends[1].receive()


def test_a_message_for_whose_descriptors_there_is_no_room_comes_without(
    ends: tuple[Channel, Channel],
) -> None:
    before = open_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    anyio.run(ends[0].send, "twelve", [0] * 12)
    os.close(free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 4, limits[1]))
    try:
        received = ends[1].receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert received == ("twelve", [])
    assert open_descriptors() == before


@pytest.mark.parametrize(("came", "error"), [(12, RuntimeError), (0, errors.HostFailed)])
def test_a_slot_that_cannot_be_taken_leaves_no_descriptor(came: int, error: type[Exception]) -> None:
    server = NotifyServer()
    server.close()
    before = open_descriptors()
    fds = [os.dup(0) for _ in range(came)]
    data = pickle.dumps(([], [False, False], 0, None))
    with pytest.raises(error):
        unpack(data, fds, probe_shape(), server)
    assert open_descriptors() == before


def test_the_end_is_told(ends: tuple[Channel, Channel]) -> None:
    ends[0].close()
    assert ends[1].receive() is None
    with pytest.raises(OSError, match="pipe"):
        anyio.run(ends[1].send, "anybody?")


@pytest.mark.parametrize(
    "error",
    [
        errors.EngineFailed("no container"),
        errors.ControlNotEnforced("not as asked", control="memory", asked="1", in_force="2"),
        errors.NotFound("no image", image="base"),
    ],
)
def test_an_error_of_ours_is_the_same_one_at_the_other_end(error: errors.SandboxdError) -> None:
    found = raised(*failure(error))
    assert (type(found), str(found), found.details) == (type(error), str(error), error.details)


def test_any_other_error_is_one_that_a_call_can_end_with() -> None:
    assert isinstance(raised(*failure(OSError(28, "No space left on device"))), errors.HostFailed)
    assert isinstance(raised(*failure(KeyError("x"))), errors.EngineFailed)


def test_a_policy_of_any_size_has_its_slot(daemon_factory: Callable[..., Daemon], tmp_path: Path) -> None:
    """Much environment and as many host paths as there may be: a long request, and a long answer."""
    daemon = daemon_factory()
    lines = ["version: 1", "name: large", "extends: tiny", "process:", "  env:"]
    lines += [f"    V{number}: {'x' * 7000}" for number in range(100)]
    lines.append("mounts:")
    for number in range(64):
        lent = tmp_path / f"{number}-{'n' * 200}"
        lent.mkdir()
        lines.append(f"  - {{source: {lent}, target: /{number}-{'t' * 200}}}")
    (daemon.policies / "large.yaml").write_text("\n".join(lines) + "\n")
    until(lambda: "large" in {one.name for one in daemon.client().policies()}, "the policy is there")
    found = daemon.run("sh", "-c", "echo ${#V99}; ls -d /63-*", policy="large")
    assert found.stdout is not None, found.outcome
    assert found.stdout.text == f"7000\n/63-{'t' * 200}\n", found.stderr


def test_an_engine_that_stands_still_delays_calls_and_loses_none(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory()
    assert daemon.run("true").outcome is not None
    os.kill(daemon.engine, signal.SIGSTOP)
    try:
        client = daemon.client()
        ids = [client.start(["echo", str(number)], policy="tiny").id for number in range(4)]
        gone = client.start(["echo", "late"], policy="tiny", deadline="300ms").id
        assert client.health().status == "ready"
        time.sleep(0.5)  # its deadline passes
    finally:
        os.kill(daemon.engine, signal.SIGCONT)
    for number, one in enumerate(ids):
        ended = client.wait(one, timeout=30.0)
        assert ended.stdout is not None, ended.outcome
        assert ended.stdout.text == f"{number}\n"
    assert client.wait(gone, timeout=30.0).outcome.cause == "wall_time"  # type: ignore[union-attr]
    until(lambda: not slots_of(daemon), "no container is left")
