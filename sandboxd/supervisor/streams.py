"""The pipes between a tool and its spool.

Output is read as fast as the tool makes it and goes to disk up to its cap, so no reader ever holds up
the tool or grows the daemon. A tool that goes on writing in small pieces has them gathered in the pipe for
a moment, since a piece costs the same whatever its size. What comes on both streams while the daemon does
something else is read in the order of its coming, as far as one can know: by the first byte that each
stream had to read. Input is pulled: a chunk is taken from the caller
only when the pipe has room. The pipes belong to the tool's host uid, or it could not reopen
``/dev/stdout``.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import select
import termios
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import anyio

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OutputPipe", "Stdin"]

CHUNK = 256 * 1024
PIPE_SIZE = 1024 * 1024
AT_ONCE = 64  # reads of a stream that are done as soon as something is there
ENOUGH = 64 * 1024  # bytes of a read after which the next one need not wait
GATHER = 0.001  # seconds that the pipe has to fill after a smaller one


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


class _Watch:
    """The output pipes of an event loop; tells each that has something to read, the longest ready first.

    The loop's own poll is level-triggered: it names a stream that was read a moment ago before one that
    had its output earlier. This one tells of edges, so a pipe has to be read until it is empty.
    """

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(CHUNK))
        """What every pipe is read into: a buffer for each read would cost more than the read."""
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[bool], None]] = {}

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Watch:
        """The one of this loop, which ends with it."""
        watch = cls._of.get(loop)
        if watch is None:
            watch = cls._of[loop] = cls()
            loop.add_reader(watch._epoll.fileno(), watch._tell)
        return watch

    def add(self, fd: int, told: Callable[[bool], None]) -> None:
        """Call ``told`` when something comes; with True when nothing can come after it."""
        self._told[fd] = told
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def remove(self, fd: int) -> None:
        """Forget it, before it is closed."""
        del self._told[fd]
        self._epoll.unregister(fd)

    def _tell(self) -> None:
        for fd, event in self._epoll.poll(0):
            if (told := self._told.get(fd)) is not None:
                told(event & ~select.EPOLLIN != 0)


class OutputPipe:
    """One of stdout and stderr: ``inner`` goes to the tool, what it writes goes to ``sink``."""

    def __init__(self, uid: int, gid: int, sink: Callable[[memoryview], None]) -> None:
        """``sink`` gets chunks of at most 256 KiB, from the event loop, which are gone when it returns."""
        self._read, self.inner = _pipe(uid, gid)
        os.set_blocking(self._read, False)
        self._sink = sink
        self._done = anyio.Event()
        self._at_once = AT_ONCE
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._ended = False
        self._watch = _Watch.of(self._loop)
        self._watch.add(self._read, self._ready)

    def handed_over(self) -> None:
        """Close our copy of the tool's end, so that its death ends the stream."""
        if self.inner >= 0:
            os.close(self.inner)
            self.inner = -1

    def _ready(self, ended: bool) -> None:  # noqa: FBT001  (by a watch's call)
        self._ended |= ended
        if self._timer is None:
            self._take()

    def _take(self) -> None:
        size = self._pass_on(CHUNK) if self._read >= 0 else 0
        if not size:
            return
        self._at_once -= 1
        if self._ended or size == CHUNK:
            self._loop.call_soon(self._take)
        elif self._at_once < 0 and size < ENOUGH:
            self._timer = self._loop.call_later(GATHER, self._resume)

    def _resume(self) -> None:
        self._timer = None
        self._take()

    def leave(self) -> int | None:
        """Read what has been written by now, and no more: others than the command may go on writing.

        Returns the descriptor, the caller's to close, from which their words can be read on; None where
        there is nobody.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pending()
        if self._read < 0:
            return None
        self._watch.remove(self._read)
        pipe, self._read = self._read, -1
        self.handed_over()
        self._done.set()
        return pipe

    def _pending(self) -> None:
        waiting = array.array("i", [0])
        fcntl.ioctl(self._read, termios.FIONREAD, waiting) if self._read >= 0 else None
        left = waiting[0]
        while self._read >= 0:
            size = self._pass_on(min(left, CHUNK) or 1)
            left -= size
            if not size or left <= 0:
                return

    def _pass_on(self, most: int) -> int:
        """Read once; how many bytes came. None do at the end, of which it takes note, or if none is there."""
        try:
            size = os.readv(self._read, [self._watch.buffer[:most]])
        except BlockingIOError:
            return 0
        if size:
            self._sink(self._watch.buffer[:size])
        else:
            self.close()
        return size

    async def finished(self) -> None:
        """Wait until every writer is dead and everything was read."""
        await self._done.wait()

    def close(self) -> None:
        """Stop reading. Safe to call twice."""
        self.handed_over()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._read >= 0:
            self._watch.remove(self._read)
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
