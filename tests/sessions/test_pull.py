"""What a session changed is brought into the directory that it stands on, and nothing else is touched."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, start_daemon
from pulled import USER, content, run, users
from sessioned import CONFIG, by, give_policies, said, sh

from sandboxd import Client
from sandboxd.cli import checkout
from sandboxd.client.pulling import pull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import SessionInfo

__all__ = ["users"]
pytestmark = pytest.mark.usefixtures("agreements")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    (place / "src").mkdir(parents=True)
    for name in ("src/a", "src/b", "gone", "mode"):
        (place / name).write_text(f"{name}\n")
    (place / ".git").mkdir()
    (place / ".git" / "config").write_text("[core]\n")
    time.sleep(0.01)
    return place


@pytest.fixture
def lent(daemon: Daemon, directory: Path) -> Iterator[SessionInfo]:
    made = daemon.client().create_session(directory=directory, policy="kept")
    yield made
    daemon.client().delete_session(made.id)


CHANGE = """
echo changed >src/a; rm gone; chmod 755 mode; mkdir -p new/deep; printf x >new/deep/f; ln -s ../src/a new/link
"""


def test_changes_are_brought_and_only_once(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    sh(daemon, lent, CHANGE)
    pulled = pull(daemon.client(), lent.id, directory)
    assert pulled.refused == []
    assert sorted(pulled.applied) == ["gone", "mode", "new", "new/deep", "new/deep/f", "new/link", "src/a"]
    assert content(directory) == {
        ".git": "directory",
        ".git/config": "[core]\n",
        "mode": "mode\n",
        "new": "directory",
        "new/deep": "directory",
        "new/deep/f": "x",
        "new/link": "-> ../src/a",
        "src": "directory",
        "src/a": "changed\n",
        "src/b": "src/b\n",
    }
    assert (directory / "mode").stat().st_mode & 0o777 == 0o755
    again = pull(daemon.client(), lent.id, directory)
    assert (again.applied, again.refused) == ([], [])
    sh(daemon, lent, "echo more >>src/a; echo y >>new/deep/f")
    further = pull(daemon.client(), lent.id, directory)
    assert (sorted(further.applied), further.refused) == (["new/deep/f", "src/a"], [])
    assert (directory / "src" / "a").read_text() == "changed\nmore\n"
    (directory / "src" / "a").write_text("mine\n")
    sh(daemon, lent, "echo again >>src/a")
    assert [one.path for one in pull(daemon.client(), lent.id, directory).refused] == ["src/a"]
    assert (directory / "src" / "a").read_text() == "mine\n"
    (directory / "new" / "deep" / "f").unlink()
    sh(daemon, lent, "echo again >>new/deep/f")
    (refused,) = [one for one in pull(daemon.client(), lent.id, directory).refused if one.path != "src/a"]
    assert (refused.path, refused.reason) == ("new/deep/f", "it was removed here, and changed in the session")


def test_what_changed_on_both_sides_is_refused(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    sh(
        daemon,
        lent,
        "echo theirs >src/a; rm gone; echo theirs >new; echo same >same; rm mode",
    )
    (directory / "src" / "a").write_text("mine\n")
    (directory / "gone").write_text("mine\n")
    (directory / "new").write_text("mine\n")
    (directory / "same").write_text("same\n")
    before = content(directory)
    pulled = pull(daemon.client(), lent.id, directory)
    assert {one.path: one.reason for one in pulled.refused} == {
        "src/a": "it was changed here as well since the session was made",
        "gone": "it was changed here since the session was made, and removed in it",
        "new": "it was changed here as well since the session was made",
    }
    assert (pulled.already, pulled.applied) == ([], ["mode"])
    del before["mode"]
    assert content(directory) == before


def test_what_a_tool_may_not_bring(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    """Hooks of git, links out of the directory, special files, set-id bits."""
    sh(
        daemon,
        lent,
        "echo bad >.git/config; mkdir -p .git/hooks sub/.git; echo bad >.git/hooks/pre-commit;"
        "echo bad >sub/.git/x; ln -s /etc/passwd abs; ln -s ../../etc rel; ln -s src/../../x round;"
        "mkfifo fifo; rm -r src; ln -s /tmp src;"
        "echo x >setuid; chmod 6755 setuid",
    )
    before = content(directory)
    pulled = pull(daemon.client(), lent.id, directory)
    reasons = {one.path: one.reason for one in pulled.refused}
    assert {path for path, why in reasons.items() if ".git" in why} == {
        ".git/config", ".git/hooks", ".git/hooks/pre-commit", "sub/.git", "sub/.git/x",
    }  # fmt: skip
    assert {path for path, why in reasons.items() if "leads out" in why} == {"abs", "rel", "round", "src"}
    assert reasons["fifo"] == "it is a fifo"
    assert (directory / "setuid").stat().st_mode & 0o7777 == 0o755
    now = content(directory)
    assert {path: now.get(path) for path in before if not path.startswith("src")} == {
        path: what for path, what in before.items() if not path.startswith("src")
    }
    with_git = pull(daemon.client(), lent.id, directory, git=True)
    assert (directory / ".git" / "hooks" / "pre-commit").read_text() == "bad\n"
    assert "sub/.git/x" in with_git.applied


def test_links_of_the_directory_are_not_followed(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    """Where a directory became a link here, nothing is written through it."""
    sh(daemon, lent, "echo theirs >src/new; echo theirs >src/a; rm src/b")
    outside = directory.parent / "outside"
    (directory / "src").rename(outside)
    (directory / "src").symlink_to(outside)
    before = content(outside)
    pulled = pull(daemon.client(), lent.id, directory)
    assert pulled.applied == []
    assert {one.path for one in pulled.refused} == {"src", "src/new", "src/a"}
    assert content(outside) == before


def test_links_lead_nowhere_by_way_of_others(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    """Each of a pair of links is harmless, and together they lead out; and links to what runs programs."""
    outside = directory.parent / "outside"
    outside.write_text("of the host\n")
    sh(
        daemon,
        lent,
        "mkdir -p a/b; ln -s ../.. a/b/s; ln -s a/b/s/../../outside y; ln -s ./../outside dot;"
        "ln -s .git/hooks hooks; ln -s ../.GIT/hooks src/hooks; ln -s ../../src/a a/b/ok;"
        "ln -s ../../.. a/b/up",
    )
    pulled = pull(daemon.client(), lent.id, directory)
    reasons = {one.path: one.reason for one in pulled.refused}
    assert set(reasons) == {"y", "dot", "a/b/up", "hooks", "src/hooks"}
    assert all("leads out" in reasons[path] for path in ("y", "dot", "a/b/up"))
    assert "into .git" in reasons["hooks"]
    assert {"a/b/s", "a/b/ok"} <= set(pulled.applied)
    for found in directory.rglob("*"):
        assert found.resolve().is_relative_to(directory)


def test_git_is_git_in_any_spelling(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    names = [".GIT", ".Git", "git~1", "GIT~1", ".git.", ".g\u200cit"]
    quoted = " ".join(f"'{name}' 'new/{name}'" for name in names)
    sh(daemon, lent, f"for n in {quoted}; do mkdir -p $n; echo bad >$n/config; done; echo x >.gitignore")
    pulled = pull(daemon.client(), lent.id, directory)
    assert sorted(pulled.applied) == [".gitignore", "new"]
    assert len(pulled.refused) == 4 * len(names)
    assert {one.reason for one in pulled.refused} == {"it is in .git; ask for it with --git"}


def test_one_file_that_is_refused_ends_no_pull(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    """A file that the daemon does not give, and one that is over what a pull may bring."""
    sh(daemon, lent, "echo 1 >before; truncate -s 1025M huge; head -c 3000000 /dev/zero >mid; echo 2 >zlast")
    pulled = pull(daemon.client(), lent.id, directory, most=2_000_000)
    assert sorted(pulled.applied) == ["before", "zlast"]
    reasons = {one.path: one.reason for one in pulled.refused}
    assert set(reasons) == {"huge", "mid"}
    assert "of files that one pull brings" in reasons["mid"]
    pulled = pull(daemon.client(), lent.id, directory)
    assert pulled.applied == ["mid"]
    (refused,) = pulled.refused
    assert refused.path == "huge"
    assert "1Gi" in refused.reason
    assert not (directory / "huge").exists()
    assert not list(directory.glob(".sandboxd-pull-*"))
    done = run(daemon, "sandboxd", "session", "pull", lent.id, "--most", "lots", cwd=directory)
    assert done.returncode != 0
    assert "--most: 'lots' is not a size" in done.stderr


def test_a_daemon_that_goes_away_meanwhile(tmp_path_factory: pytest.TempPathFactory, directory: Path) -> None:
    """What was brought until then is told, and the rest is refused, without asking for each of it."""
    needs_containers()
    count = 400
    with start_daemon(tmp_path_factory.mktemp("leaving"), config=CONFIG) as leaving:
        give_policies(leaving)
        made = leaving.client().create_session(directory=directory, policy="kept")
        sh(leaving, made, f"for n in $(seq 1000 {999 + count}); do head -c 100000 /dev/zero >f$n; done")

        def stop() -> None:
            end = time.monotonic() + 60
            while not (directory / "f1020").exists() and time.monotonic() < end:
                time.sleep(0.001)
            leaving.process.terminate()

        stopping = threading.Thread(target=stop)
        stopping.start()
        pulled = pull(Client(leaving.socket, reconnect=0.5), made.id, directory)
        stopping.join()
    assert len(pulled.applied) + len(pulled.refused) == count
    assert pulled.applied
    assert pulled.refused
    assert {one.name for one in directory.glob("f1*")} == set(pulled.applied)


def test_holes_stay_holes(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    program = "truncate -s 64M sparse; for at in 0 5000 40000000 67108859; do printf abc |"
    program += " dd of=sparse bs=1 seek=$at conv=notrunc; done; : >none; truncate -s 5 five"
    sh(daemon, lent, program)
    assert pull(daemon.client(), lent.id, directory).refused == []
    expected = bytearray(64 << 20)
    for at in (0, 5000, 40_000_000, 67_108_859):
        expected[at : at + 3] = b"abc"
    assert (directory / "sparse").read_bytes() == expected
    assert (directory / "sparse").stat().st_blocks * 512 < 1 << 20
    assert ((directory / "none").read_bytes(), (directory / "five").read_bytes()) == (b"", bytes(5))


def test_a_tool_makes_nothing_writable_to_others(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    (directory / "src" / "b").chmod(0o664)
    time.sleep(0.01)
    program = "umask 0; for n in src/a src/b mode gone new; do echo x >>$n; chmod 777 $n; done; mkdir wide;"
    before = os.umask(0o027)
    try:
        made = daemon.client().create_session(directory=directory, policy="kept")
        sh(daemon, made, program + "chmod 777 src; chmod 666 gone")
        assert pull(daemon.client(), made.id, directory).refused == []
        assert pull(daemon.client(), made.id, directory).applied == []
        daemon.client().delete_session(made.id)
    finally:
        os.umask(before)
    modes = {str(one.relative_to(directory)): one.stat().st_mode & 0o7777 for one in directory.rglob("*")}
    assert {path: oct(modes[path]) for path in ("src", "src/a", "src/b", "mode", "gone", "new", "wide")} == {
        "src": "0o755",  # as it was: others could read it
        "src/a": "0o754",
        "src/b": "0o774",
        "mode": "0o754",
        "gone": "0o644",
        "new": "0o750",
        "wide": "0o750",
    }


def test_a_tool_closes_no_directory_to_its_owner(daemon: Daemon, users: Path) -> None:
    """Neither what is to be in it is refused then, nor is it lost to later pulls."""
    change = "chmod 755 src; chmod 644 src/a; echo more >>src/a; chmod 0 src/a; chmod 0 src; mkdir dir{0}"
    change += "; echo b >dir{0}/b; chmod 555 dir{0}"
    with by(USER, daemon):
        client = daemon.client()
        made = client.create_session(directory=users)
        for number in range(2):
            done = client.run(["sh", "-c", change.format(number)], session=made.id, policy="kept")
            assert said(done) == ""
            pulled = client.pull(made.id, users)
            assert (pulled.refused, pulled.unnoted) == ([], None)
            assert (users / f"dir{number}" / "b").read_text() == "b\n"
            assert stat.S_IMODE((users / f"dir{number}").stat().st_mode) == 0o555
            assert stat.S_IMODE((users / "src").stat().st_mode) == 0o500
            assert stat.S_IMODE((users / "src" / "a").stat().st_mode) == 0o400
        client.delete_session(made.id)
    assert (users / "src" / "a").read_text() == "a\nmore\nmore\n"


def test_what_was_brought_is_told_also_where_it_cannot_be_noted(daemon: Daemon, users: Path) -> None:
    (users.parent / "state").chmod(0o555)
    with by(USER, daemon):
        made = daemon.client().create_session(directory=users)
        daemon.client().run(["sh", "-c", "echo b >b"], session=made.id, policy="kept")
        pulled = daemon.client().pull(made.id, users)
        assert (pulled.applied, pulled.refused) == (["b"], [])
        assert pulled.unnoted is not None
        assert "Permission denied" in pulled.unnoted
        told: list[str] = []
        checkout.told(pulled, told.append)
        assert "warning: what both sides have now could not be noted" in told[-1]
        daemon.client().delete_session(made.id)
    assert (users / "b").read_text() == "b\n"


def test_run_in_sandbox_on_a_directory(daemon: Daemon, directory: Path) -> None:
    sessions = daemon.client().sessions().sessions
    command = ("--policy", "kept", "--", "sh", "-c", "cat src/a; echo changed >src/a; echo 1 >new; exit 3")
    before = content(directory)
    done = run(daemon, "run-in-sandbox", "--workspace", ".", *command, cwd=directory)
    assert (done.returncode, done.stdout) == (3, "src/a\n")
    assert "A new\n" in done.stderr
    assert "M src/a\n" in done.stderr
    assert "--pull brings them" in done.stderr
    assert content(directory) == before
    done = run(daemon, "run-in-sandbox", "--workspace", ".", "--pull", *command, cwd=directory)
    assert (done.returncode, done.stdout) == (3, "src/a\n")
    assert "pulled  src/a\n" in done.stderr
    assert content(directory) == before | {"new": "1\n", "src/a": "changed\n"}
    assert daemon.client().sessions().sessions == sessions
    for options, words in (
        (("--workspace", "gone"), "cannot be opened"),
        (("--workspace", "/"), "/ is not lent"),
        (("--pull",), "--workspace, which is missing"),
        (("--workspace", ".", "--session", "x"), "leave out --session"),
    ):
        done = run(daemon, "run-in-sandbox", *options, "--", "true", cwd=directory)
        assert done.returncode == 125
        assert words in done.stderr


def test_the_commands_of_sessions(daemon: Daemon, directory: Path) -> None:
    made = run(
        daemon, "sandboxd", "session", "create", "mine", "--from", ".", "--policy", "kept", cwd=directory
    )
    assert made.stdout == "mine\n", made.stderr
    try:
        sh(daemon, daemon.client().session("mine"), "echo 2 >>src/a; printf '\\033[31m\\0' >binary; rm gone")
        told = run(daemon, "sandboxd", "session", "diff", "mine", cwd=directory)
        assert told.stdout == "A binary\nD gone\nM src/a\n"
        text = run(daemon, "sandboxd", "session", "diff", "mine", "--text", cwd=directory)
        assert "A binary  (binary)\n--- a/gone\n+++ /dev/null\n" in text.stdout
        assert "\n src/a\n+2\n" in text.stdout
        (directory / "gone").write_text("mine\n")
        pulled = run(daemon, "sandboxd", "session", "pull", "mine", "--json", cwd=directory)
        assert pulled.returncode != 0
        assert json.JSONDecoder().raw_decode(pulled.stdout)[0]["applied"] == ["binary", "src/a"]
        assert "1 changes were not brought" in pulled.stdout + pulled.stderr
        assert run(daemon, "sandboxd", "session", "lend", "mine", cwd=directory).returncode == 0
        refused = run(daemon, "sandboxd", "session", "create", "--from", "gone/x", cwd=directory)
        assert "cannot be opened" in refused.stderr
    finally:
        daemon.client().delete_session("mine")
