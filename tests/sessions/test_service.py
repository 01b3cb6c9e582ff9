"""Attacks on the file service of sessions: what one caller asks for costs nobody else their daemon."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sqlite3
import struct
import tarfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import needs_containers, start_daemon
from sessioned import ask, by, sh

from sandboxd import errors
from sandboxd import sessions as sessions_module
from sandboxd.api.descriptors import path_beside
from sandboxd.lanes import Lanes
from sandboxd.workspace import tables
from sandboxd.workspace.effort import Effort
from sandboxd.workspace.layerimport import import_layer
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import SessionInfo

CALLER = 4243


@contextmanager
def lingering() -> Iterator[socket.socket]:
    """A TCP socket whose last close sleeps for an hour, until the block ends."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        made = stack.enter_context(socket.create_connection(server.getsockname()))
        other, _ = server.accept()
        stack.enter_context(other)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
        made.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                made.send(b"x" * 65536)
        yield made


def answers(daemon: Daemon) -> bool:
    """Whether the daemon serves somebody else, and soon."""
    start = time.monotonic()
    daemon.client(timeout=5).sessions()
    return time.monotonic() - start < 5


@contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """While nothing is taken: what is passed is then the daemon's alone."""
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def passed(daemon: Daemon, stack: ExitStack, *messages: int) -> socket.socket:
    """A connection with messages of so many descriptors that linger, which nobody else has any more."""
    with by(CALLER, daemon):
        peer = stack.enter_context(socket.socket(socket.AF_UNIX))
        peer.connect(str(path_beside(daemon.socket)))
        with stopped(daemon):
            for count in messages:
                many = [stack.enter_context(lingering()) for _ in range(count)]
                socket.send_fds(peer, [b"x"], [one.fileno() for one in many])
                for one in many:
                    one.close()
    return peer


@pytest.mark.parametrize("messages", [(1,), (2,), (3,), (1, 1, 1), (0, 1), (20,)])
def test_no_close_of_what_a_caller_passes_stops_the_daemon(
    daemon: Daemon, messages: tuple[int, ...], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            passed(daemon, stack, *messages).close()
        passed(daemon, stack, *messages)
        time.sleep(0.3)
        assert answers(daemon)
        made = daemon.client(timeout=10).create_session(directory=tmp_path)  # another's
        daemon.client(timeout=10).delete_session(made.id)


def test_a_request_that_names_such_a_descriptor_stops_nobody(daemon: Daemon) -> None:
    with ExitStack() as stack:
        peer = passed(daemon, stack, 1)
        handle = json.loads(peer.recv(4096))["handle"]
        with by(CALLER, daemon), socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(daemon.socket))
            body = json.dumps({"checkout": handle}).encode()
            asking.sendall(
                b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            time.sleep(0.3)
            assert answers(daemon)


def test_the_api_takes_no_descriptor(daemon: Daemon) -> None:
    with by(CALLER, daemon), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(daemon.socket))
        if platform_has_passrights():
            with pytest.raises(PermissionError):
                socket.send_fds(peer, [b"GET /v1/health HTTP/1.1\r\n"], [0])


def platform_has_passrights() -> bool:
    """Linux 6.16."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 16)


@pytest.mark.parametrize("busy", [250])
def test_expiry_goes_past_what_stays(busy: int) -> None:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE sessions (id TEXT, expires INTEGER, gone INTEGER DEFAULT 0)")
        rows = [(f"{number:03}", 5) for number in range(busy)]
        connection.executemany("INSERT INTO sessions (id, expires) VALUES (?, ?)", rows)
        seen: list[str] = []
        after = tables.FIRST
        while found := tables.expired(connection, now=9, after=after):
            seen += [id_ for _, id_ in found]
            after = found[-1]
        assert seen == [id_ for id_, _ in rows]


def test_a_condition_on_a_file_that_nobody_can_hash_is_refused(daemon: Daemon, session: SessionInfo) -> None:
    sh(daemon, session, "truncate -s 2T huge")
    start = time.monotonic()
    match = {"If-Match": f'"sha256:{"0" * 64}"'}
    for method in ("PUT", "DELETE"):
        refused = ask(daemon, method, f"{session.id}/files/huge", b"x" if method == "PUT" else None, match)
        assert (refused.status, refused.json["code"]) == (413, "too_large")
    there = ask(daemon, "PUT", f"{session.id}/files/huge", b"x", {"If-None-Match": "*"})
    assert there.status == 412
    assert time.monotonic() - start < 10


def test_a_diff_digests_so_much_and_says_what_it_did_not(daemon: Daemon, session: SessionInfo) -> None:
    sh(daemon, session, "for i in $(seq 30); do truncate -s 1G f$i; done")
    found = ask(daemon, "GET", f"{session.id}/diff").json["changes"]
    assert len(found) == 30
    assert sum("digest" in one["new"] for one in found) == 2


def test_who_asks_for_much_waits_for_himself(daemon: Daemon) -> None:
    with by(CALLER, daemon):
        made = daemon.client().create_session(policy="kept")
        sh(daemon, made, "truncate -s 1G f")
    with ExitStack() as stack:
        peers = []
        with by(CALLER, daemon):
            for _ in range(72):
                peer = stack.enter_context(socket.socket(socket.AF_UNIX))
                peer.settimeout(10)
                peer.connect(str(daemon.socket))
                peer.sendall(b"GET /v1/sessions/%s/files/f HTTP/1.1\r\nHost: x\r\n\r\n" % made.id.encode())
                peers.append(peer)
        assert b" 429 " in peers[-1].recv(4096)
        assert answers(daemon)
        other = daemon.client(timeout=10).create_session()
        daemon.client(timeout=10).write_file(other.id, "f", b"x")
        daemon.client(timeout=10).delete_session(other.id)
    end = time.monotonic() + 15  # they have gone: nothing goes on for them
    while daemon.client().session(made.id).in_flight:
        assert time.monotonic() < end
        time.sleep(0.1)
    daemon.client().delete_session(made.id)


def test_what_is_too_deep_to_be_named_is_counted(daemon: Daemon, session: SessionInfo) -> None:
    code = "import os\nfor _ in range(60): os.mkdir('d' * 200); os.chdir('d' * 200); open('f', 'w')"
    done = daemon.client().run(["python", "-c", code], policy="snakes", session=session.id)
    assert done.outcome is not None
    assert done.outcome.exit_code == 0, done.stderr
    for path, key in (("files?recursive=1", "files"), ("diff", "changes")):
        found = ask(daemon, "GET", f"{session.id}/{path}").json
        assert (found["unnamed"], found["truncated"]) == (1, False)
        assert 4000 < max(len(one["path"]) for one in found[key]) <= 4095


def test_an_answer_has_a_size(daemon: Daemon, session: SessionInfo) -> None:
    code = "for i in range(8000): open(b'\\1' * 250 + b'%05d' % i, 'w')"
    done = daemon.client().run(["python", "-c", code], policy="snakes", session=session.id)
    assert done.outcome is not None
    assert done.outcome.exit_code == 0, done.stderr
    for path in ("files?limit=10000", "diff?limit=10000"):
        found = ask(daemon, "GET", f"{session.id}/{path}")
        assert found.json["truncated"] is True
        assert 4 << 20 < len(found.body) < 9 << 20


def begun(daemon: Daemon, stack: ExitStack, path: str, size: int) -> socket.socket:
    """A body that has been announced."""
    peer = stack.enter_context(socket.socket(socket.AF_UNIX))
    peer.settimeout(10)
    peer.connect(str(daemon.socket))
    method = "POST" if path.endswith("import") else "PUT"
    peer.sendall(
        f"{method} /v1/sessions/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
    )
    return peer


def fed(peer: socket.socket, size: int) -> bytes:
    """What is answered to so much of a body."""
    with suppress(ConnectionError):
        peer.sendall(b"\0" * size)
    return peer.recv(65536)


def test_no_body_is_read_for_no_session(daemon: Daemon) -> None:
    with ExitStack() as stack:
        assert b" 404 " in begun(daemon, stack, "nothing/files/f", 1 << 30).recv(4096)
        assert b" 404 " in begun(daemon, stack, "nothing/import", 1 << 30).recv(4096)


def test_no_body_is_larger_than_what_its_sessions_may_grow(daemon: Daemon) -> None:
    with by(4242, daemon), ExitStack() as stack:  # 8 MiB
        made = daemon.client().create_session()
        answer = fed(begun(daemon, stack, f"{made.id}/import", 1 << 30), 10 << 20)
        assert b'"quota":"sessions.size"' in answer
        daemon.client().delete_session(made.id)


def test_bodies_have_room_and_time(tmp_path: Path) -> None:
    needs_containers()
    with start_daemon(tmp_path, config="http: {spool: 4MiB, body_time: 2s}\n") as one, ExitStack() as stack:
        made = one.client().create_session()
        answer = fed(begun(one, stack, f"{made.id}/files/f", 1 << 30), 5 << 20)
        assert b" 429 " in answer
        assert b"bodies of files" in answer
        assert b" 408 " in fed(begun(one, stack, f"{made.id}/files/f", 1 << 30), 1 << 20)
        one.client().write_file(made.id, "f", b"x" * (3 << 20))  # all of it was given back


def test_work_is_stopped_and_what_it_made_is_undone() -> None:
    effort, undone = Effort(), threading.Event()

    def endless() -> None:
        while True:
            effort.step()

    async def main() -> None:
        lanes = Lanes("tests", most=2, each=1, waiting=0)
        with anyio.move_on_after(0.1):
            await lanes.run(1, lambda: effort.within(endless), stop=effort.stop)
        assert not lanes.inside(1)
        go = threading.Event()
        with anyio.move_on_after(0.1):
            await lanes.run(1, lambda: go.wait(10), undo=lambda _: undone.set())
        assert lanes.inside(1) == 1  # it has its lane until it has ended
        with pytest.raises(errors.QueueFull):
            await lanes.run(1, go.set)
        assert await lanes.run(2, lambda: "another's") == "another's"
        go.set()
        with anyio.fail_after(5):
            await lanes.run(1, lambda: None, always=True)  # after it, in the same lane

    anyio.run(main)
    assert undone.wait(5)
    with pytest.raises(errors.RequestTimeout, match="took more than"):
        _late(Effort(0.01))


def _late(effort: Effort) -> None:
    def late() -> None:
        time.sleep(0.05)
        effort.step()

    effort.within(late)


def test_an_import_stops_when_its_time_is_over(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for number in range(3000):
            tar.addfile(tarfile.TarInfo("d/" * 500 + f".wh.{number}"))
    (tmp_path / "below").mkdir()
    (tmp_path / "into").mkdir()
    into = os.open(tmp_path / "into", os.O_RDONLY | os.O_DIRECTORY)
    effort = Effort(0.02)
    try:
        with View([tmp_path / "below"], effort) as view:
            archive.seek(0)

            def bring() -> None:
                import_layer(archive, into, view, owner=(0, 0))

            with pytest.raises(errors.RequestTimeout, match="took more than"):
                effort.within(bring)
    finally:
        os.close(into)


def test_whoever_has_read_a_file_may_remove_its_session_at_once(daemon: Daemon) -> None:
    client = daemon.client()
    for _ in range(20):
        made = client.create_session()
        client.write_file(made.id, "f", b"x" * 100_000)
        with client.read_file(made.id, "f") as chunks:
            assert b"".join(chunks) == b"x" * 100_000
        client.delete_session(made.id)


def test_nobody_removes_a_session_whose_files_are_being_read(daemon: Daemon) -> None:
    client = daemon.client()
    made = client.create_session()
    client.write_file(made.id, "f", bytes(64 << 20))
    with client.read_file(made.id, "f") as chunks:
        next(iter(chunks))
        with pytest.raises(errors.SessionBusy, match="being read by 1"):
            client.delete_session(made.id)
        assert sum(map(len, chunks)) > 0
    client.delete_session(made.id)


async def test_what_changes_right_after_a_directory_was_lent_is_newer(tmp_path: Path) -> None:
    """A file system's clock has ticks: what changed within one would count as older than the session."""
    for number in range(50):
        lent = sessions_module._now()
        await sessions_module._past(lent)
        file = tmp_path / f"file-{number}"
        file.touch()
        assert file.stat().st_ctime_ns // 1000 >= lent
