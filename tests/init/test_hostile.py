"""PID 1 and the daemon's end against an interpreter that waits, and is the enemy's."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
from daemons import needs_containers
from parked import ENV, LONG, Parked, heard, parked

from sandboxd import errors
from sandboxd.init.protocol import ExecFailed, Exited, Gone, Started

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.init.protocol import Report

WAITS = """
import os, socket, time
pair = socket.socket(fileno=3)
pair.send(b"ready")
time.sleep(0.02)
try:
    {}
except OSError: pass
time.sleep(1000)
"""
MISDEEDS = {
    "it never reads": "pass",
    "it reads a part": "pair.recv(12); pair.recv(100)",
    "it reads for ever, a little at a time": "while True: pair.recv(7); time.sleep(0.001)",
    "it reads all and holds the pair": "while pair.recv(1 << 20): pass",
    "it says half an answer": "pair.send(b'ab')",
    "it has an answer ready": "pair.send(bytes([2, 0, 0, 0]))",
    "it answers without end": "while True: pair.send(b'z' * 65536)",
    "it forges frames of PID 1": "for n in range(64, 71): pair.send(bytes([0] * 4 + [n, 0, 1] + [0] * 5))",
    "it closes the pair": "pair.close()",
    "it closes everything": "os.closerange(0, 64)",
    "it writes no more": "pair.shutdown(socket.SHUT_WR)",
    "it reads no more": "pair.shutdown(socket.SHUT_RD)",
    "its child holds the pair": "if os.fork(): time.sleep(0.1); os._exit(3)",
    "it sends descriptors": "socket.send_fds(pair, [b'x'], [0, 1, 2] * 80)",
}
COMMANDS = {"small": [b"true"], "large": [b"true", *[b"x" * 100_000] * 60]}  # no socket holds 6 MB


@pytest.fixture(autouse=True)
def root() -> None:
    needs_containers()


def warm(slot: Parked, code: str, timeout: float = 10) -> str:
    """Have it wait; returns what it says."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        argv = [b"/usr/bin/python3", b"-c", code.encode()]
        return slot.control.warm(argv, ENV, [null] * 5, timeout)
    finally:
        os.close(null)


@contextmanager
def hostile(misdeed: str) -> Iterator[Parked]:
    with parked() as slot:
        assert warm(slot, WAITS.format(misdeed)).startswith("ready")
        time.sleep(0.05)  # so that most have done it when the command comes
        yield slot


async def reports(slot: Parked, command: list[bytes], deadline: int, number: int | None) -> list[Report]:
    """All that is said of a command until PID 1 ends, which is signalled once it has been sent."""
    null = os.open(os.devnull, os.O_RDWR)
    said: list[Report] = []
    try:
        with anyio.fail_after(10), heard(slot.control) as reports:
            await slot.control.execute(command, ENV, b"/", deadline, [null] * 3, warm=True)
            if number is not None:
                await slot.control.signal(number)
            while not said or isinstance(said[-1], (Started, ExecFailed)):
                said.append(await reports.get())
    finally:
        os.close(null)
    return said


@pytest.mark.parametrize("size", COMMANDS)
@pytest.mark.parametrize("what", MISDEEDS)
def test_a_signal_is_delivered_whatever_it_does(what: str, size: str) -> None:
    with hostile(MISDEEDS[what]) as slot:
        said = anyio.run(reports, slot, COMMANDS[size], LONG, signal.SIGKILL)
        ended = said.pop()
        assert isinstance(ended, Exited)
        assert ended.status == signal.SIGKILL or "child" in what
        assert len(said) <= 1  # it may look as if it had begun, or refused


@pytest.mark.parametrize("size", COMMANDS)
@pytest.mark.parametrize("what", MISDEEDS)
def test_the_deadline_is_kept_whatever_it_does(what: str, size: str) -> None:
    with hostile(MISDEEDS[what]) as slot:
        said = anyio.run(reports, slot, COMMANDS[size], 400_000, None)
        assert isinstance(said.pop(), Exited if "child" in what else Gone)
        assert len(said) <= 1
        if "child" not in what:
            assert slot.process.wait(5) != 0


@pytest.mark.parametrize("what", MISDEEDS)
def test_it_dies_with_the_control_connection_whatever_it_does(what: str) -> None:
    with hostile(MISDEEDS[what]) as slot:
        null = os.open(os.devnull, os.O_RDWR)
        anyio.run(slot.control.execute, COMMANDS["large"], ENV, b"/", LONG, [null] * 3)
        os.close(null)
        slot.control.close()
        assert slot.process.wait(5) != 0


def test_a_command_that_it_did_not_take_has_not_started() -> None:
    with hostile("pair.recv(100); pair.close()") as slot:
        said = anyio.run(reports, slot, COMMANDS["large"], 400_000, None)
        assert isinstance(said[0], ExecFailed)
        assert isinstance(said[1], Gone)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.write(3, b'x' * 5000)", "x" * 256),  # PID 1 hears no more at once
        ("import os; os.write(3, b'\\xff')", "\ufffd"),
        ("import os; os.close(3); import time; time.sleep(1000)", ""),
        ("import os; os._exit(3)", ""),
    ],
)
def test_what_it_says_of_its_start_is_bounded(code: str, said: str) -> None:
    with parked() as slot:
        assert warm(slot, code) == said


def test_one_that_says_nothing_is_not_awaited_for_ever() -> None:
    with parked() as slot, pytest.raises(errors.EngineFailed, match="not ready after"):
        warm(slot, "import time; time.sleep(1000)", 0.3)
