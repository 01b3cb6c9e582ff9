"""A PID 1 in a pid namespace of its own, and a tool process that it has parked."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio

from sandboxd.init import INIT, LAUNCH
from sandboxd.init.protocol import Control, Rlimit, Setup, Started
from sandboxd.kernel.notify import NotifyServer
from sandboxd.policy import seccomp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sandboxd.init.protocol import Report

__all__ = ["ENV", "LONG", "SETUP", "UID", "Parked", "heard", "init", "parked"]

UID = 54_321
LONG = 60_000_000
ENV = [b"PATH=/usr/bin:/bin", b"SAID=hello"]
PROGRAM = seccomp.compile_filter(seccomp.resolve("default", (), ()))
SETUP = Setup(UID, UID, 0o027, 500, (Rlimit(7, 32, 32),), PROGRAM.bpf)  # 7: RLIMIT_NOFILE


@contextmanager
def init(program: Sequence[str] = (str(INIT),)) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A PID 1 and the daemon's end of its control connection."""
    ours, theirs = socket.socketpair()
    control = str(theirs.fileno())
    wait, go = os.pipe()
    command = [str(LAUNCH), "run", str(wait), control, "--", "unshare", "--pid", "--fork", *program]
    with ours:
        process = subprocess.Popen(command, pass_fds=[wait, theirs.fileno()])
        theirs.close()
        os.write(go, b"\n")
        os.close(go)
        os.close(wait)
        try:
            yield ours, process
        finally:
            ours.close()
            assert process.wait(10) is not None  # PID 1 ends when its connection does


@contextmanager
def heard(control: Control) -> Iterator[asyncio.Queue[Report]]:
    """What PID 1 says within the block."""
    reports: asyncio.Queue[Report] = asyncio.Queue()
    with control.heard(reports.put_nowait):
        yield reports


class Parked:
    """A parked tool process, to be given one command."""

    def __init__(self, control: Control, process: subprocess.Popen[bytes]) -> None:
        self.control = control
        self.process = process
        self.output = b""

    async def reports(
        self, argv: Sequence[bytes], *, cwd: bytes = b"/", deadline: int = LONG, signals: Sequence[int] = ()
    ) -> list[Report]:
        """Everything that PID 1 says about a command, until it has said the last."""
        read, write = os.pipe()
        said: list[Report] = []
        try:
            stdin = os.open("/dev/null", os.O_RDONLY)
            await self.control.execute(argv, ENV, cwd, deadline, [stdin, write, write])
            os.close(stdin)
            os.close(write)
            with anyio.fail_after(20), heard(self.control) as reports:
                while not said or isinstance(said[-1], Started):
                    said.append(await reports.get())
                    if isinstance(said[-1], Started) and signals:
                        await anyio.sleep(0.2)
                        for number in signals:
                            await self.control.signal(number)
            os.set_blocking(read, False)
            with os.fdopen(read, "rb", closefd=False) as file:
                self.output = file.read() or b""
        finally:
            os.close(read)
        return said


@contextmanager
def parked(setup: Setup = SETUP, program: Sequence[str] = (str(INIT),)) -> Iterator[Parked]:
    with init(program) as (sock, process), Control(sock) as control, NotifyServer() as server:
        listener = server.add(control.setup(setup, 10), answer=seccomp.answer)
        try:
            yield Parked(control, process)
        finally:
            listener.close()


def seconds_to_die(slot: Parked) -> float:
    """Run a command that will not end, close the connection to PID 1, and wait until nobody is left."""
    read, write = os.pipe()
    with open(os.devnull, "rb") as null:  # noqa: PTH123
        argv = [b"sh", b"-c", b"trap '' TERM HUP; setsid sleep 1000 & sleep 1000"]
        anyio.run(slot.control.execute, argv, ENV, b"/", LONG, [null.fileno(), write, write])
    os.close(write)
    time.sleep(0.2)
    began = time.monotonic()
    slot.control.close()
    assert os.read(read, 1) == b""  # the end of file: nobody holds the other end any more
    os.close(read)
    return time.monotonic() - began
