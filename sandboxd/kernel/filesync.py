"""fdatasync(2) for an event loop that has something else to do meanwhile.

Theory of operation.  The kernel syncs on a thread of its own (io_submit(2), ``IOCB_CMD_FDSYNC``, since Linux
4.18) and says so on an eventfd. A thread of ours would do, but to begin and to end it needs the interpreter's
lock, for which it waits a millisecond while the event loop is at work: more than the disk takes. It is what
is left where the kernel refuses. One sync serves all who asked before it began.

A sync that failed says nothing of what was written, and the next one says nothing of it either: the kernel
takes the pages for clean, and tells an error once. So all fail from then on, until ``written_again``.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import struct
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["FileSync"]

# io_setup, io_destroy, io_getevents, io_submit: arch/x86/entry/syscalls/syscall_64.tbl, asm-generic/unistd.h
NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
IOCB = struct.Struct("=QIIHhIQQqQII")  # linux/aio_abi.h
EVENT = struct.Struct("=QQqq")
IOCB_CMD_FDSYNC, IOCB_FLAG_RESFD = 3, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class _Kernel:
    """The kernel's queue of one request. Raises OSError where it has none for us."""

    def __init__(self, fd: int) -> None:
        try:
            self._setup, self._destroy, self._getevents, self._submit = NUMBERS[platform.machine()]
        except KeyError:
            raise OSError(f"no numbers of system calls for {platform.machine()}") from None
        self._context = ctypes.c_ulong(0)
        _call(self._setup, ctypes.c_long(1), ctypes.byref(self._context))
        self.event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        request = IOCB.pack(0, 0, 0, IOCB_CMD_FDSYNC, 0, fd, 0, 0, 0, 0, IOCB_FLAG_RESFD, self.event)
        self._request = ctypes.create_string_buffer(request, IOCB.size)
        self._pointer = ctypes.c_void_p(ctypes.addressof(self._request))
        self._done = ctypes.create_string_buffer(EVENT.size)

    def begin(self) -> None:
        """Start a sync. Raises OSError."""
        _call(self._submit, self._context, ctypes.c_long(1), ctypes.byref(self._pointer))

    def result(self) -> int:
        """0 or an errno, once the eventfd is readable."""
        os.eventfd_read(self.event)
        none = ctypes.c_void_p(None)
        _call(self._getevents, self._context, ctypes.c_long(1), ctypes.c_long(1), self._done, none)
        return -int(EVENT.unpack(self._done.raw)[2])

    def close(self) -> None:
        """Wait for a sync that has begun, and let go."""
        _call(self._destroy, self._context)
        os.close(self.event)


class FileSync:
    """Syncs one file, which must stay open until ``close``. For one event loop; a context manager in it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._waiting: list[asyncio.Future[None]] = []
        self._served: list[asyncio.Future[None]] = []
        self._kernel: _Kernel | None = None
        self._failed: OSError | None = None
        try:
            self._kernel = _Kernel(fd)
        except OSError:
            return
        self._loop.add_reader(self._kernel.event, self._told)

    async def synced(self) -> None:
        """Return when all that was written before is on disk. Raises OSError."""
        if self._failed is not None:
            raise OSError(self._failed.errno, self._failed.strerror)
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(future)
        if not self._served:
            self._begin()
        await future

    def _begin(self) -> None:
        self._served, self._waiting = self._waiting, []
        if self._kernel is not None:
            try:
                self._kernel.begin()
            except OSError:  # EAGAIN; it may serve the next time
                pass
            else:
                return
        thread = self._loop.run_in_executor(None, os.fdatasync, self._fd)
        thread.add_done_callback(lambda done: self._end(done.exception()))

    def _told(self) -> None:
        assert self._kernel is not None  # noqa: S101  (its eventfd has told us)
        number = self._kernel.result()
        self._end(OSError(number, os.strerror(number)) if number else None)

    def _end(self, error: BaseException | None) -> None:
        served, self._served = self._served, []
        if isinstance(error, OSError):
            self._failed = error
            served += self._waiting
            self._waiting = []
        if self._waiting:
            self._begin()
        for future in served:
            if future.done():
                continue  # cancelled
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def written_again(self) -> None:
        """All that was written before the failure was written once more, and synced."""
        self._failed = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the kernel's queue, after the sync that has begun."""
        if self._kernel is not None:
            self._loop.remove_reader(self._kernel.event)
            self._kernel.close()
            self._kernel = None
