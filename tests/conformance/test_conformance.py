"""The shipped suite, on each engine of this host; and that it would notice what it is there to notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from daemons import IMAGES, needs_containers
from dockerd import own_engine, remapping
from pages import code, page
from podman import Podman

from sandboxd.conformance import expected
from sandboxd.conformance.__main__ import AREAS, build_parser
from sandboxd.conformance.case import controls, program, said
from sandboxd.conformance.options import Options
from sandboxd.conformance.proofs import PROOFS
from sandboxd.conformance.subject import open_subject

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

# scripts/nightly has crun, runc, docker, podman and an engine that remaps ids too: together they take
# minutes. tests/docker and scripts/dind are in scripts/test, and try the engine docker on their own.
MORE = os.environ.get("SANDBOXD_TEST_RUNTIMES", "").split()
ENGINES = {"docker": ("dockerd", "none"), "podman": ("podman", "none"), "remapped": ("dockerd", "engine")}
"""The program of each, and the user namespaces that its containers have."""
RUNTIMES = ["builtin", *(name for name in MORE if name not in ENGINES)]
SECONDS = 900


def suite(*arguments: str, seconds: float = SECONDS, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandboxd.conformance", *arguments],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )


def conforms(report: Path, *arguments: str) -> dict[str, Any]:
    """Run all of it; what it reports, but for the tests."""
    ran = suite(*arguments, "--images", str(IMAGES), "--report", str(report))
    assert ran.returncode == 0, ran.stdout
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["counts"]["failed"] == 0
    assert found["counts"]["passed"] > 250
    assert {one["area"] for one in found["results"]} == set(AREAS)
    skipped = {one["detail"] for one in found["results"] if one["outcome"] == "skipped"}
    assert skipped <= {why for reasons in expected.EXPECTED.values() for why in reasons.values()}
    return found


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_oci_conforms(tmp_path: Path, need: Callable[[object, str], None], runtime: str) -> None:
    needs_containers()
    need(runtime == "builtin" or shutil.which(runtime), runtime)
    found = conforms(tmp_path / "report.json", "--engine", "oci", "--runtime", runtime)
    assert (found["engine"], found["runtime"]) == ("oci", runtime)


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("name", ENGINES)
def test_docker_conforms(tmp_path: Path, need: Callable[[object, str], None], name: str) -> None:
    if name not in MORE:
        pytest.skip("scripts/nightly holds a Docker Engine and Podman to all of it")
    needs_containers()
    program, namespaces = ENGINES[name]
    need(shutil.which(program), program)
    own = own_engine(kind=Podman) if name == "podman" else own_engine()
    with remapping(tmp_path) if name == "remapped" else own as engine:
        config = f"docker: {{socket: {engine.socket}}}"
        found = conforms(tmp_path / "report.json", "--engine", "docker", "--config", config)
        assert engine.containers() == []
    assert (found["engine"], found["user_namespace"]) == ("docker", namespaces)


def test_a_running_daemon_can_be_held_to_it(daemon: Daemon, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    before = {path.name for path in daemon.policies.iterdir()}
    ran = suite(
        *("--socket", str(daemon.socket), "--policies", str(daemon.policies), "--report", str(report)),
        *("-k", "outcomes or cleanup or pool"),
    )
    assert ran.returncode == 0, ran.stdout
    assert "it is not ours to configure" in ran.stdout
    assert "<testsuite " in report.read_text()
    assert {path.name for path in daemon.policies.iterdir()} == before


def test_a_failure_is_told(tmp_path: Path) -> None:
    """With the programs of another image in its place, what the suite expects of Python is not there."""
    needs_containers()
    report = tmp_path / "report.json"
    ran = suite("--images", str(IMAGES), "--image", "python=base", "-k", "a_line_is", "--report", str(report))
    assert ran.returncode == 1, ran.stdout
    assert "FAILED: receipt::test_a_line_is_true[memory]" in ran.stdout
    counts = json.loads(report.read_text())["counts"]
    assert counts["failed"] > 40


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "/nowhere"], "/nowhere is no image store"),
        (["--socket", "/nowhere/s", "--policies", "/tmp"], "no daemon answers"),
        (["--image", "ruby=x"], "the suite uses base and python"),
        (["--images", str(IMAGES), "--runtime", "/no/such/runtime"], "no OCI runtime"),
        (["--images", str(IMAGES), "-k", "no_such_test"], " deselected"),
    ],
)
def test_what_it_cannot_run_with_it_says(arguments: list[str], said: str) -> None:
    needs_containers()
    ran = suite(*arguments)
    assert ran.returncode == 2, ran.stdout
    assert said in ran.stdout
    assert "Traceback" not in ran.stdout


def test_without_pytest_it_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['pytest'] = None; import runpy; sys.argv = ['x']; "
    hide += "runpy.run_module('sandboxd.conformance', run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-c", hide], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "pip install 'sandboxd[conformance]'" in ran.stderr


def loosened(seen: Any) -> Any:
    """An answer of a program for which nothing was refused."""
    match seen:
        case str() if seen.isupper():
            return "done"
        case str():
            return f"{seen} of another"
        case bool():
            return not seen
        case int() | float():
            return seen * 1000 + 1000
        case list():
            return [loosened(one) for one in seen] or ["something"]
    raise AssertionError(seen)


def test_every_proof_can_fail() -> None:
    """Each is given what the program would have said in a container that holds nothing back."""
    needs_containers()
    with open_subject(Options(images=IMAGES)) as subject:
        marks = ["1", "1", "4194303"]
        call = subject.run("python3", "proof.py", *marks, *PROOFS, policy="proof", **program("proof"))
    answers, lines = said(call), controls(call)
    there = [line for line in PROOFS if line in lines]
    assert len(there) > 45
    assert [line for line in there if PROOFS[line](lines[line].in_force, loosened(answers[line]))] == []


def test_the_list_of_lines_is_that_of_the_reference() -> None:
    documented = {name for row in page("docs/calls.md").rows("control") for name in code(row[0])}
    shown = {"mount": "mount TARGET", "secret": "secret NAME"}
    assert {shown.get(name.partition(" ")[0], name) for name in expected.RECEIPT} == documented


def test_every_option_is_documented() -> None:
    wanted = {option for action in build_parser()._actions for option in action.option_strings}
    found = {text.split()[0] for row in page("docs/testing.md").rows("option") for text in code(row[0])}
    assert found | {"-h", "--help"} == wanted
