"""Sessions on a caller's own directory: lent by a descriptor, seen by its calls, never changed."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from daemons import needs_containers, start_daemon
from sessioned import CONFIG, by, give_policies, said, sh

from sandboxd import AsyncClient, errors
from sandboxd.api.descriptors import path_beside
from sandboxd.client import lending
from sandboxd.client.calls import sessions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation, SessionInfo

CALLER = 4243
OTHER = 4242


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory of the caller's with files of its own and of others."""
    for above in (tmp_path, *list(tmp_path.parents)[:3]):
        above.chmod(above.stat().st_mode | 0o011)
    place = tmp_path / "work"
    for path, uid, mode in (
        ("work", CALLER, 0o755),
        ("work/src", CALLER, 0o755),
        ("work/src/main", CALLER, 0o600),
        ("work/removed", CALLER, 0o644),
        ("work/theirs", OTHER, 0o600),
        ("work/public", OTHER, 0o644),
    ):
        made = tmp_path / path
        if mode == 0o755:
            made.mkdir()
        else:
            made.write_text(f"{made.name}\n")
        os.chown(made, uid, uid)
        made.chmod(mode)
    return place


@pytest.fixture
def lent(daemon: Daemon, directory: Path) -> Iterator[SessionInfo]:
    with by(CALLER, daemon):
        made = daemon.client().create_session(directory=directory, policy="kept")
    yield made
    daemon.client().delete_session(made.id)


def content(directory: Path) -> dict[str, str]:
    return {str(one): one.read_text() for one in sorted(directory.rglob("*")) if one.is_file()}


def told(found: Invocation) -> tuple[str, list[str]]:
    """What a call said, and the reasons in its complaints."""
    assert found.stdout is not None
    assert found.stderr is not None
    complaints = (found.stderr.text or "").splitlines()
    return found.stdout.text or "", [line.rpartition(": ")[2] for line in complaints]


def test_calls_find_the_files_and_change_only_the_session(
    daemon: Daemon, lent: SessionInfo, directory: Path
) -> None:
    before = content(directory)
    assert lent.checkout == "lent"
    with by(CALLER, daemon):
        done = sh(daemon, lent, "cat src/main public; echo more >>src/main; rm removed; echo new >new; id -u")
        assert said(done) == "main\npublic\n1000\n"
        assert said(sh(daemon, lent, "cat src/main new; ls")) == "main\nmore\nnew\nnew\npublic\nsrc\ntheirs\n"
        found = daemon.client().diff_session(lent.id, text=True)
    assert content(directory) == before
    changes = {one.path: one for one in found.changes}
    assert {path: one.change for path, one in changes.items()} == {
        "new": "added",
        "removed": "removed",
        "src/main": "changed",
    }
    assert changes["src/main"].diff == "--- a/src/main\n+++ b/src/main\n@@ -1 +1,2 @@\n main\n+more\n"
    assert changes["src/main"].new is not None
    assert changes["src/main"].new.uid == 1000
    workspace = (
        next(one for one in done.receipt.controls if one.name == "workspace") if done.receipt else None
    )
    assert workspace is not None
    assert "above 0 layers and the caller's directory" in workspace.in_force


def test_what_the_caller_changes_is_seen_by_the_next_call(
    daemon: Daemon, lent: SessionInfo, directory: Path
) -> None:
    (directory / "src" / "later").write_text("later\n")
    os.chown(directory / "src" / "later", CALLER, CALLER)
    with by(CALLER, daemon):
        assert said(sh(daemon, lent, "cat src/later")) == "later\n"


def test_what_the_caller_cannot_read_is_read_by_nobody(
    daemon: Daemon, lent: SessionInfo, directory: Path
) -> None:
    with by(CALLER, daemon):
        tried = sh(daemon, lent, "cat theirs; echo x >>public; rm -f theirs; ls -n theirs | cut -d' ' -f3")
        assert told(tried) == (
            "65534\n",
            ["Permission denied"] * 2 + ["Value too large for defined data type"],
        )
        for path in ("theirs", "../outside", "src/../theirs"):
            with pytest.raises((errors.NotPermitted, errors.InvalidRequest)):
                list(daemon.client().read_file(lent.id, path))
        assert b"".join(daemon.client().read_file(lent.id, "public")) == b"public\n"
        assert {one.path for one in daemon.client().session_files(lent.id).files} >= {"theirs", "src"}


def test_what_is_closed_to_a_group_of_the_callers_alone(daemon: Daemon, directory: Path) -> None:
    """Others may read it, and neither the tool nor the API reads it as an other."""
    groups = {"own": CALLER, "more": 5000, "above": 70_000}
    for name, group in groups.items():
        (directory / name).write_text("closed\n")
        os.chown(directory / name, OTHER, group)
        (directory / name).chmod(0o604)
    (directory / "list").write_text("closed\n")
    os.chown(directory / "list", OTHER, OTHER)
    entries = ((1, 6, -1), (2, 0, CALLER), (4, 4, -1), (0x10, 4, -1), (0x20, 4, -1))  # user:CALLER:---
    access = b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(directory / "list", "system.posix_acl_access", struct.pack("<I", 2) + access)
    client, before = daemon.client(), os.getgroups()
    os.setgroups([5000, 70_000])
    os.setegid(CALLER)
    try:
        with by(CALLER, daemon):
            for name in (*groups, "list"):
                with pytest.raises(PermissionError):
                    (directory / name).read_text()
            made = daemon.client().create_session(directory=directory, policy="kept")
            tried = sh(daemon, made, "cat own more above list; cat public src/main")
            assert told(tried) == ("public\nmain\n", ["Permission denied"] * 4)
            for name in (*groups, "list"):
                with pytest.raises(errors.NotPermitted):
                    list(daemon.client().read_file(made.id, name))
            assert b"".join(daemon.client().read_file(made.id, "src/main")) == b"main\n"
    finally:
        os.setegid(0)
        os.setgroups(before)
    client.delete_session(made.id)


def test_nobody_else_forks_a_session_on_a_directory(daemon: Daemon, lent: SessionInfo) -> None:
    with pytest.raises(errors.StateConflict, match="nobody else can fork"):
        daemon.client().fork_session(lent.id)
    with by(CALLER, daemon):
        fork = daemon.client().fork_session(lent.id)
        assert said(sh(daemon, fork, "cat src/main")) == "main\n"
        daemon.client().delete_session(fork.id)
        assert said(sh(daemon, lent, "cat src/main")) == "main\n"


def test_files_are_put_beside_those_that_are_lent(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    with by(CALLER, daemon):
        made = daemon.client().write_file(lent.id, "src/put", b"put\n", new=True)
        assert made.created
        with pytest.raises(errors.PreconditionFailed):
            daemon.client().write_file(lent.id, "src/main", b"", new=True)
        daemon.client().remove_file(lent.id, "src/main")
        assert said(sh(daemon, lent, "ls src; stat -c %u src/put")) == "put\n1000\n"
    assert (directory / "src" / "main").exists()


def test_many_calls_on_a_directory_stay_right_when_layers_are_merged(
    daemon: Daemon, lent: SessionInfo, directory: Path
) -> None:
    """What was removed of the directory stays hidden by the merged layer."""
    with by(CALLER, daemon):
        sh(daemon, lent, "rm removed; rm -r src; mkdir src; touch src/only")
        for number in range(20):
            sh(daemon, lent, f"echo {number} >f{number % 3}")
        end = time.monotonic() + 20
        while daemon.client().session(lent.id).layers > 12 and time.monotonic() < end:
            time.sleep(0.1)
        assert daemon.client().session(lent.id).layers <= 12
        assert said(sh(daemon, lent, "ls . src")) == ".:\nf0\nf1\nf2\npublic\nsrc\ntheirs\n\nsrc:\nonly\n"


def test_a_directory_that_changes_while_calls_run(daemon: Daemon, lent: SessionInfo, directory: Path) -> None:
    """Calls may fail to read; they see nothing of the host, and the daemon serves on."""
    secret = directory.parent / "secret"
    secret.write_text("of the host")
    program = """if True:
        import os, sys
        while True:
            os.rename('work/src', 'moved')
            os.symlink('..', 'work/src')
            os.unlink('work/src')
            os.rename('moved', 'work/src')
    """
    with subprocess.Popen([sys.executable, "-c", program], cwd=directory.parent) as changing:
        with by(CALLER, daemon):
            for _ in range(10):
                code = "for i in 1 2 3 4 5 6; do cat src/secret src/../secret ../secret; done"
                assert "of the host" not in told(sh(daemon, lent, code))[0]
        assert changing.poll() is None
        changing.kill()


def test_who_may_lend_what(daemon: Daemon, directory: Path, tmp_path: Path) -> None:
    client = daemon.client()
    state = daemon.state
    for refused, words in (
        (Path("/"), "/ is not lent"),
        (state, "daemon's own"),
        (state.parent, "daemon's own"),
    ):
        with pytest.raises(errors.InvalidRequest, match=words):
            client.create_session(directory=refused)
    with pytest.raises(errors.InvalidRequest, match="cannot map ids"):
        client.create_session(directory="/proc/self")
    with pytest.raises(FileNotFoundError):
        client.create_session(directory=tmp_path / "gone")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with by(CALLER, daemon), pytest.raises(PermissionError):
        daemon.client().create_session(directory=closed)
    assert client.sessions().sessions == []


def ask(daemon: Daemon, fds: list[int], data: bytes = b"\n") -> tuple[socket.socket, dict[str, Any]]:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path_beside(daemon.socket)))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)
    return sock, json.loads(sock.recv(65536))


def test_handles(daemon: Daemon, directory: Path) -> None:
    """Used once, by their uid, while their connection is open; and a bad message is answered."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        for fds in ([], [fd, fd], [fd] * 20):
            sock, answer = ask(daemon, fds)
            sock.close()
            assert answer["code"] == "invalid_request"
        client = daemon.client()
        sock, answer = ask(daemon, [fd])
        with by(CALLER, daemon), pytest.raises(errors.NotFound, match="handle"):
            client._do(create(answer["handle"]))
        made = client._do(create(answer["handle"]))
        client.delete_session(made.id)
        with pytest.raises(errors.NotFound, match="used once"):
            client._do(create(answer["handle"]))
        sock.close()
        sock, answer = ask(daemon, [fd])
        sock.close()
        gone(daemon, answer["handle"])
        waiting = [ask(daemon, [fd]) for _ in range(16)]
        sock, answer = ask(daemon, [fd])
        assert answer["code"] == "queue_full"
        for one, _ in [*waiting, (sock, answer)]:
            one.close()
        with by(9999, daemon):
            sock, answer = ask(daemon, [fd])
            sock.close()
            assert answer["code"] == "not_identified"
    finally:
        os.close(fd)


def create(handle: str) -> Any:
    rest = dict.fromkeys(("policy", "labels", "ttl", "idle", "size", "inodes"))
    return sessions.create_session(None, checkout=handle, **rest)


def gone(daemon: Daemon, handle: str) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            daemon.client()._do(create(handle))
        except errors.NotFound:
            return
        except errors.InvalidRequest:
            pass
        raise AssertionError("the handle outlived its connection")


def test_a_restart_takes_the_directory_away_until_it_is_lent_again(
    tmp_path_factory: pytest.TempPathFactory, directory: Path
) -> None:
    needs_containers()
    place = tmp_path_factory.mktemp("restarted")
    with start_daemon(place, config=CONFIG) as first:
        give_policies(first)
        made = first.client().create_session(directory=directory)
        sh(first, made, "echo kept >kept")
    with start_daemon(place, config=CONFIG) as second:
        client = second.client()
        assert client.session(made.id).checkout == "missing"
        fork = client.fork_session(made.id)  # which has to be given it as well
        assert (fork.checkout, fork.lent) == ("missing", made.created)
        for what in (lambda: sh(second, made, "true"), lambda: client.session_files(made.id)):
            with pytest.raises(errors.StateConflict, match="pass the directory again"):
                what()
        with pytest.raises(errors.StateConflict, match="another directory"):
            client.lend(made.id, directory.parent)
        assert client.lend(made.id, directory).checkout == "lent"
        assert said(sh(second, made, "cat kept public")) == "kept\npublic\n"
        assert client.lend(fork.id, directory).checkout == "lent"
        assert said(sh(second, fork, "cat kept public")) == "kept\npublic\n"
        client.delete_session(made.id)
        client.delete_session(fork.id)


def test_the_client_says_where_no_daemon_takes_directories(tmp_path: Path) -> None:
    with (
        pytest.raises(errors.Unavailable, match=r"d\.fds\.sock"),
        lending.lent([str(tmp_path / "d.sock")], tmp_path, 1),
    ):
        pass


def test_the_asynchronous_client_does_the_same(daemon: Daemon, directory: Path) -> None:
    async def use() -> tuple[bytes, list[str], str | None]:
        client = AsyncClient(daemon.socket)
        made = await client.create_session(directory=directory)
        try:
            await client.write_file(made.id, "src/new", b"1\n", new=True)
            await client.remove_file(made.id, "removed")
            async with await client.read_file(made.id, "src/new") as chunks:
                content = b"".join([chunk async for chunk in chunks])
            changed = [one.path for one in (await client.diff_session(made.id)).changes]
            return content, changed, (await client.lend(made.id, directory)).checkout
        finally:
            await client.delete_session(made.id)

    assert anyio.run(use) == (b"1\n", ["removed", "src/new"], "lent")
