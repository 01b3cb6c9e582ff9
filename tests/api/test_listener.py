"""Binding the socket: mode, group, stale ones, others' ones, and systemd's."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxd.api import listener
from sandboxd.config import SocketConfig
from sandboxd.errors import ConfigInvalid


def test_mode_and_group_hold_under_any_umask(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s.sock"
    for umask in (0o000, 0o777):
        before = os.umask(umask)
        try:
            (tmp_path / "deep").mkdir(mode=0o755, exist_ok=True)
            (tmp_path / "deep").chmod(0o755)
            with listener.bind(path, mode=0o660, group="daemon"):
                found = path.lstat()
        finally:
            os.umask(before)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert found.st_gid == 1  # daemon, on every Debian
        path.unlink()


def test_a_missing_group_is_left_out(tmp_path: Path) -> None:
    with listener.bind(tmp_path / "s", mode=0o660, group="no-such-group-here"):
        assert (tmp_path / "s").stat().st_gid == os.getgid()


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener.bind(path, mode=0o660, group=None).close()
    with listener.bind(path, mode=0o660, group=None):
        with pytest.raises(ConfigInvalid, match="another daemon answers"):
            listener.bind(path, mode=0o660, group=None)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(os.fspath(path))
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigInvalid, match="is no socket"):
        listener.bind(tmp_path / "s", mode=0o660, group=None)
    assert (tmp_path / "s").read_text() == "precious"


def test_paths_that_cannot_be_bound(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="107 bytes"):
        listener.bind(tmp_path / ("x" * 100), mode=0o660, group=None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigInvalid, match="cannot listen"):
        listener.bind(tmp_path / "file" / "s", mode=0o660, group=None)


def test_the_socket_goes_with_its_daemon_and_another_s_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    config = SocketConfig.model_validate({"path": os.fspath(path)})
    with listener.listening(config, {}):
        assert path.is_socket()
    assert not path.exists()
    with listener.listening(config, {}):
        path.unlink()
        path.write_text("another's")
    assert path.exists()


def test_without_activation() -> None:
    assert listener.activated({}) is None
    assert listener.activated({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) is None


ACTIVATED = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
kind = sys.argv[2]
if kind == "file":
    fd = os.open("/dev/null", os.O_RDONLY)
elif kind == "closed":
    fd = 3
    os.closerange(3, 64)
elif kind == "tcp":
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    fd = sock.detach()
else:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
    sock.bind("\\0sandboxd-test-" + str(os.getpid()))
    if kind == "good": sock.listen()
    fd = sock.detach()
if fd != 3: os.dup2(fd, 3)
from sandboxd.api import listener
from sandboxd.errors import ConfigInvalid
count = {"two": "2", "garbage": "x" * 100}.get(kind, "1")
environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "x"}
try:
    with listener.listening(None, environ) as found:
        print("good", found.fileno(), os.get_inheritable(3), environ)
except ConfigInvalid as error:
    print("refused", error)
"""


@pytest.mark.parametrize("kind", ["good", "file", "closed", "tcp", "datagram", "deaf", "two", "garbage"])
def test_activation(kind: str) -> None:
    root = os.fspath(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATED, root, kind], capture_output=True, text=True, timeout=30, check=False
    )
    expected = "good 3 False {}" if kind == "good" else "refused socket activation"
    assert done.stdout.startswith(expected), done.stderr
