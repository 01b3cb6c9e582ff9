"""Delegation on the v2 hierarchy of this kernel, also on a hybrid host, where it offers few controllers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import daemons
import pytest

from sandboxd.engine.host import instance_name
from sandboxd.kernel import cgroupfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What runs in a cgroup of its own: argv is its directory, the tree's name and the controllers to use.
PRELUDE = """
import os, pathlib, signal, subprocess, sys
from sandboxd.kernel import cgroupfs
top, name, controllers = sys.argv[1:4]
cgroupfs.REQUIRED_V2, cgroupfs.OPTIONAL_V2 = tuple(controllers.split()), ()
from sandboxd.kernel.cgroup_tree import CgroupTree
own = lambda: cgroupfs.parse_self_cgroup(pathlib.Path("/proc/self/cgroup").read_text())[""]
pathlib.Path(top, "cgroup.procs").write_text("0")
before = own()
"""


@pytest.fixture
def top(run_token: str, need: Callable[[object, str], None]) -> Iterator[Path]:
    """A v2 cgroup that stands for the unit that a service manager delegates, its controllers passed down."""
    found = [h for h in cgroupfs.detect().mounted if h.version == 2 and h.controllers and h.writable]
    if not found:
        pytest.skip("no controller of this host is on cgroup v2")
    need(os.geteuid() == 0, "root")
    root = Path(found[0].mount)
    path = root / f"sandboxd-test-{run_token}"
    path.mkdir()
    missing = sorted(set(controllers_of(root)) - set((root / "cgroup.subtree_control").read_text().split()))
    for name in missing:
        (root / "cgroup.subtree_control").write_text(f"+{name}")
    yield path
    (path / "cgroup.kill").write_text("1")
    for directory, _, _ in os.walk(path, topdown=False):
        Path(directory).rmdir()
    for name in missing:
        (root / "cgroup.subtree_control").write_text(f"-{name}")


def controllers_of(root: Path) -> list[str]:
    there = (root / "cgroup.controllers").read_text().split()
    return sorted({"memory", "pids", "cpu"} & set(there)) or there[:1]


def run(top: Path, name: str, code: str) -> str:
    command = [sys.executable, "-c", PRELUDE + code, str(top), name, " ".join(controllers_of(top.parent))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_daemon_moves_to_a_leaf_and_back(top: Path, run_token: str) -> None:
    code = """
tree = CgroupTree.open(name)
assert tree.version == 2
assert tree.place == top, tree.place
assert own() == before + "/daemon", own()
again = CgroupTree.open(name + "-again")
assert again.place == top, again.place
again.close()
assert own() == before + "/daemon", own()
passed = pathlib.Path(top, "sandboxd-" + name, "cgroup.subtree_control").read_text().split()
assert set(passed) == set(controllers.split()), passed
tree.close()
assert own() == before, own()
assert [path for path in pathlib.Path(top).iterdir() if path.is_dir()] == []
print("done")
"""
    assert run(top, run_token, code) == "done\n"


def test_a_shared_cgroup_is_left_alone_and_the_root_is_used(top: Path, run_token: str) -> None:
    code = """
neighbour = subprocess.Popen(["sleep", "60"])
try:
    tree = CgroupTree.open(name)
    assert tree.place == os.path.dirname(top), tree.place
    assert own() == before, own()
    tree.close()
    assert not pathlib.Path(tree.place, "sandboxd-" + name).exists()
finally:
    neighbour.kill()
    neighbour.wait()
print("done")
"""
    assert run(top, run_token, code) == "done\n"


def test_an_optional_controller_that_stops_above_is_done_without(top: Path, run_token: str) -> None:
    """A unit with ``Delegate=cpu memory pids`` is a place like any other; its slots have no disk rates."""
    if "io" not in (top.parent / "cgroup.controllers").read_text().split():
        pytest.skip("the io controller of this host is not on cgroup v2")
    unit = top / "unit"
    unit.mkdir()
    (top / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers_of(top)))
    code = """
cgroupfs.OPTIONAL_V2 = ("io",)
tree = CgroupTree.open(name)
assert tree.place == top, tree.place
assert tree.controllers == set(controllers.split()), tree.controllers
tree.close()
print("done")
"""
    assert run(unit, run_token, code) == "done\n"


def test_the_containers_of_a_delegated_daemon_are_below_its_unit(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cgroupfs.detect().version != 2:
        pytest.skip("this host limits containers by cgroup v1")
    started = tmp_path / "sandboxd"
    started.write_text(f'#!/bin/sh\necho 0 >{top}/cgroup.procs && exec {daemons.SANDBOXD} "$@"\n')
    started.chmod(0o755)
    monkeypatch.setattr(daemons, "SANDBOXD", started)
    with daemons.start_daemon(tmp_path) as daemon:
        inside = (top / "daemon" / "cgroup.procs").read_text().split()
        assert sorted(map(int, inside)) == sorted(daemon.processes)
        call = daemon.run("sh", "-c", "sleep 0.1; exit 3", policy="host")
        assert call.outcome is not None
        assert call.outcome.exit_code == 3
        assert call.receipt is not None
        read_from = {control.name: control.read_from for control in call.receipt.controls}
        tree = top / f"sandboxd-{instance_name(daemon.state)}"
        assert Path(read_from["memory"]).parents[1] == tree
        daemon.stop()
        assert not tree.exists()


def test_a_slot_is_killed_in_one_step(top: Path, run_token: str) -> None:
    code = """
tree = CgroupTree.open(name)
directory = pathlib.Path(top, "sandboxd-" + name, "slot")
directory.mkdir()
(slot,) = tree.leftovers()
assert slot.relative_path == before + "/sandboxd-" + name + "/slot", slot.relative_path
join = "open(%r, 'w').write('0'); import os; os.fork(); print('in', flush=True); import time; time.sleep(10)"
child = subprocess.Popen([sys.executable, "-c", join % slot.procs_files[0]], stdout=subprocess.PIPE)
said = child.stdout.read(6)
assert sorted(said) == sorted(b"in\\nin\\n"), (said, child.poll())  # two writers: any order
assert slot.contains(child.pid)
assert not slot.contains(os.getpid())
assert len(slot.processes()) == 2
assert slot.cpu_total() > 0
(directory / "cgroup.freeze").write_text("1")
slot.kill()
assert child.wait(timeout=10) == -signal.SIGKILL
assert slot.processes() == []
slot.remove()
slot.remove()
tree.close()
print("done")
"""
    assert run(top, run_token, code) == "done\n"
