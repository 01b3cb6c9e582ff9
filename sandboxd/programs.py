"""Runs a program of the operator's that is told of a call's end, and bounds what that may cost.

Theory of operation.  The daemon starts ``messenger``, has it put into a cgroup of its own, and only then says
which user and program it is to become: nothing of the operator's runs outside its limits or as root. What the
program writes is read to its end and its head kept for the log. When it has ended or its time is over, its
cgroup is taken away with whatever it started, and so it is when the daemon stops.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Protocol

import anyio
import anyio.from_thread
import anyio.to_thread

from sandboxd import errors, messenger, units
from sandboxd.kernel.cgroup import CgroupLimits

if TYPE_CHECKING:
    from sandboxd.config import CallbackProgram

__all__ = ["Confining", "run"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHOWN = 512  # bytes of what it wrote that are kept
CHUNK = 16 * 1024  # at least PIPE_BUF
OWN = 2  # processes beside the program: ``messenger``, and the one that reaps


class Confining(Protocol):
    """Who puts processes into cgroups."""

    async def confine(self, name: str, pid: int, limits: CgroupLimits) -> None:
        """Put a process into one of its own."""

    async def release(self, name: str) -> None:
        """Take it away, with whatever is in it."""


async def run(program: CallbackProgram, call: str, line: str, confining: Confining) -> str | None:
    """Run it once, with ``line`` as its standard input; None when it ended with 0, else why not.

    Raises nothing but a cancellation, and leaves no process behind.
    """
    try:
        uid, gid = await anyio.to_thread.run_sync(_ids, program)
    except errors.HostFailed as error:
        return str(error)
    env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/", "SANDBOXD_CALL": call}
    asked = {"uid": uid, "gid": gid, "argv": list(program.argv), "env": env}
    running = _Running(program, f"callback-{call}", json.dumps(asked).encode(), line.encode(), confining)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(running.end_with_this)
        result = await anyio.to_thread.run_sync(running.run)
        tasks.cancel_scope.cancel()
    return result


def _ids(program: CallbackProgram) -> tuple[int, int]:
    """Who it runs as. Raises HostFailed."""
    try:
        user = pwd.getpwnam(program.user)
        gid = user.pw_gid if program.group is None else grp.getgrnam(program.group).gr_gid
    except KeyError as error:
        raise errors.HostFailed(f"there is no such user or group: {error.args[0]}") from None
    if user.pw_uid == 0 or gid == 0:
        raise errors.HostFailed("it would be of uid 0 or gid 0, as no program of callbacks is")
    return user.pw_uid, gid


class _Running:
    """One run. All of it is in one thread: the kernel kills what a thread started when that thread ends."""

    def __init__(
        self, program: CallbackProgram, name: str, asked: bytes, line: bytes, confining: Confining
    ) -> None:
        self._program = program
        self._name = name
        self._asked = asked
        self._line = line
        self._confining = confining
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._head = b""

    async def end_with_this(self) -> None:
        """Wait; when this is cancelled, end it."""
        try:
            await anyio.sleep_forever()
        finally:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def run(self) -> str | None:
        """Blocks until it and all that it started has ended."""
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            with os.fdopen(writing, "wb", buffering=0) as go:
                try:
                    self._process = process = self._start(reading)
                finally:
                    os.close(reading)
                with process:
                    try:
                        return self._confined(process, go)
                    finally:
                        process.kill()
        except (OSError, errors.SandboxdError) as error:
            return f"it could not be run: {error}"

    def _start(self, reading: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(messenger.__file__)), str(reading)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd="/",
            env={"LANG": "C.UTF-8"},
            pass_fds=(reading,),
            start_new_session=True,
        )

    def _confined(self, process: subprocess.Popen[bytes], go: BinaryIO) -> str | None:
        program = self._program
        limits = CgroupLimits(program.memory, program.pids + OWN, program.cpus)
        anyio.from_thread.run(self._confining.confine, self._name, process.pid, limits)
        try:
            if not self._stopped:
                go.write(self._asked)
            go.close()
            late = self._attend(process, time.monotonic() + program.timeout / 1e6)
            process.kill()
            process.wait()
        finally:
            anyio.from_thread.run(self._confining.release, self._name)
        if late:
            return f"it had not ended after {units.format_duration(program.timeout)}"
        if process.returncode == 0:
            return None
        said = self._head.decode("utf-8", "replace").strip()
        return f"it ended with status {process.returncode}" + (f": {said}" if said else "")

    def _attend(self, process: subprocess.Popen[bytes], end: float) -> bool:
        """Give it its input and take what it writes; whether it had not ended when it should have."""
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        pidfd = os.pidfd_open(process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                os.set_blocking(process.stdin.fileno(), False)
                selector.register(pidfd, selectors.EVENT_READ)
                selector.register(process.stdin, selectors.EVENT_WRITE)
                selector.register(process.stdout, selectors.EVENT_READ)
                while (left := end - time.monotonic()) > 0:
                    ready = {key.fileobj for key, _ in selector.select(left)}
                    if process.stdout in ready and not self._take(process.stdout):
                        selector.unregister(process.stdout)
                    if process.stdin in ready and not self._give(process.stdin):
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    if pidfd in ready:
                        return False
            return True
        finally:
            os.close(pidfd)

    def _take(self, output: IO[bytes]) -> bool:
        """Read some of what it wrote; False at its end."""
        data = os.read(output.fileno(), CHUNK)
        self._head += data[: SHOWN - len(self._head)]
        return bool(data)

    def _give(self, source: IO[bytes]) -> bool:
        """Write some of its input; False when it has all, or takes no more."""
        try:
            self._line = self._line[os.write(source.fileno(), self._line[:CHUNK]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        return bool(self._line)
