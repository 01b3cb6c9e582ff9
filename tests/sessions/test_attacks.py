"""Attacks on sessions: by the tool inside, by another caller, by a crash, by a disk that is full."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from daemons import until
from sessioned import by, give_policies, layers, said, sh

from sandboxd import errors
from sandboxd.kernel import mounts
from sandboxd.workspace import layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import SessionInfo

PLANTS = """
import os, socket
OVERLAY = ("opaque", "whiteout", "redirect", "metacopy")
def attempt(what, *arguments, **named):
    try:
        what(*arguments, **named)
    except OSError as error:
        print(what.__name__, error.errno is not None)
os.symlink("/etc/shadow", "link")
os.symlink("../../../../../../etc/passwd", "up")
os.symlink("/proc/self/fd/1", "magic")
open("plain", "w").write("plain")
for name in OVERLAY:
    os.setxattr("plain", f"user.overlay.{name}", b"y" if name in OVERLAY[:2] else b"/etc/shadow")
attempt(os.setxattr, "plain", "trusted.overlay.opaque", b"y")
attempt(os.setxattr, "plain", "security.capability", b"\\1\\0\\0\\2" + bytes(16))
attempt(os.mknod, "disk", 0o60666, os.makedev(8, 0))
attempt(os.mknod, "null", 0o20666, os.makedev(1, 3))
attempt(os.mknod, "whiteout", 0o20000, os.makedev(0, 0))
attempt(os.link, "/usr/bin/env", "out")
open(".wh.plain", "w").close()
open(".wh..wh..opq", "w").close()
os.mkfifo("fifo")
listening = socket.socket(socket.AF_UNIX); listening.bind("socket")
os.mkdir("closed", 0); os.mkdir("d")
open("setuid", "w").write("x"); os.chmod("setuid", 0o6777)
open(b"\\xff\\xfe newline\\n", "w").close()
"""


def test_what_a_tool_plants_leads_nowhere(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    found = client.run(["python3", "-c", PLANTS], policy="snakes", session=session.id)
    assert set(said(found).splitlines()) == {f"{what} True" for what in ("setxattr", "mknod", "link")}
    (name,) = layers(daemon)
    kept = daemon.state / "sessions" / "layers" / name
    for one in kept.iterdir():
        status = one.lstat()
        assert not stat.S_ISBLK(status.st_mode)
        assert not stat.S_ISCHR(status.st_mode)
        assert status.st_uid == 1000
        if not one.is_symlink() and (one.is_file() or one.is_dir()):
            assert not os.listxattr(one), one
    assert (kept.parent.stat().st_mode & 0o777, kept.parent.stat().st_uid) == (0o700, 0)
    again = client.run(
        ["python3", "-c", "import os; print(sorted(os.listdir(b'.'))); print(open('plain').read())"],
        policy="snakes",
        session=session.id,
    )
    names = [b".wh..wh..opq", b".wh.plain", b"closed", b"d", b"fifo", b"link", b"magic",
             b"plain", b"setuid", b"socket", b"up", b"\xff\xfe newline\n"]  # fmt: skip
    assert said(again) == f"{names}\nplain\n"
    with pytest.raises(errors.NotFound):
        client.artifact(found.id, "link")


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("files", "i=0; while true; do : > f$i || break; i=$((i+1)); done"),
        ("bytes", "head -c 1G /dev/zero > big"),
        ("a hole", "truncate -s 10G hole; echo end >> hole"),
        ("hard links", "touch a; i=0; while ln a l$i; do i=$((i+1)); [ $i = 2000 ] && break; done"),
    ],
)
def test_bombs_are_bounded_and_go_away(daemon: Daemon, session: SessionInfo, what: str, code: str) -> None:
    before = layers(daemon)
    found = sh(daemon, session, f"({code}) 2> /dev/null; true")
    assert found.outcome is not None
    assert found.outcome.cause == "exited", found.outcome
    for name in layers(daemon) - before:
        blocks = sum(one.lstat().st_blocks for one in (daemon.state / "sessions/layers" / name).iterdir())
        assert blocks * 512 <= 300 << 20
    assert said(sh(daemon, session, "ls | head -3 > /dev/null; echo there")) == "there\n"
    daemon.client().delete_session(session.id)
    until(lambda: layers(daemon) <= before, "it is removed")


def test_a_tree_that_no_path_reaches_is_kept_and_removed(daemon: Daemon, session: SessionInfo) -> None:
    before, client = layers(daemon), daemon.client()
    code = (
        "import os\nfor _ in range(2000): os.mkdir('d' * 20); os.chdir('d' * 20)\nopen('leaf', 'w').close()"
    )
    assert said(client.run(["python3", "-c", code], policy="snakes", session=session.id)) == ""
    code = code.replace("os.mkdir('d' * 20); ", "").replace(
        "open('leaf', 'w').close()", "print(os.listdir('.'))"
    )
    assert said(client.run(["python3", "-c", code], policy="snakes", session=session.id)) == "['leaf']\n"
    client.delete_session(session.id)
    until(lambda: layers(daemon) <= before, "it is removed")


def test_what_runs_on_changes_nothing_that_is_kept(daemon: Daemon, session: SessionInfo) -> None:
    """Processes that a command leaves behind are dead when its files are taken."""
    code = (
        "for i in 1 2 3 4; do (trap '' TERM HUP; setsid sh -c 'while true; do echo x >> busy; mv busy b2; "
        "mv b2 busy; done' > /dev/null 2>&1 &) ; done; sleep 0.2; echo done > file"
    )
    for _ in range(5):
        found = sh(daemon, session, code)
        assert found.outcome is not None
        assert found.outcome.cause == "exited"
        for name in layers(daemon):
            fd = os.open(daemon.state / "sessions/layers" / name, layer.DIRECTORY)
            try:
                assert layer.measure(fd).digest.startswith("sha256:")
            finally:
                os.close(fd)
    journal = sqlite3.connect(f"file:{daemon.state}/journal.sqlite3?mode=ro", uri=True)
    try:
        rows = journal.execute("SELECT layer, content FROM checkpoints WHERE layer IS NOT NULL").fetchall()
    finally:
        journal.close()
    for name, digest in rows:
        fd = os.open(daemon.state / "sessions/layers" / name, layer.DIRECTORY)
        try:
            assert layer.measure(fd).digest == digest  # as it is on disk
        finally:
            os.close(fd)


def test_a_tool_cannot_reach_the_layers_below(daemon: Daemon, session: SessionInfo) -> None:
    sh(daemon, session, "echo kept > file")
    (name,) = layers(daemon)
    at = daemon.state / "sessions/layers" / name / "file"
    before = at.stat()
    code = (
        "grep -c workspace /proc/self/mountinfo; chmod 777 file; echo changed > file; "
        "umount /workspace 2> /dev/null && echo unmounted; "
        "mount --bind /tmp /workspace 2> /dev/null && echo mounted; "
        f"ls {at} 2>/dev/null; cat /proc/self/mountinfo"
    )
    found = sh(daemon, session, code)
    out = said(found)
    assert out.splitlines()[0] == "1"
    assert "mounted" not in out
    assert str(daemon.state) not in out
    assert at.read_text() == "kept\n"
    assert at.stat().st_ctime_ns == before.st_ctime_ns


def test_another_policy_of_root_has_no_more(daemon: Daemon, session: SessionInfo) -> None:
    """A file of the container's root is nobody's on the host while it is shown, and root's alone on disk."""
    assert said(sh(daemon, session, "echo x > of-root; chmod 4755 of-root; id -u", policy="root")) == "0\n"
    assert said(sh(daemon, session, "stat -c '%u %a' of-root; cat of-root")) == "0 4755\nx\n"
    refused = sh(daemon, session, "echo y > of-root")
    assert refused.outcome is not None
    assert refused.outcome.exit_code != 0
    (name,) = layers(daemon)
    status = (daemon.state / "sessions/layers" / name / "of-root").stat()
    assert status.st_uid == 0
    with by(4242, daemon), pytest.raises(PermissionError):
        (daemon.state / "sessions/layers" / name / "of-root").read_bytes()


@pytest.fixture
def of_another(daemon: Daemon) -> Iterator[tuple[SessionInfo, str]]:
    """A session of uid 4243, and a checkpoint of it."""
    with by(4243, daemon):
        made = daemon.client().create_session("mine")
        found = daemon.client().run(["sh", "-c", "echo secret > f"], policy="kept", session="mine")
    assert found.checkpoint_after is not None
    yield made, found.checkpoint_after
    with by(4243, daemon):
        daemon.client().delete_session("mine")


def test_a_session_of_another_caller_is_not_there(
    daemon: Daemon, of_another: tuple[SessionInfo, str]
) -> None:
    made, checkpoint = of_another
    with by(4242, daemon):
        client = daemon.client()
        own = client.create_session("mine")  # the name is another's too
        acts: list[Callable[[], Any]] = [
            lambda: client.session(made.id),
            lambda: client.delete_session(made.id),
            lambda: client.checkpoints(made.id),
            lambda: client.fork_session(made.id),
            lambda: client.rollback_session(made.id, made.head.id),
            lambda: client.discard_session(made.id),
            lambda: client.run(["cat", "f"], policy="kept", session=made.id),
            lambda: client.rollback_session("mine", checkpoint),  # another's checkpoint, into one's own
            lambda: client.rollback_session("mine", made.head.id),
            lambda: client.fork_session("mine", checkpoint=checkpoint),
        ]
        for act in acts:
            with pytest.raises(errors.NotFound):
                act()
        assert [one.id for one in client.sessions().sessions] == [own.id]
        client.delete_session("mine")
    assert made.id in {one.id for one in daemon.client().sessions().sessions}  # an operator sees all
    assert daemon.client().session(made.id).uid == 4243
    with pytest.raises(errors.NotFound):
        daemon.client().session("mine")  # by its name it is its owner's


def test_a_caller_has_so_many_sessions_and_so_many_bytes(daemon: Daemon) -> None:
    with by(4242, daemon):
        client = daemon.client()
        names = ["one", "two", "three"]
        for name in names:
            client.create_session(name)
        try:
            for act in (client.create_session, partial(client.fork_session, "one")):
                with pytest.raises(errors.QuotaExceeded, match="3 sessions, and may have 3") as caught:
                    act()
                assert caught.value.details == {"quota": "sessions.count", "asked": 4, "allowed": 3}
            with pytest.raises(errors.QuotaExceeded, match=r"9MiB.*8MiB"):
                client.create_session(size="9MiB")
            fill = ["sh", "-c", "head -c 3M /dev/urandom > f"]
            for name in ("one", "two"):
                assert said(client.run(fill, policy="kept", session=name)) == ""
            before = layers(daemon)
            refused = client.run(fill, policy="kept", session="three")
            assert refused.outcome is not None
            assert (refused.outcome.cause, refused.outcome.exit_status()) == ("denied", 125)
            assert refused.outcome.error is not None
            assert refused.outcome.error.code == "quota_exceeded"
            assert refused.outcome.error.details["allowed"] == 8 << 20
            asked = 9 << 20
            assert asked < refused.outcome.error.details["asked"] <= asked + 3 * 2 * 4096  # directories too
            assert "more than the 8MiB" in refused.outcome.message
            assert refused.outcome.evidence["exit_code"] == 0
            assert [one.limit for one in refused.limits_reached] == ["sessions.size"]
            assert refused.checkpoint_after == refused.checkpoint_before
            assert layers(daemon) == before
            client.delete_session("one")

            def fits() -> bool:
                outcome = client.run(fill, policy="kept", session="three").outcome
                return outcome is not None and outcome.cause == "exited"

            until(fits, "what was deleted makes room")
        finally:
            for one in client.sessions().sessions:
                client.delete_session(one.id)


def test_a_session_has_its_own_quota(daemon: Daemon) -> None:
    client = daemon.client()
    made = client.create_session(size="1MiB", inodes=10)
    try:
        fits = sh(daemon, made, "head -c 600k /dev/urandom > a")
        assert fits.checkpoint_after != fits.checkpoint_before
        for code, quota in (
            ("head -c 600k /dev/urandom > b", "session.size"),
            ("for i in 1 2 3 4 5 6 7 8 9 0 a; do : > f$i; done", "session.inodes"),
        ):
            found = sh(daemon, made, code)
            assert found.outcome is not None
            assert found.outcome.error is not None
            assert found.outcome.error.details["quota"] == quota
        assert said(sh(daemon, made, "ls")) == "a\n"
    finally:
        client.delete_session(made.id)


@contextmanager
def disk_of(directory: Path, size: str) -> Iterator[Path]:
    """A state directory whose sessions have a small disk of their own."""
    state = directory / "state"
    (state / "sessions").mkdir(parents=True)
    mount = mounts.new_mount("tmpfs", {"size": size, "mode": "0700"})
    mounts.attach(mount, state / "sessions")
    os.close(mount)
    try:
        yield state
    finally:
        mounts.detach(state / "sessions")


def test_a_disk_that_is_full_keeps_the_session_as_it_was(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    with disk_of(tmp_path, "4m") as state:
        daemon = daemon_factory(state=state)
        give_policies(daemon)
        made = daemon.client().create_session()
        good = sh(daemon, made, "echo x > f")
        before = layers(daemon)
        found = sh(daemon, made, "head -c 8M /dev/urandom > big; rm f")
        assert found.outcome is not None
        assert found.outcome.cause == "failed"
        assert found.outcome.error is not None
        assert found.outcome.error.code == "host"
        assert "no space left" in found.outcome.message
        assert found.checkpoint_after == good.checkpoint_after
        assert layers(daemon) == before
        assert said(sh(daemon, made, "cat f; ls; echo y > g")) == "x\nf\n"  # and it goes on
        daemon.stop()


def test_what_was_recorded_and_has_no_room_as_files_comes_when_there_is(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    """A small change is in the journal first; on another file system there may be none left for its files."""
    with disk_of(tmp_path, "1m") as state:
        daemon = daemon_factory(state=state)
        give_policies(daemon)
        client = daemon.client()
        made = client.create_session()
        ballast = state / "sessions" / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(65_536)):
                pass
        assert said(sh(daemon, made, "head -c 50000 /dev/zero | tr '\\0' x > f; echo done")) == "done\n"
        found = sh(daemon, made, "wc -c < f")
        assert found.outcome is not None
        assert found.outcome.error is not None
        assert "no space left for a session's files" in found.outcome.message
        with pytest.raises(errors.HostFailed, match="no space left for a session's files"):
            client.session_files(made.id)
        daemon.process.kill()
        daemon.process.wait()
        daemon = daemon_factory(name="two", state=state)  # which starts all the same
        give_policies(daemon)
        ballast.unlink()
        assert said(sh(daemon, made, "wc -c < f")) == "50000\n"
        daemon.stop()


def test_killed_at_any_time_there_is_no_change_without_its_record(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = daemon_factory(name="one")
    give_policies(daemon)
    client = daemon.client()
    made = client.create_session("s")
    expected = []
    for number in range(6):
        call = client.start(["sh", "-c", f"echo {number} > f{number}"], policy="kept", session="s")
        if number == 2:
            assert said(client.wait(call.id)) == ""
        expected.append(call.id)
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    stray = daemon.state / "sessions" / "layers" / "stray"  # what is written before the transaction
    stray.mkdir()
    (stray / "f").touch()
    (daemon.state / "sessions" / "mounts" / "left").mkdir()
    again = daemon_factory(name="one")
    client = again.client()
    assert not stray.exists()
    ended = [client.wait(id_) for id_ in expected]  # those that had not started run now
    kept = [one for one in ended if one.outcome is not None and one.outcome.cause == "exited"]
    names = sorted(said(client.run(["ls"], policy="kept", session="s")).split())
    assert names == sorted(f"f{expected.index(one.id)}" for one in kept)
    assert all(one.outcome is not None for one in ended)
    digests = {one.digest for one in client.checkpoints("s").checkpoints}
    assert {one.checkpoint_after for one in kept} <= digests
    assert len(digests) == len(kept) + 1
    assert client.session("s").id == made.id
