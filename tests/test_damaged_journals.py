"""A daemon on a journal with a damaged page: what it mends, loses by name, and where it does not start."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from daemons import start_daemon, until
from journals import INDEXES, behind, spoiled

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from daemons import Daemon

ONE = "budget: {slots: 1}\n"
ZEROS = bytes(4096)


def moved(state: Path) -> None:
    """All of the log is in the database's file."""
    behind(state, "PRAGMA wal_checkpoint(TRUNCATE)")


def spoil(state: Path, names: Iterable[str]) -> None:
    moved(state)
    for name in names:
        spoiled(state, name, ZEROS)


@pytest.mark.parametrize(
    "names",
    [["invocation_keys"], ["invocation_callers"], ["sqlite_autoindex_invocations_1"], ["invocations_open"],
     ["sqlite_autoindex_requests_1"], ["sessions_going"], INDEXES],
    ids=lambda names: names[0] if len(names) == 1 else "all",
)  # fmt: skip
def test_a_damaged_index_keeps_nobody_from_being_served(
    daemon_factory: Callable[..., Daemon], names: list[str]
) -> None:
    first = daemon_factory(config=ONE)
    client = first.client()
    once = client.run(["echo", "once"], key="once", labels={"a": "b"}).id
    client.create_session("s")
    client.run(["sh", "-c", "echo 1 > f"], session="s")
    running = client.start(["sleep", "1000"]).id
    until(lambda: client.get(running).state == "running", "it runs")
    queued = client.start(["echo", "queued"]).id
    first.stop(signal.SIGKILL)
    spoil(first.state, names)
    second = daemon_factory(config=ONE, state=first.state, name="second")
    client = second.client()
    done = client.wait(queued, timeout=30)
    assert done.stdout is not None
    assert done.stdout.text == "queued\n"
    assert client.run(["echo", "once"], key="once", labels={"a": "b"}).id == once
    assert client.run(["cat", "f"], session="s").stdout.text == "1\n"  # type: ignore[union-attr]
    outcome = client.get(running).outcome
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.code == "interrupted"
    assert len(client.list(label="a=b").invocations) == 1
    for name in names:
        if "invocation" in name:
            assert f'"index": "{name}"' in second.log.read_text()


def test_calls_whose_place_in_the_queue_is_lost_end_as_interrupted(
    daemon_factory: Callable[..., Daemon],
) -> None:
    first = daemon_factory(config=ONE)
    client = first.client()
    calls = [client.start(["sleep", "1000"], key="k").id, client.start(["echo", "queued"]).id]
    first.stop(signal.SIGKILL)
    spoil(first.state, ["queue", "invocations_open"])
    second = daemon_factory(config=ONE, state=first.state, name="second")
    client = second.client()
    for id_ in calls:
        outcome = client.wait(id_, timeout=30).outcome
        assert outcome is not None
        assert outcome.error is not None
        assert (outcome.cause, outcome.error.code) == ("failed", "interrupted")
        assert id_ in second.log.read_text()
    assert client.run(["sleep", "1000"], key="k").id == calls[0]
    assert client.run(["echo", "served"]).stdout.text == "served\n"  # type: ignore[union-attr]


@pytest.mark.parametrize("table", ["records", "sessions", "checkpoints", "merges", "packs", "containers"])
def test_where_it_cannot_go_on_it_says_which_table_and_what_to_do(
    daemon_factory: Callable[..., Daemon], tmp_path: Path, table: str
) -> None:
    first = daemon_factory()
    client = first.client()
    client.create_session("s")
    client.run(["sh", "-c", "echo 1 > f"], session="s")
    client.start(["sleep", "1000"])
    first.stop(signal.SIGKILL)
    spoil(first.state, [table])
    (tmp_path / "second").mkdir()
    with start_daemon(tmp_path / "second", state=first.state, ready=False) as daemon:
        until(lambda: daemon.process.poll() is not None, "it ends")
        assert daemon.process.returncode > 0
        said = daemon.log.read_text()
    assert f"the journal's database is damaged: the table {table}; " in said
    assert "`sandboxd journal verify --deep` says what can be read" in said
    assert "restore the state directory from a backup" in said
    assert "Traceback" not in said


def test_a_table_of_some_calls_keeps_only_those_from_being_served(
    daemon_factory: Callable[..., Daemon],
) -> None:
    first = daemon_factory()
    first.client().run(["true"], labels={"a": "b"})
    first.stop()
    spoil(first.state, ["labels"])
    client = daemon_factory(state=first.state, name="second").client()
    with pytest.raises(errors.JournalCorrupt, match=r"the table labels; .*backup"):
        client.run(["true"], labels={"a": "b"})
    assert client.run(["echo", "served"]).stdout.text == "served\n"  # type: ignore[union-attr]


@pytest.mark.parametrize("table", ["invocations", "requests"])
def test_without_what_every_call_needs_each_is_refused_by_name(
    daemon_factory: Callable[..., Daemon], table: str
) -> None:
    first = daemon_factory()
    first.client().run(["true"], key="k")
    first.stop()
    spoil(first.state, [table])
    client = daemon_factory(state=first.state, name="second").client()
    for _ in range(2):
        with pytest.raises(errors.JournalCorrupt, match=f"the table {table}; ") as refused:
            client.run(["true"])
        assert refused.value.details["damaged"] == [table]
