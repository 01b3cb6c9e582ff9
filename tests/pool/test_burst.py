"""Many callers at once against a small budget: what waits and what runs never holds more than that."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import slots_of, until

from sandboxd.engine.host import instance_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import Outcome

BUDGET = 300 * 2**20
CALLERS = 500
LIMIT = 64 * 2**20  # of the policy
COST = 2**20  # what a waiting container counts for at least


def memory_file(daemon: Daemon) -> Path:
    """Where the kernel says how much memory all containers of a daemon hold."""
    name = f"sandboxd-{instance_name(daemon.state)}"
    for path, _, files in os.walk("/sys/fs/cgroup"):
        for file in ("memory.usage_in_bytes", "memory.current"):
            if path.endswith(f"/{name}") and file in files:
                return Path(path) / file
    pytest.fail("the containers' cgroup is not there")


def test_a_burst_stays_within_the_budget(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(
        config="pool: {min: 2, max: 16}\nbudget: {memory: 300MiB, slots: 8}\nqueue: 2000\n"
        "http: {connections: 2000, connections_per_uid: 1000}\n"
    )
    client = daemon.client()
    daemon.run("true", policy="tiny")
    until(lambda: any(slot.state == "waiting" for slot in client.slots()), "slots wait")
    file, done = memory_file(daemon), threading.Event()
    kernel: list[int] = []
    counted: list[tuple[int, int]] = []

    def sample() -> None:
        while not done.wait(0.01):
            kernel.append(int(file.read_text()))
            states = [slot.state for slot in client.slots()]
            counted.append((states.count("running"), states.count("waiting")))

    def call(_: int) -> Outcome | None:
        return daemon.run("sh", "-c", "head -c 8000000 /dev/zero > /tmp/x", policy="tiny").outcome

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        with ThreadPoolExecutor(CALLERS) as threads:
            outcomes = list(threads.map(call, range(CALLERS)))
    finally:
        done.set()
        sampler.join()
    assert [one for one in outcomes if one is None or one.exit_code != 0] == []
    assert kernel
    assert max(kernel) <= BUDGET
    # one that runs counts as its limit, also while it is cleared away
    assert max(running * LIMIT + waiting * COST for running, waiting in counted) <= BUDGET
    assert daemon.stop() == 0
    assert not slots_of(daemon)
