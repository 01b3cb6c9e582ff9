"""The programs for the machine that this is not, run by qemu's user-mode emulation.

It passes most system calls on to this kernel, and is told which program to run, so that nothing of
binfmt_misc(5) is needed: what the emulated PID 1 executes is this machine's own. It has no seccomp(2), so
that the real program ends at its own filter, and what comes after it is tried with one that installs none.
Threads of its own keep it from making and joining user namespaces. ``scripts/arm64`` runs all of it on a
kernel of that machine.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import needs_containers
from parked import SETUP, UID, init, parked, seconds_to_die
from withheld_init import compiled

from sandboxd import errors
from sandboxd.init import SOURCES
from sandboxd.init.protocol import Control, ExecFailed, Exited, Gone, Started

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sandboxd.init.protocol import Report

OTHER = "x86_64" if platform.machine() == "aarch64" else "aarch64"
PROGRAMS = SOURCES / OTHER
WITHOUT_FILTERS = (
    ("int listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);",
     "int listener = eventfd(0, (int)(flags & program.len & 0));"),
    ("kept < 0 || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &own) < 0",
     "kept < 0 || own.len == 0"),
)  # fmt: skip


@pytest.fixture(scope="module")
def qemu() -> str:
    needs_containers()
    for name in (f"qemu-{OTHER}", f"qemu-{OTHER}-static"):
        if found := shutil.which(name):
            return found
    if os.environ.get("CI"):
        pytest.fail(f"qemu-{OTHER} is not installed: scripts/setup --tests")
    pytest.skip("no user-mode qemu")


@pytest.fixture(scope="module")
def unfiltered(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How the variant is run that installs no filter, and passes an eventfd for the listener."""
    program = compiled(
        SOURCES / "init.c",
        WITHOUT_FILTERS,
        "#define VERSION",
        "#include <sys/eventfd.h>\n",
        f"{OTHER}-linux-gnu-gcc",
    )
    file = tmp_path_factory.mktemp("other") / "init"
    file.write_bytes(program)
    file.chmod(0o755)
    return [qemu, str(file)]


def run(program: Sequence[str], argv: Sequence[bytes], **options: object) -> tuple[list[Report], bytes]:
    with parked(program=program) as slot:
        said = anyio.run(lambda: slot.reports(argv, **options))  # type: ignore[arg-type]
        return said, slot.output


def test_it_says_hello_and_ends_where_a_filter_cannot_be_installed(qemu: str) -> None:
    with init([qemu, str(PROGRAMS / "sandboxd-init")]) as (sock, process), Control(sock) as control:
        with pytest.raises(errors.EngineFailed, match="own filter: Function not implemented"):
            control.setup(SETUP, 10)
        assert process.wait(5) == 125


@pytest.mark.parametrize("sent", [b"", b"\0" * 12, b"\xff" * 64])
def test_a_wrong_frame_and_the_end_of_the_daemon_end_it(qemu: str, sent: bytes) -> None:
    with init([qemu, str(PROGRAMS / "sandboxd-init")]) as (sock, process):
        hello = sock.recv(12)
        assert int.from_bytes(hello[4:6], "little") == 64
        sock.sendall(sent)
        sock.close()
        assert process.wait(5) == 125


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7 << 8), ("kill -9 $$", 9)])
def test_a_command_starts_and_its_status_comes_back(unfiltered: list[str], command: str, status: int) -> None:
    said, _ = run(unfiltered, [b"sh", b"-c", command.encode()])
    assert said[0] == Started()
    assert isinstance(said[1], Exited)
    assert said[1].status == status
    assert said[1].max_rss > 0


def test_the_tool_is_what_setup_said(unfiltered: list[str]) -> None:
    script = b"id -u; id -g; id -G; umask; ulimit -n; cat /proc/self/oom_score_adj; echo $SAID; pwd; "
    script += b"grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status"
    said, output = run(unfiltered, [b"sh", b"-c", script], cwd=b"/usr")
    assert isinstance(said[-1], Exited)
    lines = output.decode().split()
    assert lines[:3] == [str(UID)] * 3
    assert lines[3:8] == ["0027", "32", "500", "hello", "/usr"]
    assert lines[8:] == ["CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]


@pytest.mark.parametrize(
    ("argv", "cwd", "number"),
    [
        ([b"no-such-program"], b"/", errno.ENOENT),
        ([b"/etc/passwd"], b"/", errno.EACCES),
        ([b"true"], b"/no/such/directory", errno.ENOENT),
    ],
)
def test_a_command_that_cannot_be_executed_has_its_errno(
    unfiltered: list[str], argv: list[bytes], cwd: bytes, number: int
) -> None:
    said, _ = run(unfiltered, argv, cwd=cwd)
    assert said == [ExecFailed(number)]


def test_signals_go_to_the_whole_group(unfiltered: list[str]) -> None:
    script = b"(trap 'echo child; exit' TERM; while :; do sleep 0.01; done) & "
    script += b"trap 'wait; echo main; exit 4' TERM; while :; do sleep 0.01; done"
    said, output = run(unfiltered, [b"sh", b"-c", script], signals=[signal.SIGTERM])
    assert isinstance(said[-1], Exited)
    assert said[-1].status == 4 << 8
    assert {b"child", b"main"} <= set(output.split())


def test_orphans_are_reaped(unfiltered: list[str]) -> None:
    said, _ = run(unfiltered, [b"sh", b"-c", b"for i in 1 2 3; do (sleep 0.05 &) ; done; sleep 0.2; exit 3"])
    assert isinstance(said[-1], Exited)
    assert said[-1].status == 3 << 8


def test_the_deadline_ends_everything_by_itself(unfiltered: list[str]) -> None:
    said, _ = run(unfiltered, [b"sleep", b"1000"], deadline=300_000)
    assert said[0] == Started()
    assert isinstance(said[1], Gone)


def test_when_the_daemon_goes_everything_dies(unfiltered: list[str]) -> None:
    with parked(program=unfiltered) as slot:
        seconds_to_die(slot)
        assert slot.process.wait(5) != 0


def test_the_launcher_waits_joins_and_executes(qemu: str, tmp_path: Path) -> None:
    procs = tmp_path / "cgroup.procs"
    procs.touch()
    wait, go = os.pipe()
    control, other = os.pipe()
    command = [qemu, str(PROGRAMS / "sandboxd-launch"), "run", str(wait), str(control), str(procs)]
    command += ["--", "sh", "-c", "ls -l /proc/$$/fd/3; exit 7"]
    with subprocess.Popen(command, pass_fds=[wait, control], stdout=subprocess.PIPE) as process:
        time.sleep(0.2)
        assert process.poll() is None
        os.write(go, b"\n")
        out, _ = process.communicate(timeout=10)
    for fd in (wait, go, control, other):
        os.close(fd)
    assert process.returncode == 7
    assert b"pipe:" in out
    assert procs.read_text() == "0"


def test_what_needs_a_user_namespace_says_that_it_has_none(qemu: str) -> None:
    program = str(PROGRAMS / "sandboxd-launch")
    done = subprocess.run([qemu, program, "userns", "70000"], capture_output=True, timeout=10, check=False)
    assert (done.returncode, done.stderr) == (125, b"sandboxd-launch: unshare: Invalid argument\n")
