"""Ids stay in the order in which they were made, also where the clock was set back between two daemons."""

from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING

import pytest
from journals import behind, call, record

from sandboxd import models
from sandboxd.journal import Accepted, Ids, Journal, requests

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

YEAR = 365 * 86_400 * 10**9
SESSION = (
    "INSERT INTO sessions (id, uid, labels, created, used, head, origin, calls, gone)"
    " VALUES ('{}', 1, '{{}}', 1, 1, 'x', 'x', 0, 0)"
)
CHECKPOINT = (
    "INSERT INTO checkpoints (id, uid, depth, digest, size, inodes, created)"
    " VALUES ('{}', 1, 0, 'x', 0, 0, 1)"
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def of_the_future(monkeypatch: pytest.MonkeyPatch) -> str:
    real = time.time_ns
    with monkeypatch.context() as patched:
        patched.setattr(time, "time_ns", lambda: real() + YEAR)
        return Ids().new()


async def test_calls_queue_behind_those_of_a_clock_that_was_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, later = [], of_the_future(monkeypatch)
    for id_ in (later, None, None):  # a journal each: as daemons that follow each other
        async with Journal.open(tmp_path) as journal:
            for _ in range(3 if id_ is None else 1):
                ids.append(id_ or journal.new_id())
                asked = requests.describe(models.Request(argv=["true"]))
                row = requests.Open(ids[-1], 1, tied=0, known=1)
                await journal.accept(Accepted(call(id=ids[-1]), asked.digest, asked, row))
            assert [one.id for one in await journal.open_calls()] == ids
            assert [one.id for one in await journal.list()] == ids[::-1]
    assert ids[0] == later


@pytest.mark.parametrize("statement", [SESSION, CHECKPOINT])
async def test_sessions_and_checkpoints_of_it_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    async with Journal.open(tmp_path) as journal:
        await record(journal, tmp_path)
    later = of_the_future(monkeypatch)
    behind(tmp_path, statement.format(later))
    async with Journal.open(tmp_path) as journal:
        assert journal.new_id() > later


@pytest.mark.parametrize(
    "odd",
    [
        "zz",
        "",
        "\u00fc",
        "ffffffff-ffff-7fff-bfff-ffffffffffff",
        "ffffffff-ffff-4fff-bfff-ffffffffffff",
        "9" * 99,
    ],
)
async def test_what_is_no_id_of_ours_moves_nothing(tmp_path: Path, odd: str) -> None:
    async with Journal.open(tmp_path) as journal:
        await record(journal, tmp_path)
    behind(tmp_path, SESSION.format(odd))
    async with Journal.open(tmp_path) as journal:
        made = uuid.UUID(journal.new_id())
        assert (made.version, made.variant) == (7, uuid.RFC_4122)
        assert abs((made.int >> 80) - time.time_ns() // 10**6) < 60_000


def test_threads_get_different_ids() -> None:
    ids = Ids()
    made: list[list[str]] = [[] for _ in range(4)]
    threads = [
        threading.Thread(target=lambda each=each: each.extend(ids.new() for _ in range(2000)))
        for each in made
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each == sorted(each) for each in made)
    assert len({uuid.UUID(id_).int >> 80 for each in made for id_ in each}) == 8000


def test_a_daemon_goes_on_from_the_newest_id(
    daemon_factory: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = daemon_factory()
    session = first.client().create_session("s")
    first.stop()
    later = of_the_future(monkeypatch)
    behind(first.state, f"UPDATE checkpoints SET id = '{later}'", f"UPDATE sessions SET head = '{later}'")
    client = daemon_factory(state=first.state, name="second").client()
    calls = [client.run(["sh", "-c", f"echo {n} > f"], session="s").id for n in range(3)]
    assert calls == sorted(calls)
    assert calls[0] > later
    assert [one.call for one in client.checkpoints(session.id).checkpoints] == [*calls[::-1], None]
