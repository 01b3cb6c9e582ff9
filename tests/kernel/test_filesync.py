"""A file is synced beside the event loop: by the kernel, by a thread where it refuses, never too early."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.kernel import filesync
from sandboxd.kernel.filesync import FileSync

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["kernel", "thread"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether this host's kernel has a queue for us; without the numbers of its calls it has none."""
    kind: str = request.param
    if kind == "thread":
        monkeypatch.setattr(filesync, "NUMBERS", {})
    return kind


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


async def test_what_was_written_is_synced(kind: str, file: int) -> None:
    with FileSync(file) as sync:
        assert (sync._kernel is not None) == (kind == "kernel")
        for number in range(20):
            os.pwrite(file, b"x" * 4096, number * 4096)
            await sync.synced()


async def test_one_sync_serves_all_who_ask_before_it_begins(kind: str, file: int) -> None:
    begun = 0
    with FileSync(file) as sync:
        begin = sync._begin

        def counted() -> None:
            nonlocal begun
            begun += 1
            begin()

        sync._begin = counted  # type: ignore[method-assign]
        await asyncio.gather(*(sync.synced() for _ in range(100)))
    assert begun == 2  # the first went at once, the others together


async def test_who_asks_while_one_runs_waits_for_the_next(kind: str, file: int) -> None:
    """What is written after a sync has begun may not be in it."""
    with FileSync(file) as sync:
        first = asyncio.ensure_future(sync.synced())
        await asyncio.sleep(0)
        second = asyncio.ensure_future(sync.synced())
        await first
        assert not second.done()
        await second


async def test_a_sync_that_fails_is_told(kind: str) -> None:
    read, write = os.pipe()  # has nothing to sync: EINVAL, fdatasync(2)
    try:
        with FileSync(write) as sync:
            with pytest.raises(OSError) as caught:
                await sync.synced()
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(OSError):
                await sync.synced()
    finally:
        os.close(read)
        os.close(write)


async def test_a_task_that_is_cancelled_takes_nothing_from_the_others(kind: str, file: int) -> None:
    with FileSync(file) as sync:
        tasks = [asyncio.ensure_future(sync.synced()) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[3].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in done] == [
        asyncio.CancelledError, type(None), type(None), asyncio.CancelledError, type(None)
    ]  # fmt: skip


def opened() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


async def test_nothing_is_left_open(kind: str, file: int) -> None:
    before = opened()
    for _ in range(5):
        with FileSync(file) as sync:
            await sync.synced()
    assert opened() <= before
