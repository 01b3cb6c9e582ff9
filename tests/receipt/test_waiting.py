"""A slot that was read when it was made: what is done to it before its call comes is seen then."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import IMAGES, needs_containers
from meddling import LIVE

ABSENT = {"sockets", "swap"}  # what not every kernel has

Found = dict[str, list[str]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What ``tampering.py`` saw."""
    needs_containers()
    state = tmp_path_factory.mktemp("state")
    (state / "images").symlink_to(IMAGES)
    script = str(Path(__file__).parents[1] / "tampering.py")
    command = [sys.executable, script, "builtin", str(state), "waiting"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seen: Found = json.loads(done.stdout)
    return seen


def test_a_slot_that_nobody_touched_is_as_it_was(found: Found) -> None:
    assert found["nothing"] == []


@pytest.mark.parametrize("what", LIVE)
def test_a_control_that_is_taken_from_a_slot_that_waits_is_missed(found: Found, what: str) -> None:
    control = LIVE[what][1]
    if control in ABSENT and found[what] == ["absent"]:
        return
    assert control in found[what]
