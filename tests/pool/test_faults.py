"""No fault in what keeps slots ready ends a call, or the daemon: it is logged, and things go on after it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import daemons
import pytest
from daemons import needs_containers, slots_of, start_daemon, until
from waiting import filled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Daemon]:
    needs_containers()
    program, faults = tmp_path / "faulty-sandboxd", tmp_path / "faults"
    faults.write_text("")
    script = Path(__file__).with_name("faulty_daemon.py")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} {faults} "$@"\n')
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(daemons, "SANDBOXD", program)
        with start_daemon(tmp_path, config="pool: {min: 2, max: 2}\n") as daemon:
            yield daemon


def serves(daemon: Daemon) -> None:
    found = daemon.run("echo", "ran", policy="tiny")
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, found.outcome


@pytest.mark.parametrize("fault", ["create", "destroy", "in_force", "room", "berth"])
def test_a_fault_is_logged_and_outlived(faulty: Daemon, fault: str) -> None:
    faults = faulty.log.with_name("faults")
    call = faulty.client().start(["sleep", "30"], policy="tiny")
    slots = filled(faulty)
    faults.write_text(fault)
    if fault == "destroy":
        os.kill(next(iter(slots.values())).pop(), 9)

    def met() -> bool:
        serves(faulty)
        return f"fault of {fault}" in faulty.log.read_text()

    until(met, "the fault is met")
    assert faulty.client().get(call.id).state == "running"
    faults.write_text("")
    faulty.client().cancel(call.id)
    filled(faulty)
    serves(faulty)
    assert faulty.stop() == 0
    assert not slots_of(faulty)
