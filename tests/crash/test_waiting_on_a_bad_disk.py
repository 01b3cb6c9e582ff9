"""The disk does not sync when a call ends: whoever waits is told that, and how it ended once that is kept."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from crash_caller import told
from daemons import RUN_IN_SANDBOX, needs_containers, start_daemon, until
from disks import mounted

from sandboxd import errors
from sandboxd.journal import schema, signing, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemons import Daemon
    from disks import Disk

    from sandboxd.models import Event

SOON = 30.0
"""Seconds in which whoever waits is told, one way or the other."""
READS = ["sh", "-c", 'echo begun; read word; echo "$word"; exit 7']


@pytest.fixture
def bad(tmp_path: Path) -> Iterator[tuple[Daemon, Disk]]:
    needs_containers()
    with mounted(tmp_path / "fs") as disk, start_daemon(tmp_path, state=disk.at / "state") as daemon:
        yield daemon, disk


def begun(daemon: Daemon, key: str) -> str:
    """A call that waits for a line."""
    client = daemon.client()
    call = client.start(READS, key=key, stdin="stream")
    until(lambda: client.get(call.id).state == "running", "it runs")
    return call.id


def whole(state: Path, records: int) -> None:
    connection = schema.connect_reader(state / "journal.sqlite3")
    try:
        report = verify.verify(connection, keys={signing.key_id(key) for key in signing.known(state)})
    finally:
        connection.close()
    assert (report.problem, report.records) == (None, records)


@contextmanager
def at_terminal(daemon: Daemon) -> Iterator[subprocess.Popen[bytes]]:
    """The same call as somebody has it who sits before it."""
    command: list[str | Path] = [RUN_IN_SANDBOX, "--socket", daemon.socket, "--key", "key", "-i", "--"]
    with subprocess.Popen(
        [*command, *READS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as program:
        try:
            yield program
        finally:
            program.kill()


@contextmanager
def ending(disk: Disk) -> Iterator[None]:
    """Whatever fails, who waits in a thread does so to an end."""
    try:
        yield
    finally:
        disk.mend()


def failed(ask: Callable[[], object]) -> str:
    """What the typed error of whoever waits says."""
    with pytest.raises(errors.HostFailed) as found:
        ask()
    return str(found.value)


def test_all_who_wait_are_told_and_then_how_it_ended(bad: tuple[Daemon, Disk]) -> None:
    daemon, disk = bad
    client = daemon.client()
    seen: list[Event] = []
    with ThreadPoolExecutor() as threads, at_terminal(daemon) as program, ending(disk):
        until(lambda: client.list(state="running").invocations, "it runs")
        id_ = client.list().invocations[0].id
        following = threads.submit(lambda: seen.extend(client.events(id_)))
        waiting = [
            threads.submit(failed, lambda: client.wait(id_)),
            threads.submit(failed, lambda: client.run(READS, key="key", stdin="stream")),
        ]
        time.sleep(0.5)  # so that they wait
        disk.fail("fsync", path="journal", do="EIO")
        assert program.stdin is not None
        program.stdin.write(b"word\n")
        for one in waiting:
            assert "the call has ended, but how could not be recorded yet: the journal could not be" in (
                one.result(SOON)
            )
        assert "ask for it again" in failed(lambda: client.wait(id_))
        assert "could not be synced" in failed(lambda: client.run(READS, key="key", stdin="stream"))
        found = client.get(id_)
        assert (found.state, found.outcome) == ("collecting", None)
        assert client.list(limit=1).invocations[0].outcome is None
        with client.events(id_) as events:
            notice = next(event for event in events if event.type == "unrecorded")
        assert notice.error is not None
        assert notice.error.code == "host"
        assert program.stderr is not None
        assert b"could not be recorded yet" in program.stderr.readline()
        assert program.poll() is None
        disk.mend()
        until(lambda: client.get(id_).outcome, "its outcome is told", SOON)
        following.result(SOON)
        out, err = program.communicate(timeout=SOON)
    assert (program.returncode, out, err) == (7, b"begun\nword\n", b"")
    assert [one.type for one in seen[-2:]] == ["unrecorded", "ended"]
    assert seen[-1].seq == seen[-2].seq + 1
    done = client.wait(id_)
    assert seen[-1].invocation is not None
    assert told(seen[-1].invocation) == told(done) == told(client.run(READS, key="key", stdin="stream"))
    assert (done.outcome and done.outcome.exit_code) == 7
    assert daemon.run("true").outcome is not None
    whole(daemon.state, 2)  # as another process: the database is still the daemon's
    assert daemon.run("true").outcome is not None


@pytest.mark.parametrize("how", ["TERM", "KILL"])
def test_a_daemon_that_ends_meanwhile_leaves_one_outcome(tmp_path: Path, how: str) -> None:
    needs_containers()
    with mounted(tmp_path / "fs") as disk:
        state = disk.at / "state"
        with start_daemon(tmp_path, state=state) as daemon:
            id_ = begun(daemon, "key")
            disk.fail("fsync", path="journal", do="EIO")
            daemon.client().write_stdin(id_, b"word\n")
            failed(lambda: daemon.client().wait(id_))
            if how == "KILL":
                daemon.process.kill()
            daemon.stop()  # of itself, in its own time
        disk.mend()
        with start_daemon(tmp_path, state=state) as daemon:
            done = daemon.client().wait(id_)
            assert done.outcome is not None
            if done.outcome.cause == "failed":
                assert done.outcome.error is not None
                assert done.outcome.error.code == "interrupted"
            else:
                assert done.outcome.exit_code == 7
            assert told(daemon.client().run(READS, key="key", stdin="stream")) == told(done)
            whole(state, 1)


def test_a_call_that_is_refused_after_a_restart_is_told_once_it_is_recorded(tmp_path: Path) -> None:
    needs_containers()
    policies = tmp_path / "its"
    policies.mkdir()
    gone = policies / "gone.yaml"
    gone.write_text("version: 1\nname: gone\nextends: default\n")
    config = f"policies: [{policies}]\ncallers:\n  - {{match: {{uid: 0}}, role: operator, concurrent: 1}}\n"
    with mounted(tmp_path / "fs") as disk:
        state = disk.at / "state"
        with start_daemon(tmp_path, state=state, config=config) as daemon:
            client = daemon.client()
            first = client.start(["sleep", "1000"], key="first")
            until(lambda: client.get(first.id).state == "running", "it runs")
            second = client.start(["sleep", "1000"], key="second")
            refused = client.start(["true"], key="refused", policy="gone")
            daemon.process.kill()
        gone.unlink()
        with start_daemon(tmp_path, state=state, config=config) as daemon:
            client = daemon.client()
            until(lambda: client.get(second.id).state == "running", "the next one runs")
            disk.fail("fsync", path="journal", do="EIO")
            began = time.monotonic()
            assert "could not be recorded yet" in failed(lambda: client.get(refused.id))
            assert time.monotonic() - began < SOON
            (shown,) = [one for one in client.list().invocations if one.id == refused.id]
            assert (shown.state, shown.outcome) == ("collecting", None)
            disk.mend()

            def outcome() -> str | None:
                try:
                    found = client.get(refused.id)
                except errors.HostFailed:
                    return None
                return None if found.outcome is None else found.outcome.cause

            until(outcome, "its outcome is told", SOON)
            assert outcome() == "denied"
            client.cancel(second.id)
            whole(state, 3)
            assert (
                json.loads(daemon.sandboxd("inspect", refused.id, "--json"))["outcome"]["cause"] == "denied"
            )
