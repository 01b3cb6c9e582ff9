"""Answering denied system calls: seccomp user notifications (seccomp_unotify(2)), free of policy.

Theory of operation. A filter that says ``NOTIFY`` parks the calling thread in the kernel and posts
the call on the filter's listener. One thread (not the event loop: a reply takes microseconds, but a
tool can ask for a great many) waits on the listeners of all slots with epoll, takes one notification
per ready listener and turn, counts it, and answers with an errno. It never lets a call continue, and
never reads the caller's memory, so there is nothing to race for.

A tool that calls in a loop stalls only itself: a listener that has spent its tokens is taken out of
epoll until the next one is due, its callers waiting, killable, in the kernel; one bucket over all
listeners bounds what the whole machine's tools can take of the daemon's interpreter.

Memory is bounded: calls are counted per (architecture, number), at most ``MAX_DISTINCT`` of them, the
rest lumped together. A listener whose last task is gone hangs up and leaves epoll by itself; its
owner closes it. Closing a listener with tasks alive makes the kernel answer ENOSYS: closed, not open.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import heapq
import itertools
import logging
import os
import platform
import select
import struct
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from sandboxd.errors import HostUnsupported

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["LUMPED", "MAX_DISTINCT", "DeniedCall", "Listener", "NotifyServer", "notif_sizes"]

NOTIF_RECV = 0xC0502100  # linux/seccomp.h; the sizes in these numbers are those of Linux 5.0
NOTIF_SEND = 0xC0182101
NOTIF = struct.Struct("<QIIiIQ6Q")  # id, pid, flags, then struct seccomp_data: nr, arch, ip, args
RESPONSE = struct.Struct("<QqiI")  # id, val, error, flags
SECCOMP_GET_NOTIF_SIZES = 3
SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}

MAX_DISTINCT = 1024
LUMPED = (0, -1)
"""The (architecture, number) under which calls beyond ``MAX_DISTINCT`` are counted together."""
LISTENER_BURST, LISTENER_RATE = 200, 500
SERVER_BURST, SERVER_RATE = 1000, 4000
EVENTS = select.EPOLLIN

log = logging.getLogger("sandboxd.kernel.notify")


@dataclass(frozen=True)
class DeniedCall:
    """Denied calls of one (architecture, number): ``args`` are those of the first, ``errno`` its answer.

    ``arch`` is an AUDIT_ARCH value. Both are those of ``LUMPED`` for what was too much to tell apart.
    """

    arch: int
    nr: int
    args: tuple[int, ...]
    errno: int
    count: int = 1


class Bucket:
    """Tokens by the clock: ``burst`` at once, ``rate`` a second after that."""

    def __init__(self, burst: int, rate: int) -> None:
        self._burst, self._rate = burst, rate
        self._tokens, self._at = float(burst), time.monotonic()

    def take(self) -> float:
        """Take one token; the seconds until there is the next one, 0.0 if there is one now."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - 1
        self._at = now
        return 0.0 if self._tokens >= 1 else (1 - self._tokens) / self._rate


class Listener:
    """One filter's listener, served until it is closed. ``NotifyServer.add`` makes it; any thread uses it."""

    def __init__(
        self,
        server: NotifyServer,
        fd: int,
        answer: Callable[[int, int], int],
        on_denied: Callable[[DeniedCall], None] | None,
    ) -> None:
        self.fd = fd
        """-1 once closed."""
        self.bucket = Bucket(LISTENER_BURST, LISTENER_RATE)
        self._server = server
        self._answer = answer
        self._on_denied = on_denied
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._calls: dict[tuple[int, int], DeniedCall] = {}

    def poll(self) -> int:
        """The events that wait on the descriptor; called by the server alone, under its lock."""
        return next((events for _, events in self._poll.poll(0)), 0)

    def counts(self) -> list[DeniedCall]:
        """What was denied so far, by first occurrence. Stays available after ``close``.

        A call is counted before its caller is answered, so when a process has ended, all that it
        was denied is here.
        """
        with self._lock:
            return list(self._calls.values())

    def reset(self) -> None:
        """Forget what was denied so far."""
        with self._lock:
            self._calls.clear()

    def another(self, fd: int) -> Listener:
        """Serve a further listener as this one is. Raises as ``NotifyServer.add``."""
        return self._server.add(fd, answer=self._answer, on_denied=self._on_denied)

    def close(self) -> None:
        """Stop serving and close the descriptor; safe to call twice. Calls still parked get ENOSYS."""
        self._server.forget(self)

    def count(self, arch: int, nr: int, args: tuple[int, ...]) -> DeniedCall:
        """Decide on a call and count it; called by the server alone."""
        try:
            error = self._answer(arch, nr)
        except Exception:  # the tool's thread waits in the kernel: whatever the fault, it is answered
            log.exception("no answer for system call %d of architecture %#x", nr, arch)
            error = errno.EPERM
        if not 0 < error < 4096:  # MAX_ERRNO; 0 would be success
            error = errno.EPERM
        with self._lock:
            key = (arch, nr)
            if key not in self._calls and len(self._calls) >= MAX_DISTINCT:
                key = LUMPED
            known = self._calls.get(key)
            if known is None:
                self._calls[key] = DeniedCall(*key, args if key != LUMPED else (), error)
            else:
                self._calls[key] = replace(known, count=known.count + 1)
        return DeniedCall(arch, nr, args, error)

    def report(self, call: DeniedCall) -> None:
        """Tell the owner; called by the server alone, on its thread."""
        if self._on_denied is None:
            return
        try:
            self._on_denied(call)
        except Exception:  # an owner's fault must not end the service of every other slot
            log.exception("the owner of a listener failed on a denied call")


def notif_sizes() -> tuple[int, int]:
    """The kernel's sizes of a notification and of a response, in bytes (seccomp(2)).

    Raises HostUnsupported where there are no notifications (before Linux 5.0, or filtered away).
    """
    sizes = (ctypes.c_uint16 * 3)()
    libc = ctypes.CDLL(None, use_errno=True)
    number = SYS_SECCOMP.get(platform.machine())
    if number is None or libc.syscall(number, SECCOMP_GET_NOTIF_SIZES, 0, ctypes.byref(sizes)) != 0:
        reason = os.strerror(ctypes.get_errno()) if number else "an architecture without a filter"
        raise HostUnsupported(f"seccomp user notifications are not available: {reason}", control="seccomp")
    return int(sizes[0]), int(sizes[1])


class NotifyServer:
    """Serves the listeners of all slots on one thread. A context manager; ``close`` is safe twice.

    Callbacks run on that thread: they must be quick, and hand over to an event loop by
    ``call_soon_threadsafe``.
    """

    def __init__(self) -> None:
        """Raises HostUnsupported, see ``notif_sizes``; OSError when out of descriptors."""
        request, response = notif_sizes()
        self._request_size = max(request, NOTIF.size)
        self._response_size = max(response, RESPONSE.size)
        self._lock = threading.Lock()  # held for each use of a descriptor, so none is closed meanwhile
        self._listeners: dict[int, Listener] = {}
        self._resting: list[tuple[float, int, Listener]] = []
        self._turn = itertools.count()
        self._bucket = Bucket(SERVER_BURST, SERVER_RATE)
        self._closed = False
        self._failed = False
        self._epoll = select.epoll()
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._epoll.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="seccomp-notify", daemon=True)
        try:
            self._epoll.register(self._wake, select.EPOLLIN)
            self._thread.start()
        except (OSError, RuntimeError):  # RuntimeError: no more threads
            self._epoll.close()
            os.close(self._wake)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(
        self,
        fd: int,
        *,
        answer: Callable[[int, int], int],
        on_denied: Callable[[DeniedCall], None] | None = None,
    ) -> Listener:
        """Serve a listener; its descriptor belongs to the ``Listener`` from now on, also on an error.

        ``answer(arch, nr)`` gives the errno, 1 to 4095; anything else becomes EPERM. ``on_denied`` is
        told of each call after it was answered, with a count of 1. Raises OSError for what is no
        pollable descriptor, RuntimeError on a server that was closed or failed.
        """
        with self._lock:
            if self._closed or self._failed:
                os.close(fd)
                raise RuntimeError("the server of notifications has ended")
            try:
                self._epoll.register(fd, EVENTS)
            except OSError:
                os.close(fd)
                raise
            listener = self._listeners[fd] = Listener(self, fd, answer, on_denied)
        return listener

    def forget(self, listener: Listener) -> None:
        """What ``Listener.close`` does."""
        with self._lock:
            if listener.fd < 0:
                return
            self._leave_epoll(listener)
            del self._listeners[listener.fd]
            os.close(listener.fd)
            listener.fd = -1

    def close(self) -> None:
        """End the thread and close every listener."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._close_listeners()
        self._epoll.close()
        os.close(self._wake)

    def _close_listeners(self) -> None:
        with self._lock:
            left = list(self._listeners.values())
        for listener in left:
            listener.close()

    def _leave_epoll(self, listener: Listener) -> None:
        try:
            self._epoll.unregister(listener.fd)
        except FileNotFoundError:  # it rests, or has hung up
            return

    def _serve(self) -> None:
        try:
            self._loop()
        except Exception:  # whatever it was, no tool may hang for it: closed, the kernel refuses its calls
            log.exception("the server of notifications failed; every denied call is now ENOSYS, uncounted")
            with self._lock:
                self._failed = True
            self._close_listeners()

    def _loop(self) -> None:
        while not self._closed:
            timeout = -1.0
            if self._resting:
                timeout = max(0.0, self._resting[0][0] - time.monotonic())
            for fd, _ in self._epoll.poll(timeout, 64):
                if fd == self._wake:
                    break
                self._turn_of(fd)
            self._resume()

    def _resume(self) -> None:
        now = time.monotonic()
        while self._resting and self._resting[0][0] <= now:
            _, _, listener = heapq.heappop(self._resting)
            with self._lock:
                if listener.fd >= 0:
                    self._epoll.register(listener.fd, EVENTS)

    def _turn_of(self, fd: int) -> None:
        with self._lock:
            listener = self._listeners.get(fd)
            if listener is None:  # closed since epoll returned
                return
            # Asked again: what epoll said may have been of an earlier listener with this number.
            events = listener.poll()
            call = self._handle(listener) if events & select.POLLIN else None
            if not events & select.POLLIN and events & (select.POLLHUP | select.POLLERR):
                self._leave_epoll(listener)
                return
            rest = listener.bucket.take() if call is not None else 0.0
            if rest and listener.fd >= 0:
                self._leave_epoll(listener)
                heapq.heappush(self._resting, (time.monotonic() + rest, next(self._turn), listener))
        if call is not None:
            listener.report(call)
            pause = self._bucket.take()
            if pause:
                time.sleep(pause)

    def _handle(self, listener: Listener) -> DeniedCall | None:
        # Readable means that a notification waits; only this thread takes them, and one whose sender
        # was killed meanwhile gives ENOENT, so receiving cannot block.
        request = bytearray(self._request_size)  # the kernel wants it zeroed
        try:
            fcntl.ioctl(listener.fd, NOTIF_RECV, request)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.EINTR}:  # ENOENT: killed before we came
                log.warning("cannot receive a notification: %s", error)
                self._leave_epoll(listener)
            return None
        cookie, _pid, _flags, nr, arch, _ip, *args = NOTIF.unpack_from(request)
        call = listener.count(arch, nr, tuple(args))
        response = bytearray(self._response_size)
        RESPONSE.pack_into(response, 0, cookie, 0, -call.errno, 0)
        try:
            fcntl.ioctl(listener.fd, NOTIF_SEND, response)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.EINPROGRESS}:  # ENOENT: killed meanwhile
                log.warning("cannot answer a notification: %s", error)
        return call
