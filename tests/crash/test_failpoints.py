"""A daemon under load dies at every step that makes something durable: each call has one outcome all the
same.

``SANDBOXD_CRASHES`` says how often the daemon is killed at random moments besides. With few of them it dies
at some of the places only, chosen by chance, and comes to all others alive.
"""

from __future__ import annotations

import os
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from crashing import Crashing, names_in_source
from daemons import needs_containers

from sandboxd import errors

CRASHES = int(os.environ.get("SANDBOXD_CRASHES", "2"))
SOME = 4 if CRASHES < 100 else 10_000  # places to die at
SOON = 20.0  # seconds in which what is done all the time is done
FIRST = ("journal.key", "journal.migrate")
"""Where only the first daemon of a state directory is."""
AT_START = {
    "container.lost", "journal.opened", "layer.restore", "recovery.again", "recovery.close", "spool.recover",
    "spool.restore",
}  # fmt: skip
"""Where a daemon is only when it starts, or does what the one before it left undone."""
LEFT_BY = {"layer.restore": ("layer.settled", "KILL")}
"""Where the daemon before has to die to leave something to do. Else it leaves a spool that is not closed."""
OLDER = {"journal.backup"}
"""Where a daemon is that finds the state of an older version: the last test."""
TRIES = 30
SELDOM = {"journal.move", "journal.moved", "secret.key"}


def rotate(crashing: Crashing) -> None:
    """Have the daemon write secrets until it dies of it."""
    assert crashing.daemon is not None
    client = crashing.daemon.client()
    with suppress(errors.Unavailable):
        for number in range(10):
            value = f"the value of number {number}".encode()
            try:
                client.rotate_secret("TOKEN", value)
            except errors.NotFound:
                client.set_secret("TOKEN", value)


def die_at(crashing: Crashing, name: str) -> None:
    """Have the daemon die at a failpoint, and start it again."""
    if name in AT_START:
        for _ in range(TRIES):
            crashing.arm(*LEFT_BY.get(name, ("spool.write", "KILL 3")))
            assert crashing.died(SOON)
            crashing.arm(name, "KILL")
            if not crashing.start():
                break
            (crashing.failpoints / name).unlink()
        else:
            pytest.fail(f"no daemon that starts comes to {name}")
    else:
        crashing.arm(name, "KILL" if name in SELDOM else f"KILL {crashing.random.choice((1, 2, 4))}")
        if name.startswith("secret."):
            rotate(crashing)
        assert crashing.died(SOON), f"under load nothing comes to {name}"
    assert not (crashing.failpoints / name).exists()
    assert crashing.start(), crashing.said()


@pytest.mark.timeout(600)
def test_dying_at_every_failpoint(place: Path, no_leaks: None) -> None:
    needs_containers()
    names = sorted(names_in_source())
    with Crashing(place, seed=time.time_ns() % 1_000_000) as crashing:
        for name in FIRST:
            crashing.arm(name, "KILL")
            assert not crashing.start()
        assert crashing.start()
        crashing.start_callers()
        left = [name for name in names if name not in {*FIRST, *OLDER}]
        for name in left if len(left) <= SOME else sorted(crashing.random.sample(left, SOME)):
            die_at(crashing, name)
            crashing.check()
        rotate(crashing)
        for _ in range(TRIES):
            if crashing.hits() >= set(names) - OLDER:
                break
            time.sleep(1)
            crashing.kill()
            assert crashing.start(), crashing.said()
        crashing.stop_callers()
        crashing.check_at_rest()
        assert crashing.hits() == set(names) - OLDER


@pytest.mark.timeout(24 * 3600)
def test_dying_at_random_moments(place: Path, no_leaks: None) -> None:
    needs_containers()
    with Crashing(place, seed=time.time_ns() % 1_000_000) as crashing:
        assert crashing.start()
        crashing.start_callers()
        for number in range(1, CRASHES + 1):
            time.sleep(crashing.random.uniform(0.0, 0.6))
            crashing.kill()
            assert crashing.start(), crashing.said()
            crashing.check()
            if number % 50 == 0:  # what callers remember is asked for again and again
                crashing.stop_callers()
                crashing.check_at_rest()
                crashing.start_callers()
        crashing.stop_callers()
        crashing.check_at_rest()


def test_dying_while_an_older_state_is_migrated(place: Path, no_leaks: None) -> None:
    needs_containers()
    state = place / "state"
    with tarfile.open(Path(__file__).parents[1] / "states" / "schema-1.tar.xz") as tar:
        tar.extractall(state, filter="data")
    with Crashing(place, seed=1, state=state) as crashing:
        for name in (*OLDER, "journal.migrate"):
            crashing.arm(name, "KILL")
            assert not crashing.start(), name
        assert crashing.start(), crashing.said()
        crashing.check()
        assert crashing.daemon is not None
        assert crashing.daemon.client().list().invocations
        assert [path.suffix for path in (state / "backups").iterdir()] == [".sqlite3"]
