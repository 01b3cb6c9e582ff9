"""The protocol of a service manager, with real sockets."""

from __future__ import annotations

import socket
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
