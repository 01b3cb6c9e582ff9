"""The leak check finds what it is there for, and nothing of a neighbour."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from held import NAMESPACES, Held, descriptors_of, namespaces_of, waiting_in
from leaks import Sessions

from sandboxd.kernel.cgroup import CgroupLimits
from sandboxd.kernel.cgroup_tree import CgroupTree

if TYPE_CHECKING:
    from daemons import Daemon
    from leaks import Session


def new(session: Session, before: object) -> str:
    from leaks import Snapshot  # noqa: PLC0415  -- a plugin, imported by pytest first

    assert isinstance(before, Snapshot)
    return session.watch.snapshot().new_since(before)


def test_nothing_is_nothing(leak_session: Session) -> None:
    assert new(leak_session, leak_session.watch.snapshot()) == ""


def test_a_descriptor_is_seen(leak_session: Session, tmp_path: Path) -> None:
    before = leak_session.watch.snapshot()
    with (tmp_path / "left").open("w"):
        assert new(leak_session, before).startswith("  descriptors: ")
    assert new(leak_session, before) == ""


def test_a_child_and_what_it_disowned_are_seen(leak_session: Session) -> None:
    before = leak_session.watch.snapshot()
    code = "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nos.close(1)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.communicate(timeout=30)
    found = new(leak_session, before)
    assert found.startswith("  processes: ")
    os.kill(int(found.split()[1]), 9)
    assert leak_session.watch.leaks_since(before, everything=lambda: False) == ""


def test_a_file_with_a_claim_is_seen(leak_session: Session, run_token: str) -> None:
    before = leak_session.watch.snapshot()
    ours, theirs = Path(f"/tmp/sandboxd-{run_token}"), Path("/tmp/sandboxd-test-neighbour")
    ours.touch()
    theirs.touch()
    try:
        assert new(leak_session, before) == f"  files: {ours}"
    finally:
        ours.unlink()
        theirs.unlink()


def test_a_mount_below_the_temporary_directory_is_seen(
    leak_session: Session, tmp_path: Path, need: object
) -> None:
    assert callable(need)
    need(os.geteuid() == 0, "root")
    before = leak_session.watch.snapshot()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    try:
        assert new(leak_session, before).startswith(f"  mounts: {tmp_path} ")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_cgroup_with_a_claim_is_seen(leak_session: Session, run_token: str, claims: set[str]) -> None:
    before = leak_session.watch.snapshot()
    ours, theirs = CgroupTree.open(f"test-{run_token}"), CgroupTree.open(f"test-neighbour-{os.getpid()}")
    try:
        cgroup = ours.create("slot", CgroupLimits(None, None, None))
        found = new(leak_session, before)
        assert f"test-{run_token}/slot" in found
        assert "neighbour" not in found
        cgroup.remove()
        claims.add(theirs.name)
        assert "neighbour" in new(leak_session, before)
    finally:
        claims.discard(theirs.name)
        ours.close()
        theirs.close()


def test_every_kind_of_namespace_is_seen(leak_session: Session, need: object) -> None:
    assert callable(need)
    need(os.geteuid() == 0, "root")
    before = leak_session.watch.snapshot()
    kinds = ("--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--user")
    with subprocess.Popen(["unshare", *kinds, "--fork", "sleep", "60"]) as process:
        child = _sleeper(process)
        found = new(leak_session, before)
        assert {line.partition(":")[2].strip().partition(":")[0] for line in found.splitlines()} >= {
            *NAMESPACES
        }
        os.kill(child, 9)
    assert leak_session.watch.leaks_since(before, everything=lambda: False) == ""


def _sleeper(process: subprocess.Popen[bytes]) -> int:
    """The child of ``unshare``, once it has become ``sleep``."""
    end = time.monotonic() + 10
    while True:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text() == "sleep\n":
                return int(child)
        assert time.monotonic() < end


def test_what_the_daemon_forgot_in_its_own_mount_namespace_is_seen(daemon: Daemon, tmp_path: Path) -> None:
    pid = daemon.process.pid
    before = Held.by(daemon.processes, waiting_in(daemon))
    enter = ["nsenter", f"--mount=/proc/{pid}/ns/mnt"]
    subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    try:
        found = Held.by(daemon.processes, waiting_in(daemon)).new_since(before)
    finally:
        subprocess.run([*enter, "umount", str(tmp_path)], check=True)
    assert found.startswith(f"  mount: {tmp_path} ")
    assert f"{tmp_path} " not in Path("/proc/self/mountinfo").read_text()


def test_a_process_that_is_no_berth_and_a_descriptor_are_seen(tmp_path: Path, need: object) -> None:
    assert callable(need)
    need(os.geteuid() == 0, "root")
    before, open_before = Held.by([os.getpid()], ()), descriptors_of([os.getpid()])
    with subprocess.Popen(["unshare", "--net", "--fork", "sleep", "60"]) as process:
        child = _sleeper(process)
        namespace = os.open(f"/proc/{child}/ns/net", os.O_RDONLY)
        try:
            found = Held.by([os.getpid()], ()).new_since(before)
            name = next(one for one in namespaces_of(child) if one.startswith("net:"))
            assert f"  {name} of process {child}, sleep" in found.splitlines()
            assert f"  {name} as a descriptor of the daemon" in found.splitlines()
            assert descriptors_of([os.getpid()]) - open_before == {"net:[N]": 1}
        finally:
            os.close(namespace)
            os.kill(child, 9)


def test_a_session_knows_whether_it_is_alone(tmp_path: Path) -> None:
    first = Sessions(tmp_path / "sessions")
    assert first.alone()
    second = Sessions(tmp_path / "sessions")
    second.close()
    assert not first.alone()
    first.close()
    third = Sessions(tmp_path / "sessions")
    assert third.alone()
    third.close()


def test_a_leak_fails_the_session(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((tests / "conftest.py").read_text().replace(
        "Path(__file__).parent", f"Path({str(tests)!r})"))  # fmt: skip
    (tmp_path / "test_it.py").write_text("import os\ndef test_it(): os.open('/dev/null', os.O_RDONLY)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'b'}"]
    result = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert result.returncode == 1
    assert "the test session left behind:\n  descriptors: " in result.stdout
    assert "1 passed, 1 error" in result.stdout


@pytest.mark.usefixtures("no_leaks")
def test_one_test_can_be_wrapped() -> None:
    subprocess.run(["true"], check=True)
