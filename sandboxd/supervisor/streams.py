"""The pipes between a tool and its spool.

Output is read as fast as the tool makes it and goes to disk up to its cap, so no reader ever holds up
the tool or grows the daemon. Input is pulled: a chunk is taken from the caller only when the pipe has
room. The pipes belong to the tool's host uid, or it could not reopen ``/dev/stdout``.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from typing import TYPE_CHECKING

import anyio

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OutputPipe", "Stdin"]

CHUNK = 256 * 1024
PIPE_SIZE = 1024 * 1024


def _pipe(uid: int, gid: int) -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        for fd in (read, write):
            os.fchown(fd, uid, gid)
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        os.close(read)
        os.close(write)
        raise
    return read, write


class OutputPipe:
    """One of stdout and stderr: ``inner`` goes to the tool, what it writes goes to ``sink``."""

    def __init__(self, uid: int, gid: int, sink: Callable[[bytes], None]) -> None:
        """``sink`` gets chunks of at most 256 KiB, from the event loop."""
        self._read, self.inner = _pipe(uid, gid)
        os.set_blocking(self._read, False)
        self._sink = sink
        self._done = anyio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read, self._ready)

    def handed_over(self) -> None:
        """Close our copy of the tool's end, so that its death ends the stream."""
        if self.inner >= 0:
            os.close(self.inner)
            self.inner = -1

    def _ready(self) -> None:
        try:
            data = os.read(self._read, CHUNK)
        except BlockingIOError:
            return
        if data:
            self._sink(data)
        else:
            self.close()

    async def finished(self) -> None:
        """Wait until every writer is dead and everything was read."""
        await self._done.wait()

    def close(self) -> None:
        """Stop reading. Safe to call twice."""
        self.handed_over()
        if self._read >= 0:
            self._loop.remove_reader(self._read)
            os.close(self._read)
            self._read = -1
        self._done.set()


class Stdin:
    """The caller's end of the tool's standard input. Offsets count bytes from the start of the stream."""

    def __init__(self) -> None:
        self._opened = anyio.Event()
        self._lock = anyio.Lock()
        self._write = -1
        self._closed = False
        self.offset = 0

    def open(self, uid: int, gid: int) -> int:
        """Make the pipe; returns the tool's end, which the caller closes after the hand-over."""
        read, self._write = _pipe(uid, gid)
        os.set_blocking(self._write, False)
        self._opened.set()
        return read

    async def write(self, offset: int, data: bytes) -> int:
        """Write a chunk whose first byte is at ``offset``; returns the offset after it.

        Bytes that were written before are skipped, so a chunk can be sent again. Waits while the pipe is
        full. Raises StateConflict for a gap, or after the end; a tool that closed its stdin takes
        everything, as ``/dev/null`` would.
        """
        await self._opened.wait()
        async with self._lock:
            if offset > self.offset:
                raise errors.StateConflict(
                    f"stdin is at offset {self.offset}, not {offset}; send from there", offset=self.offset
                )
            view = memoryview(data)[self.offset - offset :]
            if view and self._closed:
                raise errors.StateConflict("stdin was closed before", offset=self.offset)
            while view:
                view = view[await self._some(view) :]
            return self.offset

    async def _some(self, view: memoryview) -> int:
        taken = len(view)
        if self._write >= 0:
            try:
                taken = os.write(self._write, view)
            except BlockingIOError:
                try:
                    await anyio.wait_writable(self._write)
                except anyio.ClosedResourceError:  # by ``close``, below
                    raise errors.StateConflict("the call has ended", offset=self.offset) from None
                return 0
            except BrokenPipeError:
                self._close_pipe()
        self.offset += taken
        return taken

    async def finish(self) -> None:
        """End of input. Safe to call twice."""
        await self._opened.wait()
        async with self._lock:
            self._closed = True
            self._close_pipe()

    def close(self) -> None:
        """The call is over: whoever still writes is told so by a broken pipe, or at once."""
        self._closed = True
        if self._write >= 0:
            anyio.notify_closing(self._write)
        self._close_pipe()
        self._opened.set()

    def _close_pipe(self) -> None:
        if self._write >= 0:
            os.close(self._write)
            self._write = -1
