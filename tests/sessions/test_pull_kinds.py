"""A pull where a file became a directory, or a directory a file or a link: all of it comes, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from pulled import USER, content, run, users
from sessioned import by, sh

from sandboxd.client import clearance
from sandboxd.client.pulling import pull
from sandboxd.client.pushing import push

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import SessionInfo

__all__ = ["users"]
pytestmark = pytest.mark.usefixtures("agreements")
TURN = (
    "rm -r dir; echo x >dir; rm file; mkdir file; echo y >file/y; rm -r d3; ln -s file d3; rm -r deep;"
    "echo >deep"
)
TURNED = {"dir": "x\n", "file": "directory", "file/y": "y\n", "d3": "-> file", "deep": "\n", "other": "o\n"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    for name in ("dir", "d3", "deep/er/est", "deep/empty"):
        (place / name).mkdir(parents=True)
    for name, text in {
        "dir/q": "q\n",
        "file": "f\n",
        "deep/er/a": "a\n",
        "deep/er/est/b": "b\n",
        "other": "o\n",
    }.items():
        (place / name).write_text(text)
    (place / "dir" / "link").symlink_to("q")
    time.sleep(0.01)
    return place


@pytest.fixture(params=["lent", "pushed"])
def one(request: pytest.FixtureRequest, daemon: Daemon, directory: Path) -> Iterator[SessionInfo]:
    """A session on the directory, or of a copy of it."""
    client = daemon.client()
    if request.param == "lent":
        made = client.create_session(directory=directory, policy="kept")
    else:
        made = client.create_session(policy="kept")
        push(client, made.id, directory)
    yield made
    client.delete_session(made.id)


def reasons(pulled: object) -> dict[str, str]:
    return {one.path: one.reason for one in pulled.refused}  # type: ignore[attr-defined]


def test_kinds_that_changed_are_brought(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    sh(daemon, one, TURN)
    pulled = pull(daemon.client(), one.id, directory)
    assert reasons(pulled) == {}
    assert content(directory) == TURNED
    gone = {"dir/q", "dir/link", "deep/er", "deep/er/a", "deep/er/est", "deep/er/est/b", "deep/empty"}
    assert set(pulled.removed) == gone
    assert set(pulled.applied) == gone | {"dir", "file", "file/y", "d3", "deep"}
    again = pull(daemon.client(), one.id, directory)
    assert (again.applied, again.refused) == ([], [])
    # And back again.
    sh(daemon, one, "rm dir; mkdir dir; echo 2 >dir/q; rm -r file; echo f2 >file; rm d3; mkdir d3")
    back = pull(daemon.client(), one.id, directory)
    assert reasons(back) == {}
    turned = {path: what for path, what in TURNED.items() if path != "file/y"}
    turned |= {"dir": "directory", "dir/q": "2\n", "file": "f2\n", "d3": "directory"}
    assert content(directory) == turned


def test_what_changed_below_keeps_all_of_it(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    sh(daemon, one, TURN)
    (directory / "deep" / "er" / "a").write_text("mine\n")
    (directory / "dir" / "new").write_text("mine\n")
    (directory / "d3" / "new").write_text("mine\n")
    (directory / "file").write_text("mine\n")
    before = content(directory)
    for force in (False, True):
        pulled = pull(daemon.client(), one.id, directory, force=force)
        found = reasons(pulled)
        assert found["dir"].startswith("a directory is here, with dir/new")
        assert found["d3"].startswith("a directory is here, with d3/new")
        assert "it is in dir, which is something else" in found["dir/q"]
        if not force:
            assert found["deep"] == (
                "a directory is here, with deep/er/a: it was changed here since the session was made, and "
                "removed in it"
            )
            assert "changed here as well" in found["file"]
            assert content(directory) == before
    now = content(directory)
    assert (now["dir/new"], now["dir/q"], now["d3/new"]) == ("mine\n", "q\n", "mine\n")
    assert now["file/y"] == "y\n"


def test_what_git_ignores_and_the_session_never_had_stays(daemon: Daemon, directory: Path) -> None:
    (directory / ".gitignore").write_text("*.o\n")
    (directory / "dir" / "x.o").write_text("object\n")
    client = daemon.client()
    made = client.create_session(policy="kept")
    push(client, made.id, directory)
    sh(daemon, made, TURN)
    for force in (False, True):
        found = reasons(pull(client, made.id, directory, force=force))
        assert found["dir"] == "a directory is here, with dir/x.o, which the session never had"
        assert {path.name for path in (directory / "dir").iterdir()} == {"q", "link", "x.o"}
    assert (directory / "deep").is_file()
    client.delete_session(made.id)


def test_git_and_what_cannot_be_brought(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    """Nothing is removed for what is refused: a FIFO, a link that leads out, a repository of here."""
    client = daemon.client()
    sh(daemon, one, "rm -r dir deep d3; mkfifo dir; ln -s /etc deep; echo x >d3")
    (directory / "d3" / ".git").mkdir()
    (directory / "d3" / ".git" / "config").write_text("[core]\n")
    before = content(directory)
    found = reasons(pull(client, one.id, directory))
    assert found["dir"] == "it is a fifo"
    assert "leads out" in found["deep"]
    assert "d3/.git" in found["d3"]
    assert content(directory) == before


def test_a_repository_that_the_session_had(daemon: Daemon, directory: Path) -> None:
    (directory / "dir" / ".git").mkdir()
    (directory / "dir" / ".git" / "config").write_text("[core]\n")
    time.sleep(0.01)
    client = daemon.client()
    made = client.create_session(policy="kept", directory=directory)
    sh(daemon, made, "rm -r dir; echo x >dir")
    before = content(directory)
    assert "ask for it with --git" in reasons(pull(client, made.id, directory))["dir"]
    assert content(directory) == before
    assert reasons(pull(client, made.id, directory, git=True)) == {}
    assert (directory / "dir").read_text() == "x\n"
    client.delete_session(made.id)


def test_links_below_are_not_followed(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    """A directory below became a link to one outside, which has the same names."""
    sh(daemon, one, TURN)
    outside = directory.parent / "outside"
    (directory / "deep" / "er").rename(outside)
    (directory / "deep" / "er").symlink_to(outside)
    before = content(outside)
    for force in (False, True):
        assert "deep" in reasons(pull(daemon.client(), one.id, directory, force=force)) or force
    assert content(outside) == before


def test_mounts_below_stay(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    sh(daemon, one, TURN)
    for name, kind in (("dir/q", "file"), ("deep/er/est", "directory")):
        source = directory.parent / kind
        source.touch() if kind == "file" else source.mkdir()
        subprocess.run(["mount", "--bind", source, directory / name], check=True)
    try:
        found = reasons(pull(daemon.client(), one.id, directory, force=True))
        assert {"dir", "deep"} <= set(found)
        assert (directory / "dir" / "link").is_symlink()
        assert (directory / "deep" / "er" / "a").exists()
    finally:
        for name in ("dir/q", "deep/er/est"):
            subprocess.run(["umount", directory / name], check=True)


def test_what_changes_while_it_is_removed_stays(
    daemon: Daemon, one: SessionInfo, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program writes between the look and the removal: its file is not lost."""
    sh(daemon, one, TURN)
    remove = clearance.Clearance.remove

    def meanwhile(self: clearance.Clearance) -> Iterator[bytes]:
        if self._name == b"deep":
            (directory / "deep" / "er" / "a").write_text("mine\n")
        if self._name == b"dir":
            (directory / "dir" / "new").write_text("mine\n")
        yield from remove(self)

    monkeypatch.setattr(clearance.Clearance, "remove", meanwhile)
    pulled = pull(daemon.client(), one.id, directory)
    assert {"deep", "dir"} <= set(reasons(pulled))
    assert (directory / "deep" / "er" / "a").read_text() == "mine\n"
    assert (directory / "dir" / "new").read_text() == "mine\n"
    assert not list(directory.rglob(".sandboxd-pull-*"))
    for path in pulled.removed:
        assert not (directory / path).exists()


def test_what_is_over_the_bytes_removes_nothing(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    sh(daemon, one, "rm -r dir; head -c 100000 /dev/urandom >dir")
    before = content(directory)
    assert set(reasons(pull(daemon.client(), one.id, directory, most=1000))) == {"dir", "dir/q", "dir/link"}
    assert content(directory) == before


def test_directories_that_are_closed_to_their_owner(daemon: Daemon, users: Path) -> None:
    (users / "src" / "in").mkdir()
    (users / "src" / "in" / "b").write_text("b\n")
    for path in (users / "src" / "in" / "b", users / "src" / "in"):
        os.chown(path, USER, USER)
    (users / "src" / "in").chmod(0o555)
    (users / "src").chmod(0o555)
    time.sleep(0.01)
    with by(USER, daemon):
        client = daemon.client()
        made = client.create_session(directory=users)
        done = client.run(
            ["sh", "-c", "chmod 755 src src/in; rm -r src; echo x >src"], session=made.id, policy="kept"
        )
        assert done.outcome is not None
        assert done.outcome.exit_code == 0
        pulled = client.pull(made.id, users)
        assert reasons(pulled) == {}
        client.delete_session(made.id)
    assert (users / "src").read_text() == "x\n"
    assert stat.S_ISREG((users / "src").stat().st_mode)


def test_an_empty_directory_that_was_made_here(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    sh(daemon, one, "echo x >both")
    (directory / "both").mkdir()
    assert set(reasons(pull(daemon.client(), one.id, directory))) == {"both"}
    assert (directory / "both").is_dir()
    assert reasons(pull(daemon.client(), one.id, directory, force=True)) == {}
    assert (directory / "both").read_text() == "x\n"


def test_force_removes_nothing_that_the_session_never_had(
    daemon: Daemon, one: SessionInfo, directory: Path
) -> None:
    sh(daemon, one, "rm -r dir deep")
    shutil.rmtree(directory / "dir")
    (directory / "dir").mkdir()
    (directory / "dir" / "z").write_text("z\n")
    pulled = pull(daemon.client(), one.id, directory, force=True)
    assert (directory / "dir" / "z").read_text() == "z\n"
    assert "dir" in reasons(pulled)
    assert "dir/z" not in pulled.applied
    assert {"deep", "deep/er/a"} <= set(pulled.removed)
    assert not (directory / "deep").exists()


def test_what_was_moved_here_is_not_what_the_session_had(
    daemon: Daemon, directory: Path, tmp_path: Path
) -> None:
    """An older file under a name that the session never had; its directory was removed there."""
    (tmp_path / "old").write_text("old\n")
    os.utime(tmp_path / "old", (1, 1))
    time.sleep(0.01)
    client = daemon.client()
    made = client.create_session(policy="kept", directory=directory)
    sh(daemon, made, "rm -r dir")
    (tmp_path / "old").rename(directory / "dir" / "old")
    for force in (False, True):
        assert {"dir", "dir/old"} <= set(reasons(pull(client, made.id, directory, force=force)))
    assert (directory / "dir" / "old").read_text() == "old\n"
    client.delete_session(made.id)


def test_removals_are_called_so(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    sh(daemon, one, "rm other; rm -r dir; echo x >dir; echo y >file")
    told = run(daemon, "sandboxd", "session", "pull", one.id, ".", cwd=directory)
    assert set(told.stdout.splitlines()) == {
        "removed dir/q", "removed dir/link", "removed other", "pulled  dir", "pulled  file",
    }  # fmt: skip
    sh(daemon, one, "rm file")
    document = json.loads(
        run(daemon, "sandboxd", "session", "pull", one.id, ".", "--json", cwd=directory).stdout
    )
    assert (document["applied"], document["removed"]) == (["file"], ["file"])


def test_run_in_sandbox_brings_kinds(daemon: Daemon, directory: Path) -> None:
    command = ("--policy", "kept", "--pull", "--", "sh", "-c", TURN)
    done = run(daemon, "run-in-sandbox", "--workspace", ".", *command, cwd=directory)
    assert done.returncode == 0, done.stderr
    assert "removed dir/q\n" in done.stderr
    assert content(directory) == TURNED


def test_who_looks_meanwhile_sees_one_or_the_other(daemon: Daemon, one: SessionInfo, directory: Path) -> None:
    """A file that becomes a directory, and back, while a program writes beneath: nothing of it is lost."""
    sh(daemon, one, "rm -r dir; echo x >dir")
    stop = threading.Event()
    written: list[str] = []

    def write() -> None:
        while not stop.is_set():
            name = f"n{len(written)}"
            try:
                with (directory / "dir" / name).open("x"):
                    written.append(name)
            except OSError:
                continue

    writer = threading.Thread(target=write)
    writer.start()
    pulled = pull(daemon.client(), one.id, directory)
    stop.set()
    writer.join()
    if (directory / "dir").is_dir():
        assert "dir" in reasons(pulled)
        assert set(written) <= {path.name for path in (directory / "dir").iterdir()}
    else:
        assert written == []
