"""Threads for work that lasts as long as a caller likes, apart from those that all else runs in.

Theory of operation.  The close of a socket with SO_LINGER, the last reference to a mount, any look at a
FUSE file: the kernel lets who made them say when they return, and no signal ends some of them. So such
work has threads of its own, few for each uid and not many in all, which the end of the daemon does not
wait for. Whoever fills them waits for himself.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio
import anyio.from_thread
from anyio.lowlevel import current_token

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Lanes"]

T = TypeVar("T")


class Lanes:
    """For one event loop. ``most`` threads in all and ``each`` of one uid; ``waiting`` wait for them."""

    def __init__(self, name: str, *, most: int, each: int, waiting: int) -> None:
        self._name = name
        self._most = anyio.Semaphore(most)
        self._each = each
        self._waiting = waiting
        self._lanes: dict[int, anyio.Semaphore] = {}
        self._inside: Counter[int] = Counter()

    def inside(self, uid: int) -> int:
        """What of a uid runs or waits."""
        return self._inside[uid]

    async def run(
        self,
        uid: int,
        work: Callable[[], T],
        *,
        stop: Callable[[], None] | None = None,
        undo: Callable[[T], None] | None = None,
        always: bool = False,
    ) -> T:
        """Do it in a thread, and return what it returns. Raises QueueFull, unless ``always``.

        Cancelled, it calls ``stop`` and waits, if there is one; else the thread goes on alone, and ``undo``
        gets what it made. The lane is free when the thread has ended, and not before.
        """
        if not always and self._inside[uid] >= self._each + self._waiting:
            raise errors.QueueFull(
                f"{self._inside[uid]} {self._name} of yours run or wait; try again later", retry_after=1
            )
        self._inside[uid] += 1
        lane = self._lanes.setdefault(uid, anyio.Semaphore(self._each))
        try:
            await lane.acquire()
            try:
                await self._most.acquire()
            except BaseException:
                lane.release()
                raise
        except BaseException:
            self._left(uid)
            raise
        job: _Job[T] = _Job(work, undo)

        def ended() -> None:
            self._most.release()
            lane.release()
            self._left(uid)
            job.done.set()

        token = current_token()

        def run() -> None:
            job.run()
            try:
                anyio.from_thread.run_sync(ended, token=token)
            except (RuntimeError, anyio.RunFinishedError):  # the daemon has ended meanwhile
                return

        threading.Thread(target=run, name=self._name, daemon=True).start()
        try:
            await job.done.wait()
        except BaseException:
            if stop is not None:
                stop()
                with anyio.CancelScope(shield=True):
                    await job.done.wait()
            job.abandon()
            raise
        return job.result()

    def _left(self, uid: int) -> None:
        self._inside[uid] -= 1
        if not self._inside[uid]:
            del self._inside[uid]
            self._lanes.pop(uid, None)


class _Job(Generic[T]):
    """One piece of work: what it made is given to who waits, or undone, by whichever comes last."""

    def __init__(self, work: Callable[[], T], undo: Callable[[T], None] | None) -> None:
        self.done = anyio.Event()
        self._work = work
        self._undo = undo
        self._lock = threading.Lock()
        self._made: list[T] = []
        self._error: BaseException | None = None
        self._is_abandoned = False

    def run(self) -> None:
        """In the thread."""
        try:
            made = self._work()
        except BaseException as error:  # noqa: BLE001  # it is raised where the work was asked for
            self._error = error
            return
        with self._lock:
            if not self._is_abandoned:
                self._made.append(made)
                return
        if self._undo is not None:
            self._undo(made)

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._is_abandoned = True
            made, self._made = self._made, []
        if made and self._undo is not None:
            undo = self._undo
            threading.Thread(target=lambda: undo(made[0]), daemon=True).start()

    def result(self) -> T:
        """What it returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._made[0]
