"""A daemon that dies, or a disk that fails, while a session's container is kept, checkpointed or ended."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, slots_of, until
from living import kill_first, live, living
from sessioned import layers, said, sh

from sandboxd import errors
from sandboxd.failpoint import VARIABLE

if TYPE_CHECKING:
    from pathlib import Path

    from daemons import Daemon


@pytest.fixture
def failpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    needs_containers()
    directory = tmp_path / "failpoints"
    directory.mkdir()
    monkeypatch.setenv(VARIABLE, str(directory))
    return directory


def files(daemon: Daemon) -> str:
    return said(sh(daemon, "s", "cat a b 2>/dev/null; true", policy="plain"))


def writes(daemon: Daemon) -> bool:
    try:
        daemon.client().create_session()
    except errors.HostFailed:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("layer.write", False),
        ("layer.synced", True),
        ("session.commit", False),
        ("session.committed", False),
        ("session.committed", True),
    ],
)
def test_a_daemon_that_dies_in_a_checkpoint(
    tmp_path: Path, failpoints: Path, name: str, *, ends: bool
) -> None:
    """All of what the calls changed is kept, or nothing; and what is not kept is said to be lost."""
    with living(tmp_path) as daemon:
        client = daemon.client()
        session = client.create_session("s")
        # what has a second name is made as files at once
        call = live(daemon, session, "echo one > a; echo two > b; ln a c")
        (failpoints / name).write_text("KILL")
        with suppress(errors.SandboxdError):
            client.end_session("s") if ends else client.checkpoint_session("s")
        assert daemon.process.wait(20) < 0
    with living(tmp_path) as daemon:
        client = daemon.client()
        found = client.session("s")
        kept = found.head.id != session.head.id
        assert kept == (name == "session.committed")
        assert len(layers(daemon)) == int(kept)
        if ends and kept:  # its end was in the transaction
            assert found.container is None
        else:
            assert found.container is not None
            assert (found.container.state, found.container.since) == ("lost", call.id)
        assert files(daemon) == ("one\ntwo\n" if kept else "")
        client.delete_session("s")
        until(lambda: not slots_of(daemon), "nothing is left")


def test_a_disk_that_fails_leaves_the_container(tmp_path: Path, failpoints: Path) -> None:
    with living(tmp_path) as daemon:
        client = daemon.client()
        session = client.create_session("s")
        live(daemon, session, "echo one > a; ln a c; sleep 1000 &")
        for name in ("layer.write", "layer.sync", "session.commit"):
            (failpoints / name).write_text("ENOSPC")
            for attempt in (client.checkpoint_session, client.end_session):
                with pytest.raises(errors.SandboxdError) as caught:
                    attempt("s")
                assert caught.value.code in {"host", "internal"}
            (failpoints / name).unlink()
            assert client.session("s").head.id == session.head.id
            assert not layers(daemon)
        count = "grep -ls sleep /proc/[0-9]*/comm | wc -l"
        assert said(live(daemon, session, f"echo two > b; {count}")) == "1\n"  # thawed, and there
        client.end_session("s")
        assert files(daemon) == "one\ntwo\n"


def test_one_that_died_waits_with_its_files_for_a_disk_that_takes_them(
    tmp_path: Path, failpoints: Path
) -> None:
    """A call in its session fails meanwhile, and begins with nothing less than what others did."""
    with living(tmp_path) as daemon:
        client = daemon.client()
        session = client.create_session("s")
        first = live(daemon, session, "echo one > a; ln a c")
        (failpoints / "layer.write").write_text("ENOSPC")
        kill_first(daemon)
        for _ in range(2):
            call = live(daemon, session, "cat a")
            assert call.outcome is not None
            assert call.outcome.error is not None
            assert (call.outcome.cause, call.outcome.error.code) == ("failed", "host")
            assert call.checkpoint_after in {None, session.head.digest}
        with pytest.raises(errors.HostFailed):
            client.write_file(session.id, "a", b"in its place")
        assert client.session("s").head.id == session.head.id
        assert not layers(daemon)
        (failpoints / "layer.write").unlink()
        call = live(daemon, session, "cat a c")
        assert said(call) == "one\none\n"
        assert call.container is not None
        assert call.container.lost is not None
        assert call.container.lost.since == first.id
        assert "its files were kept" in call.container.lost.why


@pytest.mark.parametrize("name", ["layer.synced", "session.commit", "session.committed", "container.ended"])
def test_a_daemon_that_dies_as_it_keeps_what_one_that_died_has(
    tmp_path: Path, failpoints: Path, name: str
) -> None:
    with living(tmp_path) as daemon:
        client = daemon.client()
        session = client.create_session("s")
        call = live(daemon, session, "echo one > a; echo two > b; ln a c")
        (failpoints / name).write_text("KILL")
        kill_first(daemon)
        assert daemon.process.wait(20) < 0
    with living(tmp_path) as daemon:
        client = daemon.client()
        found = client.session("s")
        kept = found.head.id != session.head.id
        assert kept == (name in {"session.committed", "container.ended"})
        assert len(layers(daemon)) == int(kept)
        assert found.container is not None
        assert found.container.lost is not None
        assert found.container.lost.since == call.id
        assert ("its files were kept" in found.container.lost.why) == kept
        assert files(daemon) == ("one\ntwo\n" if kept else "")
        client.delete_session("s")
        until(lambda: not slots_of(daemon), "nothing is left")


@pytest.mark.parametrize("discard", [False, True])
def test_an_end_that_was_not_synced_is_none(tmp_path: Path, failpoints: Path, *, discard: bool) -> None:
    """What was written of it is taken back: the container is there, and lost with the daemon."""
    with living(tmp_path) as daemon:
        client = daemon.client()
        session = client.create_session("s")
        first = live(daemon, session, "echo one > a; ln a c")
        (failpoints / "journal.sync").write_text("EIO")
        with pytest.raises(errors.HostFailed):
            client.end_session("s", discard=discard)
        (failpoints / "journal.sync").unlink()
        assert client.session("s").container.state == "live"  # type: ignore[union-attr]
        until(lambda: writes(daemon), "the journal writes again, and has taken that back")
        daemon.stop(signal.SIGKILL)
    with living(tmp_path) as daemon:
        client = daemon.client()
        found = client.session("s")
        assert found.head.id == session.head.id
        assert found.container is not None
        assert (found.container.state, found.container.since) == ("lost", first.id)
        assert files(daemon) == ""
        client.delete_session("s")


def test_a_daemon_that_dies_with_the_outcome_of_the_first_call(tmp_path: Path, failpoints: Path) -> None:
    """The record, and the word that there is a container, are of one transaction."""
    with living(tmp_path) as daemon:
        client = daemon.client()
        client.create_session("s")
        (failpoints / "outcome.write").write_text("KILL")
        with suppress(errors.SandboxdError):
            live(daemon, "s", "echo one > a")
        assert daemon.process.wait(20) < 0
    with living(tmp_path) as daemon:
        client = daemon.client()
        assert client.session("s").container is None
        (call,) = client.list().invocations
        assert call.outcome is not None
        assert (call.outcome.cause, call.container) == ("failed", None)
        assert files(daemon) == ""


def test_a_call_in_a_container_is_replayed_from_the_checkpoint(tmp_path: Path) -> None:
    needs_containers()
    with living(tmp_path) as daemon:
        client = daemon.client()
        client.create_session("s")
        live(daemon, "s", "echo one > a")
        call = live(daemon, "s", "cat a; echo done")
        again = client.replay(call.id)
        assert again.replayed.stdout is not None
        assert again.replayed.stdout.text == "done\n"
        assert any("what ran on between its calls" in one for one in again.not_captured)
        assert said(live(daemon, "s", "cat a")) == "one\n"  # the container is as it was
        assert len([slot for slot in client.slots() if slot.policy == "live"]) == 1
