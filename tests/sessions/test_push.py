"""What a directory has goes into a session and comes back; what changed on both sides stays on both."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sessioned import by, layers, said, sh

from sandboxd import Client, errors, models
from sandboxd.client import checkout, pushing, wire
from sandboxd.client.agreement import Agreement
from sandboxd.client.calls.call import Call
from sandboxd.client.pulling import pull
from sandboxd.client.pushing import push

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import SessionInfo

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.usefixtures("agreements")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    for name, text in {
        ".gitignore": "*.o\n/out/\n",
        ".git/config": "[core]\n",
        ".git/info/exclude": "private\n",
        "src/main.c": "main\n",
        "src/main.o": "object\n",
        "src/.gitignore": "!kept.o\n",
        "src/kept.o": "kept\n",
        "out/big": "big\n",
        "private": "private\n",
        "gone": "gone\n",
        "-rf": "option\n",
    }.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    (place / "run").write_text("#!/bin/sh\n")
    (place / "run").chmod(0o750)
    (place / "empty").mkdir(mode=0o700)
    (place / "src" / "link").symlink_to("main.c")
    (place / "outside").symlink_to("/etc/passwd")
    os.utime(place / "src" / "main.c", (1_000_000_000, 1_000_000_000))
    return place


@pytest.fixture
def lent(daemon: Daemon, directory: Path) -> Iterator[SessionInfo]:
    time.sleep(0.01)
    made = daemon.client().create_session(directory=directory, policy="kept")
    yield made
    daemon.client().delete_session(made.id)


def reasons(refused: list[Any]) -> dict[str, str]:
    return {one.path: one.reason for one in refused}


UPLOADED = {
    "-rf", ".gitignore", "empty", "gone", "outside", "run", "src", "src/.gitignore", "src/kept.o", "src/link",
    "src/main.c",
}  # fmt: skip


def test_a_directory_is_uploaded_as_one_checkpoint(
    daemon: Daemon, session: SessionInfo, directory: Path
) -> None:
    client = daemon.client()
    pushed = push(client, session.id, directory)
    assert set(pushed.sent) == UPLOADED
    assert (pushed.removed, pushed.refused, pushed.left, pushed.ignored) == ([], [], [], 3)
    head = client.session(session.id).head
    assert (head.id, head.parent) == (pushed.checkpoint, session.head.id)
    look = (
        "cat src/main.c src/link; stat -c '%u %a %n' run empty src; stat -c %Y src/main.c; readlink outside"
    )
    assert said(sh(daemon, session, look)) == (
        "main\nmain\n1000 750 run\n1000 700 empty\n1000 755 src\n1000000000\n/etc/passwd\n"
    )
    assert said(sh(daemon, session, "echo more >>src/main.c; ls -A . src")).split() == [
        ".:", "-rf", ".gitignore", "empty", "gone", "outside", "run", "src", "src:", ".gitignore", "kept.o",
        "link", "main.c",
    ]  # fmt: skip
    git = push(client, session.id, directory, git=True)
    assert {".git", ".git/config", ".git/info", ".git/info/exclude"} == set(git.sent)


def test_only_what_changed_is_sent(daemon: Daemon, session: SessionInfo, directory: Path) -> None:
    client = daemon.client()
    push(client, session.id, directory)
    before = layers(daemon)
    again = push(client, session.id, directory)
    assert (again.sent, again.removed, again.checkpoint, again.size) == ([], [], None, 0)
    assert layers(daemon) == before
    (directory / "src" / "main.c").write_text("other\n")
    (directory / "run").chmod(0o700)
    (directory / "gone").unlink()
    (directory / "empty").rmdir()
    (directory / "new" / "deep").mkdir(parents=True)
    (directory / "new" / "deep" / "f").write_text("f\n")
    (directory / "src" / "link").unlink()
    (directory / "src" / "link").symlink_to("kept.o")
    (directory / "-rf").unlink()
    (directory / "-rf").mkdir()
    (directory / "-rf" / "x").touch()
    changed = push(client, session.id, directory)
    assert set(changed.sent) == {
        "src/main.c", "run", "new", "new/deep", "new/deep/f", "src/link", "-rf", "-rf/x",
    }  # fmt: skip
    assert (set(changed.removed), changed.refused) == ({"gone", "empty"}, [])
    assert changed.size == len("other\n" + "#!/bin/sh\n" + "f\n")
    look = "cat src/main.c src/link new/deep/f; stat -c %a run; ls -A . ./-rf"
    assert said(sh(daemon, session, look)) == (
        "other\nkept\nf\n700\n.:\n-rf\n.gitignore\nnew\noutside\nrun\nsrc\n\n./-rf:\nx\n"
    )
    # Without what is known on this side: by the digests of the session's own list.
    for one in (directory.parent / "xdg" / "sandboxd" / "agreements").iterdir():
        one.unlink()
    (directory / "more").write_text("more\n")
    (directory / "src" / "main.c").write_text("third\n")
    fresh = push(client, session.id, directory)
    assert fresh.sent == ["more"]
    assert reasons(fresh.refused) == {"src/main.c": "the session has it, with other content"}
    assert push(client, session.id, directory, force=True).sent == ["src/main.c"]


def test_both_sides_keep_their_changes(daemon: Daemon, session: SessionInfo, directory: Path) -> None:
    client = daemon.client()
    push(client, session.id, directory)
    theirs = "for f in src/main.c new src/theirs; do echo theirs >$f; done; rm gone; echo x >>run"
    sh(daemon, session, theirs + "; mkdir -p d/e; : >d/e/f")
    for name in ("src/main.c", "new", "gone", "mine"):
        (directory / name).write_text("mine\n")
    head = client.session(session.id).head.id
    pushed = push(client, session.id, directory)
    assert pushed.sent == ["mine"]
    assert reasons(pushed.refused) == {
        "gone": "it changed on both sides",
        "new": "the session has it, with other content",
        "src/main.c": "it changed on both sides",
    }
    assert client.session(session.id).head.parent == head
    pulled = pull(client, session.id, directory)
    assert set(pulled.applied) == {"src/theirs", "run", "d", "d/e", "d/e/f"}
    assert reasons(pulled.refused) == {
        "src/main.c": "it was changed here as well since the session was made",
        "new": "it is here already, with other content",
        "gone": "it was changed here since the session was made, and removed in it",
    }
    assert (directory / "run").read_text() == "#!/bin/sh\nx\n"
    assert stat.S_IMODE((directory / "run").stat().st_mode) == 0o750
    # What was pulled is no change of this side.
    assert push(client, session.id, directory).sent == []
    assert set(pull(client, session.id, directory).applied) == set()
    (directory / "d" / "e" / "f").unlink()
    (directory / "d" / "e").rmdir()
    (directory / "src" / "theirs").write_text("mine too\n")
    pushed = push(client, session.id, directory)
    assert (pushed.sent, set(pushed.removed)) == (["src/theirs"], {"d/e", "d/e/f"})
    forced = push(client, session.id, directory, force=True)
    assert set(forced.sent) == {"src/main.c", "new", "gone"}
    assert said(sh(daemon, session, "cat src/main.c new gone src/theirs")) == "mine\nmine\nmine\nmine too\n"
    sh(daemon, session, "echo theirs >src/main.c; rm new")
    (directory / "src" / "main.c").write_text("mine again\n")
    (directory / "new").write_text("mine again\n")
    assert set(reasons(pull(client, session.id, directory).refused)) == {"src/main.c", "new"}
    assert set(pull(client, session.id, directory, force=True).applied) == {"src/main.c", "new"}
    assert (directory / "src" / "main.c").read_text() == "theirs\n"
    assert not (directory / "new").exists()


def test_what_is_removed_with_what_a_session_has_in_it(
    daemon: Daemon, session: SessionInfo, directory: Path
) -> None:
    """A directory stays as long as the session has anything in it that this side does not know."""
    client = daemon.client()
    (directory / "d").mkdir()
    (directory / "d" / "f").touch()
    (directory / "e").mkdir()
    (directory / "e" / "f").touch()
    push(client, session.id, directory)
    sh(daemon, session, "echo theirs >d/theirs; echo theirs >e/theirs; rm -r src; echo a file >src")
    for name in ("d", "e"):
        (directory / name / "f").unlink()
        (directory / name).rmdir()
    (directory / "e").write_text("a file\n")
    (directory / "src" / "new.c").write_text("new\n")
    pushed = push(client, session.id, directory)
    assert set(pushed.removed) == {"d/f", "e/f"}
    assert reasons(pushed.refused) == {
        "e": "the session has a directory there, with files that are not here",
        "src/new.c": "its directory is a file in the session",
    }
    assert said(sh(daemon, session, "cat d/theirs e/theirs src")) == "theirs\ntheirs\na file\n"


def test_what_cannot_be_read_is_not_taken_for_removed(
    daemon: Daemon, session: SessionInfo, directory: Path
) -> None:
    client = daemon.client()
    (directory / "d").mkdir()
    (directory / "d" / "f").write_text("f\n")
    push(client, session.id, directory)
    for one in (directory / "run", directory / "gone"):
        one.unlink()
    os.mkfifo(directory / "run")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", directory / "d"], check=True)
    try:
        pushed = push(client, session.id, directory)
    finally:
        subprocess.run(["umount", directory / "d"], check=True)
    assert (pushed.sent, pushed.removed) == ([], ["gone"])
    assert reasons(pushed.left) == {"run": "it is a FIFO", "d": "another file system is mounted there"}
    assert said(sh(daemon, session, "cat d/f run")) == "f\n#!/bin/sh\n"
    # A file that was taken up by a pull and is ignored here is not missed.
    sh(daemon, session, "mkdir out; echo made >out/made; echo made >made.o")
    assert set(pull(client, session.id, directory).applied) == {"out/made", "made.o"}
    (directory / "made.o").unlink()
    assert push(client, session.id, directory).removed == []
    assert said(sh(daemon, session, "ls made.o out")) == "made.o\n\nout:\nmade\n"


def test_nothing_of_a_push_that_breaks_is_there(
    daemon: Daemon, session: SessionInfo, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = daemon.client()
    (directory / "zlast").write_bytes(os.urandom(4 << 20))
    real = checkout.chunks_of

    def changing(root: int, found: Any) -> Iterator[bytes]:
        if found.path == b"zlast":
            with (directory / "zlast").open("ab") as file:
                file.write(b"more")
        yield from real(root, found)

    monkeypatch.setattr(pushing, "chunks_of", changing)
    with pytest.raises(errors.StateConflict, match="changed while it was sent"):
        push(client, session.id, directory)
    assert client.session(session.id).head.id == session.head.id
    assert client.session_files(session.id).files == []
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(directory.parent / "xdg"))
    # It takes a session as it stands: a call that ran meanwhile is seen, and all is compared again.
    listed = pushing.files_there
    raced: list[int] = []

    def racing(*arguments: Any) -> Any:
        found = listed(*arguments)
        if not raced:
            raced.append(1)
            sh(daemon, session, "echo theirs >gone")
        return found

    monkeypatch.setattr(pushing, "files_there", racing)
    pushed = push(client, session.id, directory)
    assert reasons(pushed.refused) == {"gone": "the session has it, with other content"}
    assert set(pushed.sent) == UPLOADED - {"gone"} | {"zlast"}
    assert said(sh(daemon, session, "cat gone")) == "theirs\n"
    small = client.create_session(size="1MiB")
    try:
        with pytest.raises(errors.QuotaExceeded):
            push(client, small.id, directory)
        assert client.session(small.id).head.id == small.head.id
        with by(4242, daemon), pytest.raises(errors.NotFound):
            push(daemon.client(), small.id, "/")
    finally:
        client.delete_session(small.id)


def test_many_small_files_go_in_one_request(daemon: Daemon, session: SessionInfo, directory: Path) -> None:
    client = daemon.client()
    for number in range(2500):
        place = directory / f"many{number % 50}"
        place.mkdir(exist_ok=True)
        (place / f"f{number}").write_text(f"{number}\n")
    pushed = push(client, session.id, directory)
    assert len(pushed.sent) == len(UPLOADED) + 2550
    assert len(client.checkpoints(session.id).checkpoints) == 2
    assert said(sh(daemon, session, "cat many*/f* | wc -l")) == "2500\n"
    (directory / "many7" / "f7").write_text("other\n")
    assert push(client, session.id, directory).sent == ["many7/f7"]


HOSTILE = r"""
mkdir -p src/.git/hooks; echo bad >src/.git/hooks/pre-commit; echo bad >.GIT
ln -s /etc abs; ln -s ../../x up
ln -s . self; mkfifo pipe
printf x >"$(printf '\033]0;x\007')"; printf y >"$(printf 'a\nb')"; printf z >./--force
chmod 6755 run; truncate -s 1025M huge; truncate -s 300M sparse; python3 -c '
import os
for _ in range(20):
    os.mkdir("d" * 250); os.chdir("d" * 250)
open("end", "w")
'
"""


def test_what_a_hostile_tool_left_is_pulled_safely(
    daemon: Daemon, session: SessionInfo, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the directory that was pushed, and into another, which knows nothing of the session."""
    client = daemon.client()
    push(client, session.id, directory)
    said(sh(daemon, session, HOSTILE, policy="snakes"))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "gone").write_text("gone\n")
    (fresh / "run").write_text("mine\n")
    (fresh / "src").symlink_to(tmp_path)
    for place in (directory, fresh):
        pulled = pull(client, session.id, place)
        refused = reasons(pulled.refused)
        assert {"src/.git", "src/.git/hooks", "src/.git/hooks/pre-commit", ".GIT"} <= set(refused)
        assert refused["pipe"] == "it is a fifo"
        assert "leads out" in refused["abs"] + refused["up"]
        assert "1GiB" in refused["huge"] or "1Gi" in refused["huge"]
        assert "over 4,095 bytes" in refused[""]
        assert (place / "a\nb").read_text() == "y"
        assert (place / "\x1b]0;x\x07").read_text() == "x"
        assert (place / "--force").read_text() == "z"
        assert not (place / "run").stat().st_mode & 0o6000
        assert (place / "sparse").stat().st_size == 300 << 20
        assert (place / "sparse").stat().st_blocks < 100
        assert not {"huge", "pipe", "abs", "up"} & {one.name for one in place.iterdir()}
    assert (fresh / "run").read_text() == "mine\n"
    assert "gone" in pull(client, session.id, fresh).already or (fresh / "gone").read_text() == "gone\n"
    assert not {"main.c", "kept.o"} & {one.name for one in tmp_path.iterdir()}
    # And it is listed, and pushed to again, as if nothing were.
    done = run(daemon, "sandboxd", "session", "pull", session.id, str(directory), cwd=tmp_path)
    assert "\x1b" not in done.stdout + done.stderr
    assert done.returncode == 1
    (directory / "mine").write_text("mine\n")
    assert push(client, session.id, directory).sent == ["mine"]
    monkeypatch.setattr(pushing, "MAX_DIGESTED", 200 << 20)  # what a thousand sparse files would be
    for bring in (push, pull):
        with pytest.raises(errors.TooLarge, match="holes included"):
            bring(client, session.id, directory)


def test_what_a_session_on_the_directory_changed_is_pushed_over(
    daemon: Daemon, lent: SessionInfo, directory: Path
) -> None:
    client = daemon.client()
    sh(
        daemon,
        lent,
        "echo theirs >src/main.c; echo theirs >both; rm gone; echo theirs >untouched; rm -r empty",
    )
    assert push(client, lent.id, directory).sent == []
    assert set(pull(client, lent.id, directory).applied) == {
        "src/main.c",
        "both",
        "gone",
        "untouched",
        "empty",
    }
    (directory / "src" / "main.c").write_text("mine\n")
    (directory / "both").write_text("mine\n")
    (directory / "untouched").unlink()
    (directory / "shown").write_text("shown\n")  # by itself
    sh(daemon, lent, "echo again >both")
    pushed = push(client, lent.id, directory)
    assert (pushed.sent, pushed.removed) == (["src/main.c"], ["untouched"])
    assert reasons(pushed.refused) == {"both": "it changed on both sides"}
    assert said(sh(daemon, lent, "cat src/main.c both shown; ls untouched 2>&1 || true")).startswith(
        "mine\nagain\nshown\n"
    )
    assert push(client, lent.id, directory, force=True).sent == ["both"]
    assert said(sh(daemon, lent, "cat both")) == "mine\n"
    sh(daemon, lent, "echo made >made; echo theirs >run")
    (directory / "run").write_text("mine\n")
    assert reasons(push(client, lent.id, directory).refused) == {"run": "it changed on both sides"}


def test_a_fork_of_a_session_on_a_directory(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    client = daemon.client()
    sh(daemon, lent, "echo first >first; rm gone")
    first = client.session(lent.id).head
    sh(daemon, lent, "echo second >second")
    (directory / "src" / "main.c").write_text("mine\n")
    time.sleep(0.01)
    fork = client.fork_session(lent.id, checkpoint=first.id)
    other = client.fork_session(lent.id)
    try:
        assert (fork.checkout, fork.lent) == ("lent", lent.created)
        assert (
            said(sh(daemon, fork, "cat first src/main.c; ls gone second 2>/dev/null || true"))
            == "first\nmine\n"
        )
        assert said(sh(daemon, other, "cat first second; echo other >src/main.c")) == "first\nsecond\n"
        sh(daemon, fork, "echo forked >src/main.c; echo forked >forked")
        assert said(sh(daemon, lent, "cat src/main.c; ls")).split() == [
            "mine", "-rf", "empty", "first", "out", "outside", "private", "run", "second", "src",
        ]  # fmt: skip
        client.delete_session(other.id)
        pulled = pull(client, fork.id, directory)  # also what came before the fork
        assert set(pulled.applied) == {"first", "forked", "gone"}
        assert reasons(pulled.refused) == {
            "src/main.c": "it was changed here as well since the session was made"
        }
        assert (directory / "src" / "main.c").read_text() == "mine\n"
        with pytest.raises(errors.InvalidRequest, match="leave it out"):
            client._do(_fork_on(lent.id))
        with by(4243, daemon), pytest.raises(errors.NotFound):
            daemon.client().fork_session(lent.id)
    finally:
        client.delete_session(fork.id)


def _fork_on(session: str) -> Any:
    body = json.dumps({"checkout": "a handle"}).encode()
    exchange = wire.Exchange("POST", wire.target("sessions", session, "fork"), body)
    return Call(exchange, models.SessionInfo.model_validate_json)


def test_a_fork_outlives_what_it_was_made_of(daemon: Daemon, directory: Path) -> None:
    """What was removed of the directory stays removed when the layers of both are merged."""
    client = daemon.client()
    made = client.create_session(directory=directory, policy="kept")
    sh(daemon, made, "rm gone run; rm -r src; mkdir src; echo only >src/only")
    fork = client.fork_session(made.id)
    client.delete_session(made.id)
    try:
        for number in range(36):
            sh(daemon, fork, f"echo {number} >f{number % 3}")
        end = time.monotonic() + 20
        while client.session(fork.id).layers > 12 and time.monotonic() < end:
            time.sleep(0.1)
        assert client.session(fork.id).layers <= 12
        assert said(sh(daemon, fork, "ls . src")).split() == [
            ".:", "-rf", "empty", "f0", "f1", "f2", "out", "outside", "private", "src", "src:", "only",
        ]  # fmt: skip
    finally:
        client.delete_session(fork.id)


def run(daemon: Daemon, program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / program, *arguments],
        cwd=cwd,
        env=os.environ | {"SANDBOXD_SOCKET": str(daemon.socket)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_commands(daemon: Daemon, directory: Path, tmp_path: Path) -> None:
    client = daemon.client()
    count = len(client.sessions().sessions)
    made = run(
        daemon,
        "sandboxd",
        "session",
        "create",
        "up",
        "--from",
        ".",
        "--upload",
        "--policy",
        "kept",
        cwd=directory,
    )
    assert (made.returncode, made.stdout) == (0, "up\n"), made.stderr
    assert made.stderr == "sandboxd: sent 11 files, 50B, 3 ignored\n"
    try:
        assert client.session("up").checkout is None
        assert run(daemon, "sandboxd", "session", "push", "up", cwd=directory).stdout == ""
        (directory / "src" / "main.c").write_text("mine\n")
        sh(daemon, "up", "cat src/main.c; echo theirs >gone; echo new >new")
        assert (
            run(daemon, "sandboxd", "session", "push", "up", cwd=directory).stdout == "pushed  src/main.c\n"
        )
        (directory / "gone").write_text("mine\n")
        pushed = run(daemon, "sandboxd", "session", "push", "up", "--json", cwd=directory)
        assert pushed.returncode == 1
        document = json.JSONDecoder().raw_decode(pushed.stdout)[0]
        assert document["refused"] == [{"path": "gone", "reason": "it changed on both sides"}]
        pulled = run(daemon, "sandboxd", "session", "pull", "up", cwd=directory)
        assert "pulled  new\n" in pulled.stdout
        assert "1 changes were not brought" in pulled.stderr
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for command in ("pull", "push"):  # nobody's home is sent by mistake
            done = run(daemon, "sandboxd", "session", command, "up", cwd=elsewhere)
            assert (done.returncode, "have nothing in common yet" in done.stderr) == (1, True)
        done = run(daemon, "sandboxd", "session", "pull", "up", str(elsewhere), cwd=directory)
        assert (elsewhere / "gone").read_text() == "theirs\n"
        assert done.returncode == 1  # a link to /etc is not brought
        agreements = tmp_path / "xdg" / "sandboxd" / "agreements"
        assert len(list(agreements.iterdir())) == 2
        assert run(daemon, "sandboxd", "session", "push", "up", "--force", cwd=directory).returncode == 0
        for options, words in (
            (("--upload",), "--upload is of --from"),
            (("--from", "nowhere", "--upload"), "'nowhere' cannot be opened"),
        ):
            done = run(daemon, "sandboxd", "session", "create", *options, cwd=directory)
            assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    finally:
        assert run(daemon, "sandboxd", "session", "rm", "up", cwd=directory).returncode == 0
    assert list(agreements.iterdir()) == []
    assert len(client.sessions().sessions) == count


def test_run_in_sandbox_on_a_copy(daemon: Daemon, directory: Path, tmp_path: Path) -> None:
    sessions = daemon.client().sessions().sessions
    command = (
        "--policy",
        "kept",
        "--",
        "sh",
        "-c",
        "cat src/main.c; echo changed >src/main.c; echo 1 >new; exit 3",
    )
    os.mkfifo(directory / "fifo")
    done = run(daemon, "run-in-sandbox", "--workspace", ".", "--upload", *command, cwd=directory)
    assert (done.returncode, done.stdout) == (3, "main\n")
    assert "not sent: fifo: it is a FIFO" in done.stderr
    assert "A new\n" in done.stderr
    assert "M src/main.c\n" in done.stderr
    assert "src/kept.o" not in done.stderr
    assert (directory / "src" / "main.c").read_text() == "main\n"
    done = run(daemon, "run-in-sandbox", "--workspace", ".", "--upload", "--pull", *command, cwd=directory)
    assert (done.returncode, done.stdout) == (3, "main\n")
    assert "pulled  src/main.c\n" in done.stderr
    assert (directory / "src" / "main.c").read_text() == "changed\n"
    assert (directory / "new").read_text() == "1\n"
    assert daemon.client().sessions().sessions == sessions
    assert list((tmp_path / "xdg" / "sandboxd" / "agreements").iterdir()) == []
    done = run(daemon, "run-in-sandbox", "--upload", "--", "true", cwd=directory)
    assert (done.returncode, "--workspace, which is missing" in done.stderr) == (125, True)
    overlay = tmp_path / "overlay"  # a file system that cannot be lent: the message says what can be done
    for name in ("lower", "upper", "work", "merged"):
        (overlay / name).mkdir(parents=True)
    (overlay / "lower" / "f").write_text("f\n")
    options = ",".join(f"{key}dir={overlay / key}" for key in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", overlay / "merged"], check=True)
    try:
        done = run(daemon, "run-in-sandbox", "--workspace", ".", "--", "cat", "f", cwd=overlay / "merged")
        assert (done.returncode, "--upload" in done.stderr) == (125, True)
        done = run(
            daemon, "run-in-sandbox", "--workspace", ".", "--upload", "--", "cat", "f", cwd=overlay / "merged"
        )
        assert (done.returncode, done.stdout) == (0, "f\n"), done.stderr
    finally:
        subprocess.run(["umount", overlay / "merged"], check=True)


def test_what_is_known_of_a_directory_is_of_that_directory(
    daemon: Daemon, session: SessionInfo, directory: Path, tmp_path: Path
) -> None:
    """A damaged note, one of another version, one of a directory that is elsewhere now: nothing is known."""
    client = daemon.client()
    push(client, session.id, directory)
    (note,) = (tmp_path / "xdg" / "sandboxd" / "agreements").iterdir()
    assert stat.S_IMODE(note.parent.stat().st_mode) == 0o700
    good = note.read_text()
    for bad in (
        "",
        "[]",
        good[:-10],
        good.replace('"version": 1', '"version": 2'),
        '{"version": 1, "directory": 3}',
    ):
        note.write_text(bad)
        fd = os.open(directory, os.O_RDONLY)
        with Agreement(session.id, fd) as agreement:
            assert not agreement.is_known
        os.close(fd)
    note.write_text(good)
    moved = directory.rename(tmp_path / "moved")
    (moved / "gone").unlink()
    assert push(client, session.id, moved).removed == []  # nothing says that it ever was there


def test_two_that_push_at_once(daemon: Daemon, session: SessionInfo, directory: Path) -> None:
    """Each takes the session as it stands: both arrive, and nothing is lost."""
    client = daemon.client()
    push(client, session.id, directory)
    found: list[Any] = []

    def one(name: str) -> None:
        (directory / name).write_text(name)
        found.append(push(Client(daemon.socket), session.id, directory))

    threads = [threading.Thread(target=one, args=(f"n{number}",)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 4
    assert {path for each in found for path in each.sent} == {f"n{number}" for number in range(4)}
    assert all(each.refused == [] for each in found)
    assert said(sh(daemon, session, "cat n?")) == "n0n1n2n3"
