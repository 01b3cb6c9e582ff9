"""What every hostile test gets: its programs, and a look at the host when it is over."""

from __future__ import annotations

import os
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import PATIENCE, berths_of, pooled_slots, slots_of, until
from held import Held, check_held, descriptors_of, waiting_in
from programs import Programs

from sandboxd.models import Cause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation

NATIVE = Path(__file__).parents[1] / "native"
PROGRAMS = Path(__file__).parent / "programs"
MAX_GROWTH = 48 * 2**20  # bytes that one attack may add to the daemon's resident memory
WAITING_DESCRIPTORS = 17  # that the daemon has open for each container that waits (SANDBOXD_TEST_POOL)
OVERLAY_DESCRIPTORS = 3  # and for its root, if that is an overlay: two mounts and the upper directory
BERTH_DESCRIPTORS = 4  # and for each berth: two connections, a pidfd, and what its process says
BUSY_CPU = 0.5  # of one CPU: a daemon with nothing to do must not spin


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory, need: Callable[[object, str], None]) -> Programs:
    need(shutil.which("gcc"), "gcc")
    return Programs.compile(tmp_path_factory.mktemp("programs"), [*PROGRAMS.glob("*.c"), NATIVE / "sweep.c"])


@dataclass(frozen=True)
class Host:
    """What a call must not change on the host."""

    null: tuple[int, int, int, int]
    hostname: str
    core_pattern: str

    @classmethod
    def look(cls) -> Host:
        null = Path("/dev/null").stat()
        return cls(
            null=(null.st_uid, null.st_gid, null.st_rdev, stat.S_IMODE(null.st_mode)),
            hostname=os.uname().nodename,
            core_pattern=Path("/proc/sys/kernel/core_pattern").read_text(),
        )


@pytest.fixture(scope="session")
def settled(daemon: Daemon) -> Daemon:
    """The daemon after its first call: what it opens once and keeps is open."""
    assert daemon.run("true").outcome is not None
    until(lambda: daemon.client(timeout=5).health().running == 0, "the first call's turn is over")

    def rests() -> bool:
        """What takes the place of what the call had is made, and has all that it will have."""
        first = descriptors_of(daemon.processes)
        time.sleep(0.3)
        return descriptors_of(daemon.processes) == first

    until(rests, "the daemon has made ready for the next call")
    return daemon


@pytest.fixture(autouse=True)
def host_unharmed(settled: Daemon) -> Iterator[None]:
    """After each test: the host is as it was, and the daemon serves the next call at once and rightly."""
    daemon, before = settled, Host.look()
    process = psutil.Process(daemon.process.pid)
    resident = process.memory_info().rss

    pooled, berths = len(pooled_slots(daemon)), len(berths_of(daemon))
    open_before, held = descriptors_of(daemon.processes), Held.by(daemon.processes, waiting_in(daemon))

    def more_descriptors() -> str:
        """What is open beyond what may be, of any kind: what a slot had is closed when its turn is over.

        Only what waits for a call has some, and how many wait, and of which policy, may change at any time.
        """
        now = len(pooled_slots(daemon))
        allowed = WAITING_DESCRIPTORS * max(0, now - pooled) + OVERLAY_DESCRIPTORS * now
        allowed += BERTH_DESCRIPTORS * max(0, len(berths_of(daemon)) - berths)
        more = descriptors_of(daemon.processes) - open_before
        return "" if more.total() <= allowed else f"{dict(more)}, of which {allowed} may be"

    yield
    assert Host.look() == before
    until(lambda: not slots_of(daemon), "no container of the daemon is left")
    until(lambda: daemon.client(timeout=5).health().running == 0, "the last call's turn is over")
    health = daemon.client(timeout=5).health()
    assert (health.status, health.running, health.queued) == ("ready", 0, 0)
    began = time.monotonic()
    answer = daemon.run("sh", "-c", "echo $((6 * 7)); ls -A")
    assert answer.outcome is not None
    assert (answer.outcome.cause, answer.outcome.exit_code) == (Cause.EXITED, 0), answer.outcome
    assert answer.stdout is not None
    assert (answer.stdout.text, answer.denials, answer.limits_reached) == ("42\n", [], [])
    assert time.monotonic() - began < 5 * PATIENCE
    try:
        until(lambda: not more_descriptors(), "the daemon closes its descriptors")
    except AssertionError as error:
        error.add_note(more_descriptors())
        raise
    check_held(daemon, held)
    assert process.memory_info().rss < resident + MAX_GROWTH
    used, at = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(0.05)
    assert sum(process.cpu_times()[:2]) - used <= BUSY_CPU * (time.monotonic() - at) + 0.02 * PATIENCE


@pytest.fixture
def probe(daemon: Daemon, programs: Programs) -> Callable[..., tuple[dict[str, str], Invocation]]:
    """Run a program that prints ``NAME RESULT`` lines, and give them as a dictionary."""

    def run(
        program: str, *arguments: str, policy: str = "default", **options: object
    ) -> tuple[dict[str, str], Invocation]:
        found = daemon.run(
            f"./{program}", *arguments, policy=policy, inputs=programs.input(program), **options
        )
        assert found.outcome is not None
        assert found.outcome.exit_code == 0, (found.outcome, found.stderr)
        assert found.stdout is not None
        assert found.stdout.text is not None
        lines = [line.rpartition(" ") for line in found.stdout.text.splitlines()]
        return {name: result for name, _, result in lines}, found

    return run
