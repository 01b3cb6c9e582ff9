"""Calls end to end: policy, container, outcome, over the socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daemons import Daemon


def test_true_exits_with_zero(daemon: Daemon) -> None:
    found = daemon.run("true")
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == ("exited", 0)
    assert found.receipt is not None
    assert all(control.enforced for control in found.receipt.controls)
