"""Slots of the ``oci`` engine on the real kernel: what is changed after they were made is seen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import IMAGES, needs_containers

from sandboxd import errors
from sandboxd.engine.oci import cgroup_limits, rlimits
from sandboxd.engine.probe import probe_shape
from sandboxd.engine.runtime import find_runtimes

if TYPE_CHECKING:
    from collections.abc import Callable

Found = dict[str, list[str]]


@pytest.fixture(scope="module", params=["builtin", "crun", "runc"])
def found(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    need: Callable[[object, str], None],
) -> Found:
    """What ``tampering.py`` saw."""
    needs_containers()
    need(request.param == "builtin" or shutil.which(request.param), request.param)
    state = tmp_path_factory.mktemp("state")
    (state / "images").symlink_to(IMAGES)
    script = str(Path(__file__).parent.parent / "tampering.py")
    done = subprocess.run(
        [sys.executable, script, request.param, str(state)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: Found = json.loads(done.stdout)
    return seen


def test_a_slot_has_every_control(found: Found) -> None:
    assert found["nothing"] == []
    assert found["nothing again"] == []  # and reading it changes nothing


@pytest.mark.parametrize("control", ["memory", "pids", "cpu"])
def test_a_limit_that_was_raised_meanwhile_is_seen(found: Found, control: str) -> None:
    assert control in found[control]


def test_a_process_that_joined_is_seen(found: Found) -> None:
    assert found["joined"] == ["processes"]


def test_an_interface_that_came_later_is_seen(found: Found) -> None:
    assert found["interface"] == ["network"]


def test_another_filter_than_the_one_asked_for_is_seen(found: Found) -> None:
    assert found["filter"] == ["seccomp"]


def test_live_slots_share_no_ids_and_no_namespace(found: Found) -> None:
    assert len(set(found["ranges"])) == 3
    assert len(set(found["namespaces"])) == 3


def test_slots_leave_nothing(found: Found) -> None:
    assert found["left"] == []
    assert (
        int(found["leaked"][0]) <= 3
    )  # the user namespaces of the two further slots are kept, and used again


def test_a_runtime_that_is_not_there_is_named() -> None:
    with pytest.raises(errors.HostUnsupported, match="/no/such/crun"):
        find_runtimes("/no/such/crun")


def test_the_dialect_is_told_from_the_name(tmp_path: Path) -> None:
    for name, dialect in (("my-crun", "crun"), ("runc-1.1", "runc"), ("kata-runtime", "runc")):
        file = tmp_path / name
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
        [runtime] = find_runtimes(str(file))
        assert (runtime.name, runtime.dialect) == (name, dialect)


def test_limits_become_rlimits_and_cgroup_limits() -> None:
    limits = probe_shape().limits
    assert all(limit.soft == limit.hard for limit in rlimits(limits))
    assert cgroup_limits(limits, None).memory == limits.memory
