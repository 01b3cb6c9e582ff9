"""The pipes between a tool and its spool: real pipes, written and read from the other end."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from sandboxd import errors
from sandboxd.supervisor.streams import CHUNK, PIPE_SIZE, OutputPipe, Stdin

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = os.getuid(), os.getgid()


def kept(pieces: list[bytes]) -> Callable[[memoryview], None]:
    """A sink that keeps what it gets."""
    return lambda data: pieces.append(bytes(data))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_output_comes_whole_and_in_chunks() -> None:
    got: list[bytes] = []
    pipe = OutputPipe(*IDS, kept(got))
    data = os.urandom(3 * PIPE_SIZE)
    inner = os.dup(pipe.inner)

    def write() -> None:
        with os.fdopen(inner, "wb") as file:
            file.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    pipe.handed_over()
    with anyio.fail_after(10):
        await pipe.finished()
    writer.join()
    assert b"".join(got) == data
    assert max(map(len, got)) <= CHUNK
    pipe.close()


@pytest.mark.anyio
async def test_the_pipe_ends_with_its_last_writer() -> None:
    pipe = OutputPipe(*IDS, lambda _: None)
    other = os.dup(pipe.inner)
    pipe.handed_over()
    with anyio.move_on_after(0.1) as scope:
        await pipe.finished()
    assert scope.cancelled_caught
    os.close(other)
    with anyio.fail_after(5):
        await pipe.finished()


@pytest.mark.anyio
async def test_stdin_is_pulled_and_can_be_sent_again() -> None:
    stdin = Stdin()
    read = stdin.open(*IDS)
    assert await stdin.write(0, b"abc") == 3
    assert await stdin.write(1, b"bcde") == 5
    with pytest.raises(errors.StateConflict) as caught:
        await stdin.write(9, b"x")
    assert caught.value.details["offset"] == 5
    await stdin.finish()
    with pytest.raises(errors.StateConflict):
        await stdin.write(5, b"late")
    assert await stdin.write(0, b"abc") == 5  # nothing new in it
    assert os.read(read, 100) == b"abcde"
    assert os.read(read, 100) == b""
    os.close(read)
    stdin.close()


@pytest.mark.anyio
async def test_a_writer_waits_for_room_and_is_told_when_the_call_ends() -> None:
    stdin = Stdin()
    read = stdin.open(*IDS)
    caught: list[errors.StateConflict] = []

    async def write() -> None:
        try:
            await stdin.write(0, bytes(2 * PIPE_SIZE))
        except errors.StateConflict as error:
            caught.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        await anyio.wait_all_tasks_blocked()
        assert stdin.offset == PIPE_SIZE
        stdin.close()
    assert caught[0].details["offset"] == PIPE_SIZE
    os.close(read)


@pytest.mark.anyio
async def test_a_tool_that_closed_its_stdin_takes_everything() -> None:
    stdin = Stdin()
    os.close(stdin.open(*IDS))
    assert await stdin.write(0, bytes(4 * PIPE_SIZE)) == 4 * PIPE_SIZE
    await stdin.finish()


@pytest.mark.anyio
async def test_who_writes_before_the_start_waits_for_it() -> None:
    stdin = Stdin()
    with anyio.move_on_after(0.05) as scope:
        await stdin.write(0, b"early")
    assert scope.cancelled_caught
    stdin.close()
    with pytest.raises(errors.StateConflict):
        await stdin.write(0, b"never")


async def test_many_small_pieces_are_gathered_and_none_is_lost() -> None:
    pieces: list[bytes] = []
    pipe = OutputPipe(os.getuid(), os.getgid(), kept(pieces))
    for number in range(3000):
        os.write(pipe.inner, b"%04d" % number)
        await anyio.lowlevel.checkpoint()
    pipe.handed_over()
    await pipe.finished()
    assert b"".join(pieces) == b"".join(b"%04d" % number for number in range(3000))
    assert len(pieces) < 1000


async def test_a_pipe_that_gathers_can_be_closed() -> None:
    pieces: list[bytes] = []
    pipe = OutputPipe(os.getuid(), os.getgid(), kept(pieces))
    for _ in range(200):
        os.write(pipe.inner, b"x")
        await anyio.lowlevel.checkpoint()
    pipe.close()
    await pipe.finished()
    await anyio.sleep(0.01)
    assert len(pieces) < 200


@pytest.mark.parametrize("first", [0, 1])
async def test_what_was_written_first_is_read_first(first: int) -> None:
    got: list[bytes] = []
    pipes: list[OutputPipe] = []

    def sink(data: memoryview) -> None:
        got.append(bytes(data))
        if bytes(data) == b"a":  # while the loop is busy with this, the tool goes on
            os.write(pipes[1 - first].inner, b"b")
            os.write(pipes[first].inner, b"c")
            for pipe in pipes:
                pipe.handed_over()

    pipes += [OutputPipe(*IDS, sink), OutputPipe(*IDS, sink)]
    os.write(pipes[first].inner, b"a")
    with anyio.fail_after(5):
        for pipe in pipes:
            await pipe.finished()
    assert got == [b"a", b"b", b"c"]


async def test_what_is_left_when_the_writer_is_gone_is_read() -> None:
    pieces: list[bytes] = []
    pipe = OutputPipe(*IDS, kept(pieces))
    os.write(pipe.inner, bytes(2 * CHUNK + 5))
    pipe.handed_over()
    with anyio.fail_after(5):
        await pipe.finished()
    assert list(map(len, pieces)) == [CHUNK, CHUNK, 5]
