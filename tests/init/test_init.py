"""PID 1's protocol, spoken to the real binary in a pid namespace of its own."""

from __future__ import annotations

import errno
import signal
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import PATIENCE, needs_containers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parked import SETUP, UID, heard, init, parked, seconds_to_die

from sandboxd import errors
from sandboxd.init import INIT
from sandboxd.init.protocol import HEADER, Control, ExecFailed, Exited, Gone, Setup, Started, Type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.init.protocol import Report


@pytest.fixture(autouse=True)
def root() -> None:
    needs_containers()


def run(argv: Sequence[bytes], **options: object) -> tuple[list[Report], bytes]:
    with parked() as slot:
        said = anyio.run(lambda: slot.reports(argv, **options))  # type: ignore[arg-type]
        return said, slot.output


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7 << 8), ("kill -9 $$", 9)])
def test_a_command_starts_and_its_status_comes_back(command: str, status: int) -> None:
    said, _ = run([b"sh", b"-c", command.encode()])
    assert said[0] == Started()
    assert isinstance(said[1], Exited)
    assert said[1].status == status
    assert said[1].max_rss > 0


def test_the_tool_is_what_setup_said() -> None:
    script = b"id -u; id -g; id -G; umask; ulimit -n; cat /proc/self/oom_score_adj; echo $SAID; pwd; "
    script += b"ls /proc/self/fd"
    said, output = run([b"sh", b"-c", script], cwd=b"/usr")
    assert isinstance(said[-1], Exited)
    lines = output.decode().split()
    assert lines[:3] == [str(UID)] * 3
    assert lines[3:8] == ["0027", "32", "500", "hello", "/usr"]
    assert lines[8:] == ["0", "1", "2", "3"]  # 3 is the directory that ls reads: the control is not there


def test_what_was_ignored_where_the_daemon_was_started_is_not_ignored_by_the_tool() -> None:
    with parked(program=("env", "--ignore-signal=HUP,INT,QUIT,TERM,USR1,CHLD", str(INIT))) as slot:
        said = anyio.run(slot.reports, [b"grep", b"-E", b"^Sig(Ign|Blk)", b"/proc/self/status"])
        assert isinstance(said[-1], Exited)
        assert {line.split()[1] for line in slot.output.decode().splitlines()} == {"0" * 16}


@pytest.mark.parametrize(
    ("argv", "cwd", "number"),
    [
        ([b"/no/such"], b"/", errno.ENOENT),
        ([b"no-such-program"], b"/", errno.ENOENT),
        ([b"/etc/passwd"], b"/", errno.EACCES),
        ([b"/usr"], b"/", errno.EACCES),
        ([b""], b"/", errno.ENOENT),
        ([b"true"], b"/no/such/directory", errno.ENOENT),
        ([b"true", b"x" * 200_000], b"/", errno.E2BIG),
        ([b"/" + b"x" * 5000], b"/", errno.ENAMETOOLONG),
    ],
)
def test_a_command_that_cannot_be_executed_has_its_errno(argv: list[bytes], cwd: bytes, number: int) -> None:
    said, _ = run(argv, cwd=cwd)
    assert said == [ExecFailed(number)]


def test_signals_go_to_the_whole_group() -> None:
    script = b"(trap 'echo child; exit' TERM; while :; do sleep 0.01; done) & "
    script += b"trap 'wait; echo main; exit 4' TERM; while :; do sleep 0.01; done"
    said, output = run([b"sh", b"-c", script], signals=[signal.SIGTERM])
    assert isinstance(said[-1], Exited)
    assert said[-1].status == 4 << 8
    assert {b"child", b"main"} <= set(output.split())


def test_orphans_are_reaped_and_the_end_of_the_tool_is_told_all_the_same() -> None:
    said, _ = run([b"sh", b"-c", b"for i in 1 2 3 4 5; do (sleep 0.05 &) ; done; sleep 0.2; exit 3"])
    assert isinstance(said[-1], Exited)
    assert said[-1].status == 3 << 8


def test_the_deadline_ends_everything_by_itself() -> None:
    began = time.monotonic()
    said, _ = run([b"sleep", b"1000"], deadline=300_000)
    assert said[0] == Started()
    assert isinstance(said[1], Gone)
    assert 0.25 < time.monotonic() - began < 5 * PATIENCE


def test_when_the_daemon_goes_everything_dies() -> None:
    with parked() as slot:
        assert seconds_to_die(slot) < 2 * PATIENCE
        assert slot.process.wait(5) != 0


def frame(kind: int, payload: bytes = b"", version: int = 1) -> bytes:
    return HEADER.pack(len(payload), kind, version, 0) + payload


WRONG = {
    "EXEC before SETUP": frame(Type.EXEC, struct.pack("=IIQ", 1, 0, 0) + b"/\0true\0"),
    "SIGNAL before SETUP": frame(Type.SIGNAL, struct.pack("=i", 9)),
    "another version": frame(Type.SETUP, SETUP.pack(), version=2),
    "no such type": frame(99),
    "a frame of init's own": frame(Type.HELLO),
    "SETUP cut short": frame(Type.SETUP, SETUP.pack()[:10]),
    "SETUP with more than it says": frame(Type.SETUP, SETUP.pack() + b"x"),
    "SETUP with too many rlimits": frame(Type.SETUP, struct.pack("=IIIiII", 1, 1, 0, 0, 99, 0)),
    "a length beyond all": HEADER.pack(2**32 - 1, Type.SETUP, 1, 0),
}


def ends(sent: bytes) -> None:
    """PID 1 ends by itself, and not by a crash."""
    with init() as (sock, process):
        sock.settimeout(10)
        sock.sendall(sent)
        with suppress(ConnectionResetError):  # it ended without reading all
            while sock.recv(4096):
                pass
        assert process.wait(5) == 125


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_frame_ends_it(what: str) -> None:
    ends(WRONG[what])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.integers(0, 70), payload=st.binary(max_size=64))
def test_any_frame_but_a_good_one_ends_it(kind: int, payload: bytes) -> None:
    ends(frame(kind, payload))


def test_a_command_without_its_descriptors_ends_it() -> None:
    with parked() as slot:
        slot.control._sock.sendall(frame(Type.EXEC, struct.pack("=IIQ", 1, 0, 0) + b"/\0true\0"))

        async def said() -> Report:
            with anyio.fail_after(10), heard(slot.control) as reports:
                return await reports.get()

        found = anyio.run(said)
        assert isinstance(found, Gone)
        assert "exec frame" in found.reason


def test_a_failed_setup_says_at_which_step() -> None:
    with init() as (sock, _), Control(sock) as control, pytest.raises(errors.EngineFailed) as caught:
        control.setup(Setup(UID, UID, 0, 0, (), struct.pack("=HBBI", 0xFFFF, 0, 0, 0)), 10)
    assert "park" in str(caught.value) or "seccomp" in str(caught.value)
