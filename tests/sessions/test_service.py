"""Attacks on the file service of sessions: what one caller asks for costs nobody else their daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import struct
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from sessioned import by

from sandboxd.api.descriptors import path_beside
from sandboxd.workspace import tables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon

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
