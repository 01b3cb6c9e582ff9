"""The daemon's end of the control connection to a container's PID 1; ``init.c`` is the other.

A frame is a 12-byte header (payload length, type, version, exec id) and a payload, native byte order:
both ends are on one host. Descriptors travel with a frame's first byte.

    daemon -> init   SETUP    ids, umask, rlimits and the filter of the tool process; of a container that is
                              kept, again, for the next one, when a command has ended
                     EXEC     the command; stdin, stdout, stderr as descriptors
                     SIGNAL   to the tool's process group
                     WARM     the interpreter that the parked process becomes before any command
                     EXEC_WARM  as EXEC, for the interpreter that waits to run itself if it can
    init -> daemon   HELLO    PID 1 runs
                     PARKED   the tool process waits; the listener of its filter as a descriptor, and where
                              the container is kept a pidfd
                     STARTED | EXEC_FAILED (errno)
                     EXITED   wait status and rusage; whether any other process is left
                     ALONE    none is any more
                     FAILED   errno and stage; PID 1 ends
                     WARMED   what the interpreter said of its start; nothing when it has ended
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Self

from sandboxd import errors
from sandboxd.kernel import descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

__all__ = ["Alone", "Control", "ExecFailed", "Exited", "Gone", "Rlimit", "Setup", "Started"]

VERSION = 1
HEADER = struct.Struct("=IHHI")
SETUP = struct.Struct("=IIIiIII")
RLIMIT = struct.Struct("=QQQ")
EXEC = struct.Struct("=IIQ")
EXITED = struct.Struct("=iIQQQ")
MAX_PAYLOAD = 1 << 16  # of what init sends


class Type(IntEnum):
    """Frame types; the numbers are those of ``init.c``."""

    SETUP = 1
    EXEC = 2
    SIGNAL = 3
    EXEC_WARM = 4
    WARM = 5
    HELLO = 64
    PARKED = 65
    STARTED = 66
    EXEC_FAILED = 67
    EXITED = 68
    FAILED = 69
    WARMED = 70
    ALONE = 71


@dataclass(frozen=True)
class Rlimit:
    """One ``setrlimit(2)``: a constant of ``resource`` and both values."""

    resource: int
    soft: int
    hard: int


@dataclass(frozen=True)
class Setup:
    """What the parked process becomes before it waits. ``bpf`` is a ``struct sock_filter[]``."""

    uid: int
    gid: int
    umask: int
    oom_score_adj: int
    rlimits: tuple[Rlimit, ...]
    bpf: bytes
    keep: bool = False
    """Whether the container serves further commands, and what one leaves running lives on."""

    def pack(self) -> bytes:
        """The payload of SETUP."""
        head = SETUP.pack(
            self.uid,
            self.gid,
            self.umask,
            self.oom_score_adj,
            len(self.rlimits),
            len(self.bpf) // 8,
            self.keep,
        )
        limits = b"".join(RLIMIT.pack(limit.resource, limit.soft, limit.hard) for limit in self.rlimits)
        return head + limits + self.bpf


@dataclass(frozen=True)
class Started:
    """The command is executing."""


@dataclass(frozen=True)
class ExecFailed:
    """``execve`` or what comes right before it failed with this errno."""

    errno: int


@dataclass(frozen=True)
class Exited:
    """How the tool process ended. Times in microseconds, ``max_rss`` in bytes."""

    status: int
    user: int
    system: int
    max_rss: int
    alone: bool
    """Whether PID 1 is all that is left; else it has killed the others and will say ``Alone``."""


@dataclass(frozen=True)
class Alone:
    """Everything that the tool made is dead, and nothing can make more."""


@dataclass(frozen=True)
class Gone:
    """PID 1 ended or failed; ``reason`` is what it said, if it said anything."""

    reason: str


Report = Started | ExecFailed | Exited | Alone | Gone


class Control:
    """One control connection. Owns its socket; ``setup`` blocks, all the rest is for the event loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, which ends the container. Safe to call twice."""
        self._sock.close()

    def fileno(self) -> int:
        """The descriptor, to wait for what PID 1 says."""
        return self._sock.fileno()

    def setup(self, setup: Setup, timeout: float) -> int:
        """Park the tool process; returns the descriptor of its filter's listener.

        Blocks for at most ``timeout`` seconds per step. Raises EngineFailed.
        """
        self._sock.settimeout(timeout)
        try:
            self._expect(Type.HELLO)
        except OSError as error:
            raise errors.EngineFailed(f"PID 1 did not answer: {error}") from error
        listener, *pidfd = self._park(setup, timeout)
        for fd in pidfd:  # there is no other process yet that it could be taken for
            os.close(fd)
        return listener

    def park(self, setup: Setup, timeout: float) -> tuple[int, int]:
        """Park a further process in a container that is kept, when its command has ended.

        Returns the descriptor of its filter's listener, and a pidfd of it. Blocks for at most ``timeout``
        seconds. Raises EngineFailed.
        """
        listener, pidfd = self._park(setup, timeout)
        return listener, pidfd

    def _park(self, setup: Setup, timeout: float) -> list[int]:
        self._sock.settimeout(timeout)
        try:
            self._sock.sendall(self._frame(Type.SETUP, setup.pack()))
            # of a process that was killed before it had its command
            fds = self._expect(Type.PARKED, late=Type.EXEC_FAILED)
        except OSError as error:
            raise errors.EngineFailed(f"PID 1 did not answer: {error}") from error
        if len(fds) != 1 + setup.keep:
            for fd in fds:
                os.close(fd)
            raise errors.EngineFailed("PID 1 parked the tool process without a listener")
        self._sock.setblocking(False)
        return fds

    def warm(self, argv: Sequence[bytes], env: Sequence[bytes], fds: Sequence[int], timeout: float) -> str:
        """Let the parked process become an interpreter; returns what that says of itself, ``""`` if it ended.

        ``fds`` are its stdin, stdout, stderr, and two more for ``runner.py``. The text is the image's
        own, and hostile. Blocks for at most ``timeout`` seconds. Raises EngineFailed.
        """
        self._sock.settimeout(timeout)
        try:
            socket.send_fds(self._sock, [self._command(Type.WARM, argv, env, b"/", 0)], list(fds))
            while (frame := self._parse()) is None:
                if not (data := self._sock.recv(4096)):
                    raise errors.EngineFailed("PID 1 ended while the interpreter started")
                self._buffer += data
        except TimeoutError:
            raise errors.EngineFailed(f"the interpreter is not ready after {timeout:g} s") from None
        except OSError as error:
            raise errors.EngineFailed(f"PID 1 does not take the interpreter: {error}") from error
        self._sock.setblocking(False)
        kind, payload = frame
        return payload.decode(errors="replace") if kind is Type.WARMED else ""

    async def execute(
        self,
        argv: Sequence[bytes],
        env: Sequence[bytes],
        cwd: bytes,
        deadline: int,
        stdio: Sequence[int],
        *,
        warm: bool = False,
    ) -> None:
        """Hand over the command; PID 1 ends by itself ``deadline`` microseconds from now.

        ``warm``: the interpreter that waits may run it itself; else it executes it like anything else.
        """
        frame = self._command(Type.EXEC_WARM if warm else Type.EXEC, argv, env, cwd, deadline)
        try:
            sent = socket.send_fds(self._sock, [frame], list(stdio))
            if sent < len(frame):
                await asyncio.get_running_loop().sock_sendall(self._sock, frame[sent:])
        except OSError as error:
            raise errors.EngineFailed(f"PID 1 does not take the command: {error}") from error

    async def signal(self, number: int) -> None:
        """Send a signal to the tool's process group; nothing happens when it has ended."""
        try:
            await asyncio.get_running_loop().sock_sendall(
                self._sock, self._frame(Type.SIGNAL, struct.pack("=i", number))
            )
        except OSError:
            return

    @contextmanager
    def heard(self, told: Callable[[Report], None]) -> Iterator[None]:
        """Call ``told``, from the event loop, with what PID 1 says within the block; at its end ``Gone``."""
        loop = asyncio.get_running_loop()

        def hear() -> None:
            try:
                data = self._sock.recv(4096)
                self._buffer += data
                while (frame := self._parse()) is not None:
                    told(self._decode(*frame))
            except BlockingIOError:
                return
            except (OSError, errors.EngineFailed) as error:
                data = b""
                told(Gone(str(error)))
            else:
                if not data:
                    told(Gone("PID 1 ended"))
            if not data:
                loop.remove_reader(self._sock)

        loop.add_reader(self._sock, hear)
        try:
            yield
        finally:
            loop.remove_reader(self._sock)

    @classmethod
    def _command(
        cls, kind: Type, argv: Sequence[bytes], env: Sequence[bytes], cwd: bytes, deadline: int
    ) -> bytes:
        strings = b"\0".join([cwd, *argv, *env, b""])
        return cls._frame(kind, EXEC.pack(len(argv), len(env), deadline) + strings)

    @staticmethod
    def _frame(kind: Type, payload: bytes) -> bytes:
        return HEADER.pack(len(payload), kind, VERSION, 0) + payload

    def _parse(self) -> tuple[Type, bytes] | None:
        if len(self._buffer) < HEADER.size:
            return None
        length, kind, version, _ = HEADER.unpack_from(self._buffer)
        if version != VERSION or length > MAX_PAYLOAD:
            raise errors.EngineFailed(f"PID 1 speaks version {version} of the control protocol")
        if len(self._buffer) < HEADER.size + length:
            return None
        payload = bytes(self._buffer[HEADER.size : HEADER.size + length])
        del self._buffer[: HEADER.size + length]
        return Type(kind), payload

    def _expect(self, wanted: Type, *, late: Type | None = None) -> list[int]:
        """The descriptors of a frame; one that is ``late`` is of what came before. Raises EngineFailed."""
        fds: list[int] = []
        try:
            while (frame := self._parse()) is None or frame[0] is late:
                if frame is not None:
                    continue
                data, received, _ = descriptors.receive(self._sock, 4096, 3)
                fds += received
                if not data:
                    raise errors.EngineFailed("PID 1 ended before the tool process was parked")
                self._buffer += data
            kind, payload = frame
            if kind is not wanted:
                report = self._decode(kind, payload)
                raise errors.EngineFailed(f"PID 1: {report.reason if isinstance(report, Gone) else report}")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    @staticmethod
    def _decode(kind: Type, payload: bytes) -> Report:
        match kind:
            case Type.STARTED:
                return Started()
            case Type.EXEC_FAILED:
                return ExecFailed(struct.unpack("=i", payload)[0])
            case Type.EXITED:
                status, alone, user, system, max_rss = EXITED.unpack(payload)
                return Exited(status, user, system, max_rss * 1024, bool(alone))
            case Type.ALONE:
                return Alone()
            case Type.FAILED:
                number, _, stage = payload.decode(errors="replace").partition(" ")
                return Gone(f"{stage}: {os.strerror(int(number))}")
            case _:
                raise errors.EngineFailed(f"PID 1 sent an unexpected frame of type {kind}")
