"""Files of sessions that were damaged on the disk: who finds them, what is told, and the rest goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, start_daemon, until
from sessioned import give_policies, layers, said, sh

from sandboxd import errors
from sandboxd.journal import schema
from sandboxd.workspace import stacks, tables
from sandboxd.workspace.audit import examine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import SessionInfo
    from sandboxd.workspace.audit import Audit

SANDBOXD = Path(sys.executable).with_name("sandboxd")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    with start_daemon(tmp_path_factory.mktemp("soundness")) as one:
        give_policies(one)
        yield one


@pytest.fixture
def session(daemon: Daemon) -> SessionInfo:
    """One of three calls, each with a file, whose layers are on disk."""
    made = daemon.client().create_session()
    for name in "abc":
        said(sh(daemon, made, f"echo {name} > {name}"))
    layers(daemon)
    return daemon.client().session(made.id)


def verify(daemon: Daemon) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SANDBOXD, "journal", "verify", "--deep", "--state", str(daemon.state)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def of(daemon: Daemon, session: SessionInfo) -> list[tables.Checkpoint]:
    """The checkpoints of a session, the newest first."""
    with closing(schema.connect_reader(daemon.state / "journal.sqlite3")) as connection:
        return tables.checkpoints(connection, session.id, before=None, limit=100)


def everything(daemon: Daemon) -> list[tables.Checkpoint]:
    with closing(schema.connect_reader(daemon.state / "journal.sqlite3")) as connection:
        ids = connection.execute("SELECT id FROM checkpoints").fetchall()
        return [one for (id_,) in ids if (one := tables.checkpoint(connection, id_)) is not None]


def place(daemon: Daemon, name: str | None) -> Path:
    assert name is not None
    return daemon.state / "sessions" / "layers" / name


@contextmanager
def aside(path: Path) -> Iterator[None]:
    """For a while it is not there."""
    path.rename(path.with_name("aside"))
    try:
        yield
    finally:
        path.with_name("aside").rename(path)


@contextmanager
def changed(path: Path) -> Iterator[None]:
    """For a while a file has other bytes; length and time are as they were."""
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(b"E" * len(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        yield
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_verify_says_that_all_is_well_where_it_is(daemon: Daemon, session: SessionInfo) -> None:
    done = verify(daemon)
    assert done.returncode == 0, done.stderr
    assert "layers of sessions were read" in done.stdout
    client = daemon.client()
    first = of(daemon, session)[-1]
    client.rollback_session(session.id, of(daemon, session)[2].id)
    client.discard_session(session.id)  # of which records speak
    assert len(of(daemon, session)) == 2
    assert verify(daemon).returncode == 0
    fork = client.fork_session(session.id, checkpoint=first.id)
    sh(daemon, fork, "echo d > d")
    client.delete_session(session.id)
    until(lambda: session.id not in {one.session for one in everything(daemon)}, "it is gone")
    done = verify(daemon)
    assert done.returncode == 0, done.stderr
    client.delete_session(fork.id)
    assert verify(daemon).returncode == 0


def test_a_layer_that_was_changed(daemon: Daemon, session: SessionInfo) -> None:
    newest, below, *_ = of(daemon, session)
    client = daemon.client()
    with changed(place(daemon, newest.layer) / "c"):
        done = verify(daemon)
        assert done.returncode == 1
        for part in (f"checkpoint {newest.id}, {newest.digest}, of session {session.id}", "was changed"):
            assert part in done.stderr
        after = sh(daemon, session, "echo d > d")  # what the next call stands on is not digested at its start
        assert after.outcome is not None
        for use in (
            lambda: b"".join(client.export_session(session.id)),
            lambda: client.fork_session(session.id, checkpoint=newest.id),
            lambda: client.replay(after.id),
            lambda: client.replay(newest.call or ""),  # what it changed is compared
            lambda: client.read_file(session.id, "c"),
            lambda: client.read_file(session.id, "c", offset=1),
        ):
            with pytest.raises(errors.SandboxdError) as raised:
                use()
            check(raised.value, daemon, session, newest)
        assert not client.replay(below.call or "").differs
        assert b"".join(client.read_file(session.id, "b")) == b"b\n"  # of another layer
        assert [one.path for one in client.session_files(session.id).files] == ["a", "b", "c", "d"]
    assert b"".join(client.read_file(session.id, "c")) == b"c\n"
    done = verify(daemon)
    assert done.returncode == 0, done.stderr
    assert len(b"".join(client.export_session(session.id))) > 512


@pytest.mark.parametrize("code", ["head -c 300k /dev/urandom > large", "for i in $(seq 40); do : > $i; done"])
def test_a_file_of_a_layer_that_is_not_small_is_shown_as_it_is(
    daemon: Daemon, session: SessionInfo, code: str
) -> None:
    """To read all of its layer would cost what there is: who needs to know names the digest."""
    client = daemon.client()
    said(sh(daemon, session, f"echo right > file; {code}"))
    layers(daemon)
    listed = client.session_files(session.id, digest=True).files
    digest = next(one.digest for one in listed if one.path == "file")
    with changed(place(daemon, of(daemon, session)[0].layer) / "file"):
        assert b"".join(client.read_file(session.id, "file")) == b"E" * 6
        with pytest.raises(errors.PreconditionFailed):
            client.read_file(session.id, "file", match=digest)
        assert verify(daemon).returncode == 1


def check(error: errors.SandboxdError, daemon: Daemon, session: SessionInfo, one: tables.Checkpoint) -> None:
    assert error.code == "corrupt", error
    assert error.details == {"session": session.id, "checkpoint": one.id, "digest": one.digest}
    assert str(daemon.state) not in str(error)
    assert (one.layer or "") not in str(error)


def test_a_layer_that_is_gone(daemon: Daemon, session: SessionInfo) -> None:
    one = of(daemon, session)[1]
    client = daemon.client()
    other = client.create_session()
    with aside(place(daemon, one.layer)):
        call = sh(daemon, session, "cat b")
        assert call.outcome is not None
        assert call.outcome.cause == "failed"
        failure = call.outcome.error
        assert failure is not None
        assert (failure.code, failure.details) == (
            "corrupt", {"session": session.id, "checkpoint": one.id, "digest": one.digest},
        )  # fmt: skip
        for told in (failure.message, call.outcome.message or ""):
            assert "is gone" in told
            assert "/" not in told.replace("sha256:", "")
        for use in (
            lambda: client.session_files(session.id),
            lambda: b"".join(client.read_file(session.id, "a")),
            lambda: client.write_file(session.id, "x", b"x"),
            lambda: b"".join(client.export_session(session.id)),
            lambda: client.fork_session(session.id),
            lambda: client.diff_session(session.id),
        ):
            with pytest.raises(errors.SandboxdError) as raised:
                use()
            check(raised.value, daemon, session, one)
        assert said(sh(daemon, other, "echo fine")) == "fine\n"
        done = verify(daemon)
        assert done.returncode == 1
        assert f"checkpoint {one.id}, {one.digest}, of session {session.id}: its layer is gone" in done.stderr
    assert said(sh(daemon, session, "cat b")) == "b\n"
    assert "Traceback" not in daemon.log.read_text()


def test_a_merged_layer_that_was_changed(daemon: Daemon) -> None:
    made = daemon.client().create_session()
    for number in range(stacks.FAN + 1):
        said(sh(daemon, made, f"echo {number} > f{number}"))

    def merges() -> list[tuple[str, str]]:
        with closing(schema.connect_reader(daemon.state / "journal.sqlite3")) as connection:
            query = (
                "SELECT m.layer, m.checkpoint FROM merges AS m JOIN checkpoints AS c ON c.id = m.checkpoint"
                " WHERE c.session = ?"
            )
            return connection.execute(query, (made.id,)).fetchall()

    until(lambda: bool(merges()), "layers are merged")
    layers(daemon)
    assert verify(daemon).returncode == 0
    ((layer, checkpoint),) = merges()
    file = place(daemon, layer) / "f3"
    shutil.copy2(file, file.with_name("other"))  # a file of its own, in the place of the one that is shared
    file.with_name("other").write_bytes(b"E\n")
    file.with_name("other").rename(file)
    done = verify(daemon)
    assert done.returncode == 1
    assert f"checkpoint {checkpoint}" in done.stderr
    assert f"its layer that stands for {stacks.FAN} was changed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(errors.SandboxdError) as raised:
        b"".join(daemon.client().export_session(made.id))
    assert (raised.value.code, raised.value.details["checkpoint"]) == ("corrupt", checkpoint)
    daemon.client().delete_session(made.id)
    until(lambda: not merges(), "its layers are gone")


DAMAGE = {
    "UPDATE checkpoints SET digest = 'sha256:' || hex(zeroblob(32)) WHERE id = :middle": (
        "does not have the digest that its parent and its layer make"
    ),
    "UPDATE checkpoints SET content = 'sha256:' || hex(zeroblob(32)) WHERE id = :middle": "make",
    "UPDATE checkpoints SET parent = :first, depth = 1 WHERE id = :head": "make",
    "UPDATE checkpoints SET depth = depth + 1 WHERE id = :head": "not where its parent leads to",
    "UPDATE checkpoints SET layer = (SELECT layer FROM checkpoints WHERE id = :middle) WHERE id = :head": (
        "its layer was changed"
    ),
    "UPDATE checkpoints SET layer = NULL WHERE id = :head": "has lost its layer",
    "DELETE FROM checkpoints WHERE id = :middle": "its parent",
    "DELETE FROM checkpoints WHERE id = :head": "that it stands on is gone",
    "DELETE FROM checkpoints WHERE id = :first": "that it began with is gone",
    "DELETE FROM checkpoints WHERE session = :session": "is gone",
    "UPDATE sessions SET head = :middle; DELETE FROM checkpoints WHERE id = :head": "record ",
    "UPDATE sessions SET head = 'nothing' WHERE id = :session": "that it stands on is gone",
}


def test_what_the_journal_says_of_checkpoints_was_changed(
    daemon: Daemon, session: SessionInfo, tmp_path: Path
) -> None:
    line = of(daemon, session)
    names = {"head": line[0].id, "middle": line[1].id, "first": line[-1].id, "session": session.id}
    whole = tmp_path / "whole.sqlite3"
    with (
        closing(sqlite3.connect(daemon.state / "journal.sqlite3")) as source,
        closing(sqlite3.connect(whole)) as target,
    ):
        source.backup(target)
    assert told(whole, daemon.state).damaged == []
    for number, (damage, expected) in enumerate(DAMAGE.items()):
        copy = tmp_path / f"{number}.sqlite3"
        shutil.copy(whole, copy)
        with closing(sqlite3.connect(copy)) as connection:
            for statement in damage.split("; "):
                connection.execute(statement, names)
            connection.commit()
        found = [
            f"record {one.n}: {one.what}" if one.n else one.what for one in told(copy, daemon.state).damaged
        ]
        assert any(expected in one and session.id in one for one in found) or any(
            expected in one and line[0].id in one for one in found
        ), (damage, found)


def told(journal: Path, state: Path) -> Audit:
    with closing(schema.connect_reader(journal)) as connection:
        return examine(connection, state)


@pytest.mark.parametrize("cut", [False, True])
def test_a_layer_that_is_not_made_as_files_yet(tmp_path: Path, *, cut: bool) -> None:
    needs_containers()
    with start_daemon(tmp_path) as one:
        give_policies(one)
        made = one.client().create_session()
        said(sh(one, made, "mkdir d; echo text > d/a; ln -s a d/b; head -c 9000 /dev/zero > z; echo x >> z"))
        one.stop(signal.SIGKILL)  # before its files are synced
        path = one.state / "journal.sqlite3"
        with closing(sqlite3.connect(path)) as connection:
            ((pack,),) = connection.execute("SELECT pack FROM packs").fetchall()
            found = told(path, one.state)
            assert (found.damaged, found.layers) == ([], 1)
            bad = pack[:-3] if cut else pack.replace(b"text", b"EVIL")
            assert bad != pack
            connection.execute("UPDATE packs SET pack = ?", (bad,))
            connection.commit()
        damaged = told(path, one.state).damaged
        assert [made.id in each.what and "was changed" in each.what for each in damaged] == [True]
        done = subprocess.run(
            [SANDBOXD, "journal", "verify", "--deep", "--json", "--state", one.state],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert len(json.loads(done.stdout)["damaged"]) == 1
