"""What is shipped around the package: the build, the units, the example configuration, the scripts."""

from __future__ import annotations

import configparser
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sandboxd import doctor
from sandboxd.config import SYSTEM_SOCKET, Config, load_config

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.suffix != ".py")
BUILT_FROM = ("pyproject.toml", "hatch_build.py", "LICENSE", "README.md", "sandboxd", "policies", "images")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from, without what was built in it before."""
    for name in BUILT_FROM:
        source, target = ROOT / name, tmp_path / "checkout" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", "sandboxd-*")
            shutil.copytree(source, target, ignore=skip)
        else:
            shutil.copy(source, target)
    return tmp_path / "checkout"


def build(checkout: Path, kind: str = "wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


PROGRAMS = ("sandboxd-container", "sandboxd-init", "sandboxd-launch")
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of elf(5)
HERE = platform.machine()
OTHER = next(machine for machine in MACHINES if machine != HERE)


def test_the_wheel_of_a_release_holds_static_binaries_for_both(checkout: Path, tmp_path: Path) -> None:
    wheels = []
    for root in (checkout, tmp_path / "elsewhere" / "checkout"):
        if root != checkout:
            shutil.copytree(checkout, root, ignore=shutil.ignore_patterns("dist", "sandboxd-*"))
        result = build(root, SANDBOXD_ARCHES="all")
        assert result.returncode == 0, result.stderr
        (wheel,) = (root / "dist").iterdir()
        wheels.append(wheel)
    assert wheels[0].name == wheels[1].name
    assert wheels[0].read_bytes() == wheels[1].read_bytes()  # in whatever directory and whenever
    assert wheels[0].name.endswith("-py3-none-manylinux_2_17_aarch64.manylinux_2_17_x86_64.whl")
    with zipfile.ZipFile(wheels[0]) as archive:
        for machine, number in MACHINES.items():
            for name in PROGRAMS:
                info = archive.getinfo(f"sandboxd/init/{machine}/{name}")
                assert info.external_attr >> 16 & 0o111 == 0o111
                program = archive.read(info)
                assert program.startswith(b"\x7fELF")
                assert int.from_bytes(program[18:20], "little") == number
                assert b"/ld-linux" not in program  # no interpreter: static
                assert info.file_size < 800_000
        assert "sandboxd/py.typed" in archive.namelist()  # as its classifier says
        assert "sandboxd/_shipped/policies/default.yaml" in archive.namelist()
        assert "sandboxd/_shipped/images/base.yaml" in archive.namelist()
        for name in ("__main__", "test_receipt", "programs/proof"):
            assert f"sandboxd/conformance/{name}.py" in archive.namelist()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert not list((checkout / "sandboxd/init").glob("*/sandboxd-*.*"))


def test_a_source_distribution_holds_no_binary_and_builds(checkout: Path, tmp_path: Path) -> None:
    result = build(checkout, "sdist")
    assert result.returncode == 0, result.stderr
    (packed,) = (checkout / "dist").iterdir()
    with tarfile.open(packed) as archive:
        assert not [name for name in archive.getnames() if name.rpartition("/")[2] in PROGRAMS]
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("sandboxd-*")
    result = build(source, **{f"CC_{OTHER}": "no-such-compiler"})
    assert result.returncode == 0, result.stderr
    assert f"built for {HERE} alone; no compiler for {OTHER}" in result.stderr
    assert "apt-get install gcc-" in result.stderr
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith(f"-py3-none-manylinux_2_17_{HERE}.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert f"sandboxd/init/{HERE}/sandboxd-init" in archive.namelist()
        assert not [name for name in archive.namelist() if f"/{OTHER}/" in name]


def test_a_release_is_not_built_for_one_machine_alone(checkout: Path) -> None:
    result = build(checkout, **{"SANDBOXD_ARCHES": "all", f"CC_{OTHER}": "no-such-compiler"})
    assert result.returncode != 0
    assert f"no compiler for {OTHER}: no-such-compiler is not on PATH" in result.stderr
    assert not (checkout / "dist").exists() or not list((checkout / "dist").iterdir())


def test_a_compiler_for_another_machine_is_not_taken(checkout: Path) -> None:
    result = build(checkout, **{f"CC_{OTHER}": "cc"})
    assert result.returncode != 0
    assert f"cc does not compile for {OTHER}" in result.stderr


def test_a_wrong_word_for_the_machines_is_refused(checkout: Path) -> None:
    result = build(checkout, SANDBOXD_ARCHES="both")
    assert result.returncode != 0
    assert "SANDBOXD_ARCHES is 'both'" in result.stderr


def test_the_suite_needs_nothing_of_the_checkout(checkout: Path) -> None:
    """Operators have the wheel alone."""
    assert build(checkout).returncode == 0
    (wheel,) = (checkout / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(checkout / "installed")
    result = subprocess.run(
        [sys.executable, "-P", "-m", "sandboxd.conformance", "--images", "/nowhere"],
        cwd=checkout / "installed",
        env={**os.environ, "PYTHONPATH": str(checkout / "installed")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 2
    assert "/nowhere is no image store" in result.stderr or "needs root" in result.stderr


def test_a_build_without_a_compiler_says_what_to_install(checkout: Path) -> None:
    result = build(checkout, CC="no-such-compiler -O1")
    assert result.returncode != 0
    assert "no C compiler: no-such-compiler is not on PATH" in result.stderr
    assert "apt-get install gcc libc6-dev" in result.stderr


def test_a_build_shows_what_the_compiler_said_and_leaves_the_old_binary(checkout: Path) -> None:
    old = checkout / f"sandboxd/init/{HERE}/sandboxd-init"
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    (checkout / "sandboxd/init/init.c").write_text("int main(void) { return oops; }\n")
    result = build(checkout)
    assert result.returncode != 0
    assert "oops" in result.stderr
    assert old.read_text() == "old"
    assert [path.name for path in old.parent.glob("sandboxd-*")] == ["sandboxd-init"]


def test_a_build_without_a_source_fails(checkout: Path) -> None:
    (checkout / "sandboxd/init/launch.c").unlink()
    result = build(checkout)
    assert result.returncode != 0
    assert "sandboxd/init/launch.c is missing" in result.stderr


def test_on_another_machine_it_says_so(tmp_path: Path) -> None:
    """``setarch`` has the kernel say that this machine is an i686."""
    if shutil.which("setarch") is None or HERE != "x86_64":
        pytest.skip("no setarch, or its kernel knows no other name")
    program = "from sandboxd.init import require_programs; require_programs()"
    result = subprocess.run(
        ["setarch", "i686", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "HostUnsupported: sandboxd runs on x86_64 and aarch64" in result.stderr
    assert "a 64-bit Python on i686" in result.stderr
    sandboxd = str(Path(sys.executable).with_name("sandboxd"))
    policy = str(ROOT / "policies/default.yaml")
    for command in (["doctor"], ["policy", "check", policy], ["serve", "--state", str(tmp_path)]):
        result = subprocess.run(
            ["setarch", "i686", sandboxd, *command], capture_output=True, text=True, check=False, timeout=30
        )
        assert result.returncode != 0
        assert "i686" in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


def test_the_example_configuration_is_the_defaults() -> None:
    assert load_config(PACKAGING / "sandboxd.yaml") == Config()


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keys of units have capitals
    parser.read_string((PACKAGING / name).read_text())
    return parser


def test_the_units_agree_with_the_defaults() -> None:
    sock = unit("sandboxd.socket")["Socket"]
    assert sock["ListenStream"] == str(SYSTEM_SOCKET)
    assert int(sock["SocketMode"], 8) == Config().socket.mode
    assert sock["SocketGroup"] == Config().socket.group
    service = unit("sandboxd.service")["Service"]
    assert service["Type"] == "notify"
    assert service["Delegate"] == "yes"
    assert service["KillMode"] == "mixed"
    assert f"/var/lib/{service['StateDirectory']}" == str(Config().state)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed here")
    for name in ("sandboxd.service", "sandboxd.socket"):
        text = (PACKAGING / name).read_text().replace("/opt/sandboxd/bin/sandboxd", "/bin/true")
        (tmp_path / name).write_text(text)
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(path) for path in sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    ours = [line for line in result.stderr.splitlines() if "sandboxd" in line]
    assert ours == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert os.access(script, os.X_OK) == (script.suffix != ".sh")


def test_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed here")
    subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS), ".ci/run"], cwd=ROOT, check=True, timeout=60)


def test_setup_installs_for_everybody_only_what_sandboxd_runs() -> None:
    always, tests = re.findall(r"for name in (.+); do", (ROOT / "scripts/setup").read_text())[:2]
    assert set(always.split()) == {"crun", "runc", "gcc", *doctor.TOOLS}
    assert "umoci" in tests.split()


def test_run_refuses_what_it_does_not_know() -> None:
    for arguments, answer in ((["--nonsense"], "unknown option"), (["--socket", "relative"], "absolute")):
        result = subprocess.run(
            [str(ROOT / "scripts/run"), *arguments], capture_output=True, text=True, check=False, timeout=30
        )
        assert result.returncode == 1
        assert answer in result.stderr


def test_stop_without_a_daemon_is_no_error(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts/run"), "--stop", "--state", str(tmp_path)]
    for content in (None, "", "1\n/run/x\n", "garbage\n", "999999999\n"):
        if content is not None:
            (tmp_path / "daemon.pid").write_text(content)
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert (result.returncode, result.stdout) == (0, "")
        assert "no daemon" in result.stderr
