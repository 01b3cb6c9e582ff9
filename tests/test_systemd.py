"""The protocols of a service manager, with real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from sandboxd import systemd

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_a_state_arrives(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = uuid.uuid4().hex
    address = str(tmp_path / name) if kind == "path" else f"\0{name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        assert systemd.notify("READY=1\nSTATUS=running")
        assert manager.recv(4096) == b"READY=1\nSTATUS=running"


@pytest.mark.parametrize("address", ["", "@", "relative", "vsock:2:1234", "/nonexistent/socket"])
def test_nobody_listens(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not systemd.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not systemd.notify("READY=1")


def test_a_manager_that_does_not_read_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "s"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "s"))
        sent = [systemd.notify("WATCHDOG=1") for _ in range(5000)]
    assert sent[0]
    assert not sent[-1]


def test_a_state_has_no_nul(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="NUL"):
        systemd.notify("READY=1\0")


def receive(*passed: int, pid: str = "$", count: str | None = None) -> subprocess.CompletedProcess[str]:
    """``listen_fds`` in a process that got descriptors from 3 on, as systemd would pass them."""
    code = (
        "import os, sys\n"
        "from sandboxd import systemd\n"
        "if sys.argv[1] == '$': os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "got = systemd.listen_fds()\n"
        "print([(s.fileno(), s.getsockname(), s.get_inheritable()) for s in got],"
        " systemd.listen_fds(), [k for k in os.environ if k.startswith('LISTEN')])\n"
    )

    def place() -> None:
        high = [os.dup2(fd, 100 + number) for number, fd in enumerate(passed)]
        for number, fd in enumerate(high):
            os.dup2(fd, 3 + number)

    environment = {
        **os.environ,
        "LISTEN_PID": pid,
        "LISTEN_FDS": count or str(len(passed)),
        "LISTEN_FDNAMES": "x",
    }
    return subprocess.run(
        [sys.executable, "-c", code, pid],
        env=environment,
        preexec_fn=place,
        close_fds=False,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_passed_sockets_are_taken_once(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        result = receive(listener.fileno())
    assert result.stdout == f"[(3, {path!r}, False)] [] []\n", result.stderr


def test_sockets_of_another_process_are_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        for pid, count in (("1", "1"), ("$", "0"), ("$", "x"), ("$", "100000"), ("$", "-1")):
            assert receive(listener.fileno(), pid=pid, count=count).stdout == "[] [] []\n"


def test_what_is_no_listening_unix_socket_is_refused(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with left, right, (tmp_path / "f").open("w") as file, socket.socket() as tcp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        for fd in (left.fileno(), file.fileno(), tcp.fileno()):
            result = receive(fd)
            assert result.returncode == 1
            assert "descriptor 3, which is no listening Unix stream socket" in result.stderr
    assert "which is not open" in receive(count="3").stderr
