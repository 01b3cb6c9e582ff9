"""A runtime's process: its end, its failure with what it said, and its being late."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.engine.launch import Launch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def launch(script: str, control: socket.socket, timeout: float = 10) -> Launch:
    command = ["/bin/sh", "-c", script]
    made = Launch("sh", command, control=control.fileno(), places=())
    made.go(timeout)
    return made


def test_the_runtime_has_the_connection_as_descriptor_3_and_is_waited_for(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    with launch("printf hello >&3; exec 3>&-; sleep 0.2", theirs) as one:
        theirs.close()
        assert ours.recv(16) == b"hello"
        assert ours.recv(16) == b""  # nobody else holds it
        began = time.monotonic()
        one.finish()
        assert time.monotonic() - began > 0.1
        one.finish()


def test_a_runtime_that_fails_is_quoted(ends: tuple[socket.socket, socket.socket]) -> None:
    with (
        launch("echo no such thing >&2; exit 3", ends[1]) as one,
        pytest.raises(
            errors.EngineFailed, match=r"sh could not make a container \(status 3\): no such thing"
        ),
    ):
        one.finish()


def test_a_runtime_that_does_not_end_is_killed(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    with launch("exec sleep 60", theirs, timeout=0.2) as one:
        theirs.close()
        with pytest.raises(errors.EngineFailed, match="does not come to an end"):
            one.finish()
    assert ours.recv(1) == b""


def test_nothing_stays_open(ends: tuple[socket.socket, socket.socket]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with launch("exit 0", ends[1]) as one:
        one.finish()
    with launch("exec sleep 60", ends[1]):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
