"""Output on disk: numbered once, bounded, read again from any number."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd import errors, models
from sandboxd.journal.spool import Spool, Stream

if TYPE_CHECKING:
    from pathlib import Path

CAPS: dict[Stream, int] = {"stdout": 1 << 20, "stderr": 1 << 20}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def event(kind: str, **more: object) -> models.Event:
    return models.Event.model_validate({"seq": 0, "at": 5, "type": kind, **more})


async def everything(spool: Spool, after: int = 0) -> list[models.Event]:
    return [found async for found in spool.follow(after)]


async def everything_now(spool: Spool) -> list[models.Event]:
    return [found async for found in spool.follow(0, wait=False)]


def output(events: list[models.Event], stream: str) -> bytes:
    found = b""
    for each in events:
        if each.stream == stream:
            assert each.offset == len(found)
            assert each.data is not None
            found += each.data.decode()
    return found


async def test_a_call_from_start_to_end_and_again(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", CAPS)
    assert spool.add(event("accepted", id="x")).seq == 1
    spool.append("stdout", b"one\n")
    spool.append("stderr", b"two\n")
    spool.append("stdout", b"three\n")
    denial = {"kind": "syscall", "name": "mount", "count": 1}
    spool.add(event("denied", denial=denial))
    spool.append("stdout", b"\xff\xfe")
    spool.add(event("ended"))
    spool.close(durable=True)
    spool.close(durable=True)
    for reader in (spool, Spool.open(tmp_path / "c"), Spool.recover(tmp_path / "c", CAPS)):
        events = await everything(reader)
        assert [each.seq for each in events] == list(range(1, 8))
        assert [each.type for each in events] == [
            "accepted", "output", "output", "output", "denied", "output", "ended"
        ]  # fmt: skip
        assert output(events, "stdout") == b"one\nthree\n\xff\xfe"
        assert output(events, "stderr") == b"two\n"
        assert events[4].denial is not None
        assert await everything(reader, 4) == events[4:]
        assert await everything(reader, 99) == []
        content = reader.content("stdout")
        assert content.decode() == b"one\nthree\n\xff\xfe"
        assert content.digest == "sha256:" + hashlib.sha256(b"one\nthree\n\xff\xfe").hexdigest()
        assert (content.size, content.complete, content.truncated) == (12, True, False)
        assert reader.content("stderr").text == "two\n"
        assert b"".join([data async for data in reader.follow_bytes("stdout", 4)]) == b"three\n\xff\xfe"


async def test_bytes_over_the_cap_are_counted_and_dropped(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", {"stdout": 10, "stderr": 0})
    assert spool.append("stdout", b"123456") == 6
    assert spool.append("stdout", b"789012") == 4
    assert spool.append("stderr", b"x") == 0
    spool.close(durable=False)
    for reader in (spool, Spool.open(tmp_path / "c")):
        content = reader.content("stdout")
        assert (content.text, content.size, content.dropped, content.truncated) == ("1234567890", 10, 2, True)
        assert reader.content("stderr").dropped == 1


async def test_heads_and_events_do_not_cut_characters(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", CAPS)
    text = "é€😀" * 30_000
    spool.append("stdout", text.encode())
    spool.close(durable=False)
    events = await everything(spool)
    assert len(events) > 3
    assert all(each.data is not None and each.data.text is not None for each in events)
    assert all(each.data is not None and len(each.data.decode()) <= 65536 for each in events)
    assert output(events, "stdout").decode() == text
    for head in range(1, 12):
        content = spool.content("stdout", head)
        assert content.text is not None
        assert text.startswith(content.text)
        assert len(content.text.encode()) > head - 4
        assert not content.complete


async def test_readers_follow_while_it_runs_and_a_stalled_one_costs_nothing(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", {"stdout": 8 << 20, "stderr": 0})
    seen: list[list[models.Event]] = [[], []]
    raw: list[bytes] = []
    stalled = spool.follow(0)

    async def follow(into: list[models.Event]) -> None:
        into.extend([found async for found in spool.follow(0)])

    async def follow_raw() -> None:
        raw.extend([data async for data in spool.follow_bytes("stdout")])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow, seen[0])
        tasks.start_soon(follow, seen[1])
        tasks.start_soon(follow_raw)
        written = b""
        for number in range(200):
            chunk = b"%d," % number * (number * 10 + 1)
            written += chunk
            spool.append("stdout", chunk)
            if number == 0:
                await anyio.sleep(0.01)
                first = await anext(stalled)
            if number % 7 == 0:
                await anyio.lowlevel.checkpoint()
        spool.add(event("ended"))
        spool.close(durable=False)
    assert seen[0] == seen[1] == await everything(Spool.open(tmp_path / "c"))
    assert output(seen[0], "stdout") == b"".join(raw) == written
    assert seen[0][0] == first
    assert first.data is not None
    assert first.data.decode() == b"0,"
    rest = [found async for found in stalled]
    assert [first, *rest] == seen[0]


async def test_one_byte_at_a_time_keeps_the_index_small(tmp_path: Path) -> None:
    """With a reader that asks at once, and both streams by turns: the worst for the index."""
    spool = Spool.create(tmp_path / "c", CAPS)
    seen: list[models.Event] = []

    async def follow() -> None:
        seen.extend([found async for found in spool.follow(0)])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        started = time.monotonic()
        for number in range(15_000):
            spool.append("stdout", b"o")
            spool.append("stderr", b"e")
            if number % 3 == 0:
                await anyio.lowlevel.checkpoint()
        elapsed = time.monotonic() - started
        spool.add(event("ended"))
        spool.close(durable=False)
    assert output(seen, "stdout") == b"o" * 15_000
    assert output(seen, "stderr") == b"e" * 15_000
    assert len(seen) < 4096 + 2 * (elapsed / 0.02 + 15_000 / 4096 + 2) + 2
    assert [each.seq for each in seen] == list(range(1, len(seen) + 1))


async def test_a_reader_that_does_not_wait_gets_what_there_is(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", CAPS)
    spool.append("stdout", b"so far")
    assert output([found async for found in spool.follow(0, wait=False)], "stdout") == b"so far"
    assert [data async for data in spool.follow_bytes("stdout", 3, wait=False)] == [b"far"]
    with pytest.raises(errors.InvalidRequest):
        await anext(spool.follow_bytes("stdout", -1))
    spool.close(durable=False)


async def test_an_interrupted_call_is_recovered_and_ended(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", CAPS)
    spool.add(event("started"))
    spool.append("stdout", b"seen")
    before = [await anext(reader) for reader in [spool.follow(0), spool.follow(1)]]
    spool.append("stdout", b"x" * 100_000)  # in the file, and the end of it has no number yet
    with (tmp_path / "c" / "events").open("ab") as file:
        file.write(b"half a record")
    dead = Spool.open(tmp_path / "c")
    assert dead.content("stdout").size == 100_004
    again = Spool.recover(tmp_path / "c", CAPS)
    again.add(event("ended"))
    again.close(durable=True)
    events = await everything(again)
    assert events[:2] == before
    assert output(events, "stdout") == b"seen" + b"x" * 100_000
    assert events[-1].type == "ended"
    assert Spool.open(tmp_path / "c").content("stdout") == again.content("stdout")
    spool.close(durable=False)


async def test_an_end_that_is_told_and_has_no_summary_is_told_once(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", CAPS)
    spool.append("stdout", b"seen")
    spool.add(event("ended"))
    spool.leave()  # whoever died right then
    for _ in range(2):
        again = Spool.recover(tmp_path / "c", CAPS)
        again.add(event("ended"))
        again.leave()
    last = Spool.recover(tmp_path / "c", CAPS)
    last.add(event("ended"))
    last.close(durable=True)
    assert [(each.seq, each.type) for each in await everything(last)] == [(1, "output"), (2, "ended")]


async def test_a_call_whose_spool_was_never_made_is_recovered(tmp_path: Path) -> None:
    spool = Spool.recover(tmp_path / "c", CAPS)
    spool.add(event("ended"))
    spool.close(durable=False)
    assert [each.type for each in await everything(Spool.open(tmp_path / "c"))] == ["ended"]


async def test_records_that_point_at_nothing_are_dropped(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", CAPS)
    spool.append("stdout", b"a" * 100)
    spool.append("stderr", b"b")
    spool.append("stdout", b"c")
    os.truncate(tmp_path / "c" / "stdout", 50)
    again = Spool.recover(tmp_path / "c", CAPS)
    again.close(durable=False)
    events = await everything(again)
    assert output(events, "stdout") == b"a" * 50
    spool.close(durable=False)


@pytest.mark.parametrize("name", ["details", "events"])
async def test_an_end_that_power_took_from_a_closed_spool_is_told_again(tmp_path: Path, name: str) -> None:
    """What comes after the sync may be lost in parts: here the summary is there, what it follows is not."""
    spool = Spool.create(tmp_path / "call", CAPS)
    spool.append("stdout", b"out")
    spool.sync()
    synced = (tmp_path / "call" / name).stat().st_size
    spool.add(event("ended"))
    ended = (tmp_path / "call" / name).stat().st_size
    spool.close(durable=False)
    assert Spool.open(tmp_path / "call").complete
    with (tmp_path / "call" / name).open("r+b") as file:
        file.seek(synced)
        file.write(bytes(ended - synced))
    assert not Spool.open(tmp_path / "call").complete
    again = Spool.recover(tmp_path / "call", CAPS)
    again.add(event("ended"))
    again.close(durable=True)
    assert [one.type for one in await everything(Spool.open(tmp_path / "call"))] == ["output", "ended"]


def test_what_was_pruned_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound):
        Spool.open(tmp_path / "missing")


async def test_a_call_without_output_makes_no_files(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", {"stdout": 0, "stderr": 10})
    spool.add(event("accepted", id="x"))
    assert [each.seq async for each in spool.follow(0, wait=False)] == [1]
    assert spool.append("stdout", b"dropped") == 0
    spool.add(event("ended"))
    spool.close(durable=True)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    events = await everything(spool)
    assert [(each.seq, each.type) for each in events] == [(1, "accepted"), (2, "ended")]
    assert await everything(spool, 1) == events[1:]
    assert spool.content("stdout").dropped == 7
    told = Spool.held(events)
    assert await everything(told) == events
    assert told.content("stderr") == spool.content("stderr")
    assert [data async for data in told.follow_bytes("stdout")] == []


async def test_events_before_the_first_output_keep_their_numbers(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", CAPS)
    spool.add(event("accepted", id="x"))
    spool.add(event("started"))
    seen = [each async for each in spool.follow(0, wait=False)]
    spool.append("stderr", b"late")
    dead = Spool.recover(tmp_path / "c", CAPS)
    assert (await everything_now(dead))[:2] == seen
    assert dead.content("stderr").text == "late"
    assert dead.content("stdout").size == 0
    assert [data async for data in dead.follow_bytes("stdout", wait=False)] == []
    for each in (dead, spool):
        each.close(durable=False)


async def test_a_spool_whose_files_cannot_be_made_still_tells_its_events(tmp_path: Path) -> None:
    (tmp_path / "calls").touch()
    spool = Spool.create(tmp_path / "calls" / "c", CAPS)
    spool.add(event("accepted", id="x"))
    with pytest.raises(errors.HostFailed, match="Not a directory"):
        spool.append("stdout", b"x")
    spool.add(event("ended"))
    spool.close(durable=False)
    assert [each.type for each in await everything(spool)] == ["accepted", "ended"]


def test_a_full_disk_is_a_host_failure(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    try:
        spool = Spool.create(place / "c", CAPS)
        with pytest.raises(errors.HostFailed, match="no space"):
            spool.append("stdout", bytes(100_000))
        with pytest.raises(errors.HostFailed, match="no space"):
            spool.close(durable=False)
        assert spool.closed
    finally:
        subprocess.run(["umount", place], check=True)


async def test_a_gigabyte_index_is_not_needed_for_much_output(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c", {"stdout": 64 << 20, "stderr": 0})
    chunk = os.urandom(256 * 1024)
    for _ in range(256):
        spool.append("stdout", chunk)
    spool.close(durable=False)
    assert (tmp_path / "c" / "events").stat().st_size <= 32 * (1100 + 1)
    digest = hashlib.sha256()
    async for data in spool.follow_bytes("stdout"):
        digest.update(data)
    assert "sha256:" + digest.hexdigest() == spool.content("stdout", 10).digest


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stdout", "stderr", "denied"]), st.binary(max_size=300), st.integers(0, 900)
        ),
        max_size=30,
    )
)
def test_streams_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bytes, int]]
) -> None:
    async def run() -> None:
        place = tmp_path_factory.mktemp("spool") / "c"
        spool = Spool.create(place, CAPS)
        wrote = {"stdout": b"", "stderr": b""}
        for what, data, times in steps:
            if what == "denied":
                spool.add(event("denied"))
            else:
                spool.append("stdout" if what == "stdout" else "stderr", data * times)
                wrote[what] += data * times
        spool.add(event("ended"))
        spool.close(durable=False)
        wrote_any = any(wrote.values())
        assert place.exists() == wrote_any
        events = await everything(Spool.open(place) if wrote_any else spool)
        assert [each.seq for each in events] == list(range(1, len(events) + 1))
        for stream in ("stdout", "stderr"):
            assert output(events, stream) == wrote[stream][: 1 << 20]

    anyio.run(run)
