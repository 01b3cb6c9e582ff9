"""PID 1 of a container that outlives its command, spoken to in a pid namespace of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import needs_containers
from parked import LONG, SETUP, UID, Parked, heard, parked, seconds_to_die

from sandboxd import errors
from sandboxd.init.protocol import ExecFailed, Exited

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.init.protocol import Report

KEPT = replace(SETUP, keep=True)
CAPABILITIES = (1 << 5) | (1 << 6) | (1 << 7)  # KILL, SETGID, SETUID


@pytest.fixture(autouse=True)
def root() -> None:
    needs_containers()


def process_of(pidfd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pid:")))


@contextmanager
def next_one(slot: Parked) -> Iterator[int]:
    """A further process is parked: its number on the host."""
    listener, pidfd = slot.control.park(KEPT, 10)
    with ExitStack() as stack:
        stack.callback(os.close, listener)
        stack.callback(os.close, pidfd)
        yield process_of(pidfd)


def ran(slot: Parked, script: str) -> tuple[int, str]:
    said = anyio.run(slot.reports, [b"sh", b"-c", script.encode()])
    assert isinstance(said[-1], Exited)
    return said[-1].status, slot.output.decode()


def test_what_a_command_leaves_lives_on_and_another_runs_beside_it() -> None:
    with parked(KEPT) as slot:
        status, output = ran(slot, "sleep 1000 >/dev/null 2>&1 & echo $!")
        assert status == 0
        left = output.strip()
        with next_one(slot) as pid:
            status, output = ran(slot, f"kill -0 {left} && echo alive; id -u; exit 3")
            assert status == 3 << 8
            assert output.split() == ["alive", str(UID)]
            assert not Path(f"/proc/{pid}").exists()


def test_every_process_is_parked_as_the_first_was() -> None:
    shown = "grep -E '^(Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp|Seccomp_filters|"
    shown += (
        "SigIgn|SigBlk)' /proc/self/status; ulimit -n; umask; ls /proc/self/fd; cat /proc/self/oom_score_adj"
    )
    with parked(KEPT) as slot:
        _, first = ran(slot, shown)
        for _ in range(3):
            with next_one(slot):
                assert ran(slot, shown) == (0, first)


def test_a_process_that_waits_cannot_be_looked_into_by_what_an_earlier_command_left() -> None:
    with parked(KEPT) as slot:
        ran(slot, "true")
        with next_one(slot) as pid:
            for name in ("mem", "environ", "maps", "fd", "cwd"):
                look = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "ls", "-l"]
                looked = [*look, f"/proc/{pid}/{name}/"] if name in {"fd", "cwd"} else [
                    *look[:-2], "head", "-c1", f"/proc/{pid}/{name}"
                ]  # fmt: skip
                found = subprocess.run(looked, capture_output=True, check=False)
                assert b"Permission denied" in found.stderr, name


def test_a_deadline_is_its_own_commands_and_not_of_what_that_left() -> None:
    with parked(KEPT) as slot:
        said = anyio.run(lambda: slot.reports([b"sh", b"-c", b"sleep 1000 &"], deadline=700_000))
        assert isinstance(said[-1], Exited)
        time.sleep(1)
        with next_one(slot):
            assert ran(slot, "echo there") == (0, "there\n")


def test_a_signal_after_the_end_of_a_command_goes_nowhere() -> None:
    with parked(KEPT) as slot:
        _, left = ran(slot, "sleep 1000 >/dev/null 2>&1 & echo $!")
        anyio.run(slot.control.signal, signal.SIGKILL)
        with next_one(slot):
            assert ran(slot, f"kill -0 {left.strip()} && echo alive") == (0, "alive\n")


def test_a_command_that_cannot_be_executed_leaves_room_for_another() -> None:
    with parked(KEPT) as slot:
        said = anyio.run(until_reaped, slot, [b"/no/such"])
        assert isinstance(said[0], ExecFailed)
        with next_one(slot):
            assert ran(slot, "echo on") == (0, "on\n")


async def until_reaped(slot: Parked, argv: list[bytes]) -> list[Report]:
    said: list[Report] = []
    with open(os.devnull, "r+b") as null, anyio.fail_after(10), heard(slot.control) as reports:  # noqa: ASYNC230, PTH123
        await slot.control.execute(argv, [], b"/", LONG, [null.fileno()] * 3)
        while not said or not isinstance(said[-1], Exited):
            said.append(await reports.get())
    return said


def test_a_parked_process_that_is_killed_is_reported_and_another_can_be_parked() -> None:
    with parked(KEPT) as slot:
        ran(slot, "true")
        with next_one(slot) as pid:
            os.kill(pid, signal.SIGKILL)
            said = anyio.run(until_reaped, slot, [b"true"])
            assert isinstance(said[-1], Exited)
            assert said[-1].status == signal.SIGKILL
        with next_one(slot):
            assert ran(slot, "echo on") == (0, "on\n")


def test_a_second_setup_while_a_command_may_still_run_ends_the_container() -> None:
    with parked(KEPT) as slot, pytest.raises(errors.EngineFailed):
        slot.control.park(KEPT, 10)


def test_pid_1_of_a_container_that_is_not_kept_takes_no_second_setup() -> None:
    with parked() as slot:
        ran(slot, "true")
        with pytest.raises(errors.EngineFailed):
            slot.control.park(SETUP, 10)


def test_all_of_it_ends_with_the_connection() -> None:
    with parked(KEPT) as slot:
        ran(slot, "for i in 1 2 3; do setsid sleep 1000 >/dev/null 2>&1 & done")
        with next_one(slot):
            assert seconds_to_die(slot) < 5


def test_pid_1_keeps_no_more_than_it_takes_to_make_another_process() -> None:
    with parked(KEPT) as slot:
        ran(slot, "true")
        children = Path(f"/proc/{slot.process.pid}/task/{slot.process.pid}/children").read_text(
            encoding="ascii"
        )
        status = Path(f"/proc/{children.split()[0]}/status").read_text(encoding="ascii")
        lines = dict(line.split(":\t", 1) for line in status.splitlines())
        assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == CAPABILITIES
        assert int(lines["CapBnd"], 16) == int(lines["CapInh"], 16) == 0
        assert lines["NoNewPrivs"] == "1"
