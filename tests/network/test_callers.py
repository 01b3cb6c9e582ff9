"""Callers do not share a process that serves their network, nor what it knows."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import PATIENCE, until
from networked import FETCH, FOUND, start_networked, workers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon
    from world import World

UIDS = (61001, 61002)
CALLERS = """\
callers:
  - {match: {uid: 0}, role: operator}
  - {match: {uid: 61001}, role: agent, policies: [net]}
  - {match: {uid: 61002}, role: agent, policies: [net]}
"""


@pytest.fixture(scope="module")
def shared(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that serves two users beside root."""
    del world
    directory: Path = tmp_path_factory.mktemp("shared")
    with start_networked(directory, CALLERS) as daemon:
        daemon.admit_everybody()
        yield daemon


AS_USER = """
import os, sys
from pathlib import Path
from sandboxd import Client
socket, uid, code = sys.argv[1:]
os.setgroups([]); os.setgid(int(uid)); os.setuid(int(uid))
print(Client(Path(socket)).run(["python3", "-c", code], policy="net").stdout.text, end="")
"""


def call_as(daemon: Daemon, uid: int, code: str) -> str:
    """What a call of this user prints."""
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, daemon.socket, str(uid), code],
        capture_output=True,
        timeout=60 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout.decode()


def test_each_has_a_process_of_its_own(shared: Daemon) -> None:
    for uid in UIDS:
        assert call_as(shared, uid, FETCH) == FOUND
    users = [worker.uids().real for worker in workers(shared)]
    assert len(users) == len(set(users)) == len(UIDS)
    assert not set(users) & {0, *UIDS}


def test_calls_of_one_share_it_and_many_at_once_are_served(shared: Daemon) -> None:
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda number: call_as(shared, UIDS[number % 2], FETCH), range(36)))
    assert found == [FOUND] * 36
    assert len(workers(shared)) == len(UIDS)


def test_the_death_of_ones_process_is_nothing_to_the_other(shared: Daemon) -> None:
    for uid in UIDS:
        call_as(shared, uid, FETCH)
    victim, other = workers(shared)
    victim.kill()
    until(lambda: [worker.pid for worker in workers(shared)] == [other.pid], "the killed one is gone")
    for uid in UIDS:
        assert call_as(shared, uid, FETCH) == FOUND
    assert psutil.pid_exists(other.pid)
