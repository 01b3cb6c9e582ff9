"""``sandboxd doctor`` on this host: what no policy can do without is there, and the JSON has one shape."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from daemons import IMAGES, SANDBOXD, needs_containers

from sandboxd.rights import CAPABILITIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def doctor(
    tmp_path: Path, *arguments: str, config: str = "", before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    needs_containers()
    state = tmp_path / "state"
    state.mkdir(exist_ok=True)
    if not (state / "images").exists():
        (state / "images").symlink_to(IMAGES)
    file = tmp_path / "sandboxd.yaml"
    file.write_text(f"state: {state}\n{config}")
    command = [*before, str(SANDBOXD), "doctor", "--config", str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_this_host_is_healthy(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"usable", "checks"}
    assert found["usable"] is True
    for check in found["checks"]:
        assert set(check) == {"name", "ok", "found", "advice", "required"}
        assert check["ok"] or not check["required"], check
        assert check["ok"] or check["advice"], check
    names = {check["name"] for check in found["checks"] if check["ok"]}
    assert names >= {"kernel", "root", "user namespaces", "mount namespace", "cgroups", "engine oci"}
    assert names & {"crun", "runc"}  # a container of theirs was made, and its receipt read


def test_without_json_it_is_a_table_for_people(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WHAT TO DO" in done.stdout
    assert "kernel" in done.stdout


def test_a_runtime_that_makes_no_container_is_named_with_advice(tmp_path: Path) -> None:
    broken = tmp_path / "crun-broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    broken.chmod(0o755)
    done = doctor(tmp_path, "--json", config=f"engine: oci\nruntime: {broken}\n")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["usable"] is False
    [check] = [check for check in found["checks"] if check["name"].startswith("crun-broken")]
    assert "it is broken" in check["found"]
    assert check["advice"]


@pytest.mark.parametrize("name", sorted(CAPABILITIES))
def test_a_capability_that_is_not_here_is_named(tmp_path: Path, name: str) -> None:
    without = ["setpriv", f"--bounding-set=-{name.lower()}", f"--inh-caps=-{name.lower()}"]
    done = doctor(tmp_path, "--json", before=without)
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert f"CAP_{name}" in checks["capabilities"]["found"]
    assert f"--cap-add {name} " in checks["capabilities"]["advice"]
    assert not [check for check in checks if "container" in check]  # each would fail of the same


def test_a_proc_that_is_read_only_is_named(tmp_path: Path) -> None:
    script = 'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"'
    done = doctor(tmp_path, "--json", before=["unshare", "--mount", "sh", "-c", script, "sh"])
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert not checks["/proc/sys"]["ok"]
    assert not checks["engine oci"]["ok"]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_doctor_beside_a_daemon_disturbs_nothing(tmp_path: Path) -> None:
    first = doctor(tmp_path, "--json")
    again = doctor(tmp_path, "--json")
    assert first.returncode == again.returncode == 0
