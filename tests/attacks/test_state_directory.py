"""What a user of the host who is no caller can read of the daemon's state: nothing that calls made."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, start_daemon, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon

OPEN = {"images", "journal.pub"}
"""What is the same for everybody: images, and what records are checked with."""


@pytest.fixture(params=["a new one", "one that was open"])
def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """One whose starter lets everybody read what he makes."""
    needs_containers()
    state = tmp_path / "state"
    state.mkdir()
    if request.param == "one that was open":
        for suffix in ("", "-wal", "-shm"):
            (state / f"search.sqlite3{suffix}").touch()
            (state / f"search.sqlite3{suffix}").chmod(0o666)
    before = os.umask(0)
    try:
        with start_daemon(tmp_path, state=state) as running:
            yield running
    finally:
        os.umask(before)


def readable(directory: Path) -> set[str]:
    """Everything below a directory that others can read or list."""
    found = set()
    for entry in os.scandir(directory):
        mode = entry.stat(follow_symlinks=False).st_mode
        if entry.name in OPEN or entry.is_symlink():
            continue
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            found.add(entry.path)
        if entry.is_dir() and mode & stat.S_IXOTH:
            found |= readable(directory / entry.name)
    return found


def test_nobody_else_reads_what_calls_made(daemon: Daemon) -> None:
    client = daemon.client()
    client.create_session("one")
    client.set_secret("TOKEN", b"a value that is long enough")
    command = "echo TOPSECRETWORD; echo file >file; mkdir -p out; echo artifact >out/a"
    daemon.run("sh", "-c", command, policy="files", session="one", key="key")
    until(lambda: client.search("TOPSECRETWORD").hits, "the call is in the index")
    assert readable(daemon.state) == set()
