"""Faults of the host at the worst moment: what was promised holds all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon


def test_a_call_whose_output_has_no_place_still_has_an_outcome(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    spools = daemon.state / "calls"
    spools.rmdir()
    spools.touch()  # root may write anywhere, but not below a file
    try:
        done = daemon.run("echo", "something to keep")
        silent = daemon.run("true")
    finally:
        spools.unlink()
        spools.mkdir(mode=0o700)
    assert done.outcome is not None
    assert done.outcome.cause == "failed"
    assert done.outcome.error is not None
    assert done.outcome.error.code == "host"
    assert silent.outcome is not None
    assert silent.outcome.cause == "exited"  # it needs no place
    kept = daemon.client().get(done.id)
    assert kept.state == "ended"
    assert kept.outcome == done.outcome
    assert daemon.run("true").outcome.cause == "exited"  # type: ignore[union-attr]
