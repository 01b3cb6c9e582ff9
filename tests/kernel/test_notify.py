"""Notifications of real filters: counted, answered, limited in rate and memory, and gone when closed."""

from __future__ import annotations

import array
import errno
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from daemons import PATIENCE
from leaks import descriptors

from sandboxd.kernel import notify
from sandboxd.kernel.notify import LUMPED, MAX_DISTINCT, DeniedCall, Listener, NotifyServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = Path(__file__).parents[1] / "native" / "filtered.c"
FIRST = 5000  # numbers that no kernel has: the tests' filter notifies of them and allows all others
FILTER = b"".join(
    struct.pack("<HBBI", *instruction)
    for instruction in (
        (0x20, 0, 0, 0),
        (0x35, 0, 1, FIRST),
        (0x06, 0, 0, 0x7FC00000),
        (0x06, 0, 0, 0x7FFF0000),
    )
)  # load the number; is it FIRST or above; notify; allow
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
CALL = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args))
    return ctypes.get_errno() if result == -1 else 0
"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["gcc", "-O1", "-static", "-o", f"{folder}/filtered", SOURCE], check=True)
        yield Path(folder) / "filtered"


@pytest.fixture
def server() -> Iterator[NotifyServer]:
    before = set(descriptors())
    with NotifyServer() as server:
        yield server
    assert set(descriptors()) <= before  # what earlier tests left open may be closed meanwhile
    assert "seccomp-notify" not in {thread.name for thread in threading.enumerate()}


@contextmanager
def tool(launcher: Path, code: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A Python program under the filter, and its listener."""
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.NamedTemporaryFile() as file:
        file.write(FILTER)
        file.flush()
        process = subprocess.Popen(
            [launcher, file.name, str(theirs.fileno()), "0", sys.executable, "-c", CALL + code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            theirs.close()
            try:
                _, [(_, _, raw)], _, _ = ours.recvmsg(8, socket.CMSG_SPACE(4))
                ours.send(b"g")
                yield process, array.array("i", raw)[0]
            finally:
                process.kill()


def eperm(arch: int, nr: int) -> int:
    return errno.EPERM


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sizes() -> None:
    assert notify.notif_sizes() >= (notify.NOTIF.size, notify.RESPONSE.size) == (80, 24)


def test_calls_are_counted_answered_and_reported(launcher: Path, server: NotifyServer) -> None:
    seen: list[DeniedCall] = []
    code = "print(call(5000, 1, -1), call(5001), call(5000, 9))"
    with tool(launcher, code) as (process, fd):
        listener = server.add(fd, answer=lambda _, nr: nr - 5000 + errno.EPERM, on_denied=seen.append)
        assert process.communicate(timeout=20)[0] == f"{errno.EPERM} {errno.ENOENT} {errno.EPERM}\n"
        first, second = listener.counts()
        assert (first.arch, first.nr, first.count, first.errno) == (AUDIT_ARCH, 5000, 2, errno.EPERM)
        assert first.args[:2] == (1, 2**64 - 1)
        assert (second.nr, second.count) == (5001, 1)
        until(lambda: len(seen) == 3)
        assert [call.nr for call in seen] == [5000, 5001, 5000]
        assert seen[2].args[0] == 9
        listener.close()
        listener.close()
        assert listener.fd == -1
        assert len(listener.counts()) == 2


@pytest.mark.parametrize("wrong", [0, -1, 2**40])
def test_an_answer_that_is_no_errno_is_eperm(launcher: Path, server: NotifyServer, wrong: int) -> None:
    with tool(launcher, "print(call(5000))") as (process, fd):
        server.add(fd, answer=lambda _arch, _nr: wrong)
        assert process.communicate(timeout=20)[0] == f"{errno.EPERM}\n"


def test_callbacks_that_fail_do_not_end_the_service(launcher: Path, server: NotifyServer) -> None:
    def broken(*_: object) -> Any:
        raise LookupError

    with tool(launcher, "print(call(5000), call(5001))") as (process, fd):
        server.add(fd, answer=broken, on_denied=broken)
        assert process.communicate(timeout=20)[0] == f"{errno.EPERM} {errno.EPERM}\n"


def test_a_callback_may_close_its_listener(launcher: Path, server: NotifyServer) -> None:
    box: list[Listener] = []
    with tool(launcher, "sys.stdin.read(1); print(call(5000), call(5001))") as (process, fd):
        box.append(server.add(fd, answer=eperm, on_denied=lambda _: box[0].close()))
        first, second = process.communicate("x", timeout=20)[0].split()
        assert (int(first), int(second)) in {(errno.EPERM, errno.ENOSYS), (errno.EPERM, errno.EPERM)}
        until(lambda: box[0].fd == -1)


def test_without_a_server_the_kernel_answers(launcher: Path) -> None:
    with tool(launcher, "sys.stdin.read(1); print(call(5000))") as (process, fd):
        server = NotifyServer()
        listener = server.add(fd, answer=eperm)
        server.close()
        server.close()
        assert listener.fd == -1
        assert process.communicate("x", timeout=20)[0] == f"{errno.ENOSYS}\n"
        duplicate = os.open("/dev/null", os.O_RDONLY)
        with pytest.raises(RuntimeError):
            server.add(duplicate, answer=eperm)
        with pytest.raises(OSError):
            os.fstat(duplicate)


def test_a_server_that_fails_leaves_nobody_waiting(
    launcher: Path, server: NotifyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Listener) -> int:
        raise OSError(errno.ENOMEM, "out of memory")

    monkeypatch.setattr(Listener, "poll", broken)
    with tool(launcher, "print(call(5000), call(5001))") as (process, fd):
        listener = server.add(fd, answer=eperm)
        assert process.communicate(timeout=20)[0] == f"{errno.ENOSYS} {errno.ENOSYS}\n"
        assert listener.fd == -1
    assert "the server of notifications failed" in caplog.text
    with pytest.raises(RuntimeError):
        server.add(os.open("/dev/null", os.O_RDONLY), answer=eperm)


def test_what_cannot_be_polled_is_refused_and_closed(server: NotifyServer) -> None:
    fd = os.open("/etc/passwd", os.O_RDONLY)
    with pytest.raises(PermissionError):
        server.add(fd, answer=eperm)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_what_is_no_listener_is_let_go(server: NotifyServer) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        listener = server.add(theirs.detach(), answer=eperm)
        ours.send(b"not a notification")
        time.sleep(0.05)
        assert listener.counts() == []
        listener.close()


def test_a_listener_whose_tasks_are_gone_costs_nothing(launcher: Path, server: NotifyServer) -> None:
    with tool(launcher, "") as (process, fd):
        listener = server.add(fd, answer=eperm)
        process.wait(timeout=20)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    listener.close()


def test_distinct_calls_are_bounded(
    launcher: Path, server: NotifyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "LISTENER_BURST", 10_000)
    with tool(launcher, "[call(n) for n in range(5000, 5000 + 1100)]") as (process, fd):
        listener = server.add(fd, answer=eperm)
        process.wait(timeout=30)
        counts = listener.counts()
    assert len(counts) == MAX_DISTINCT + 1
    assert (counts[-1].arch, counts[-1].nr, counts[-1].count) == (*LUMPED, 1100 - MAX_DISTINCT)


def test_a_flood_stalls_only_itself(launcher: Path, server: NotifyServer) -> None:
    flood = """
for _ in range(2): os.fork()
libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
while True: call(5000)
"""
    polite = """
sys.stdin.read(1)
start = time.monotonic()
for _ in range(20): call(5001)
print(time.monotonic() - start)
"""
    with tool(launcher, flood) as (_, fd), tool(launcher, polite) as (quiet, other):
        listener = server.add(fd, answer=eperm)
        server.add(other, answer=eperm)

        def served() -> int:
            return sum(call.count for call in listener.counts())

        until(lambda: served() > notify.LISTENER_BURST)
        start, cpu, before = time.monotonic(), time.process_time(), served()
        elapsed = float(quiet.communicate("x", timeout=20)[0])
        time.sleep(max(0.0, 1 - (time.monotonic() - start)))
        took = time.monotonic() - start
        rate, spent = (served() - before) / took, (time.process_time() - cpu) / took
    assert rate < notify.LISTENER_RATE * 1.5
    assert spent < 0.5 or PATIENCE > 1  # the rate is the same there, and each costs more
    assert elapsed < 1


def test_killed_callers_do_not_hold_the_server(launcher: Path, server: NotifyServer) -> None:
    storm = f"""
ready, begins = os.pipe()
for _ in range(150):
    child = os.fork()
    if child == 0:
        os.write(begins, b"x")
        while True: call(5000)
    os.read(ready, 1)
    time.sleep({0.001 * PATIENCE})
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(call(5001))
"""
    with tool(launcher, storm) as (process, fd):
        listener = server.add(fd, answer=eperm)
        assert process.communicate(timeout=30)[0] == f"{errno.EPERM}\n"
        assert {call.nr for call in listener.counts()} >= {5000, 5001}


def test_closing_while_calls_come_in(launcher: Path, server: NotifyServer) -> None:
    code = "print(1, flush=True)\nwhile call(5000) == 1: pass\nprint('closed')"
    for _ in range(10):
        with tool(launcher, code) as (process, fd):
            listener = server.add(fd, answer=eperm)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.005)
            listener.close()
            assert process.communicate(timeout=20)[0] == "closed\n"
