"""The daemon's end: an ``Engine`` whose slots another process makes."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.engine.base import Capabilities, Lacks
from sandboxd.engine.host import images_of
from sandboxd.engine.killing import kill
from sandboxd.kernel.notify import NotifyServer
from sandboxd.maker.channel import MAX_SHAPES, Channel, raised
from sandboxd.maker.server import be_the_engine
from sandboxd.maker.transfer import unpack

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from sandboxd.config import Config
    from sandboxd.engine.base import Slot
    from sandboxd.images import ImageStore
    from sandboxd.kernel.cgroup import CgroupLimits
    from sandboxd.plan import Shape

__all__ = ["EngineProcess"]

STOP_SECONDS = 60.0  # until an engine that has been told to end is killed

log = structlog.get_logger("sandboxd.engine")


class EngineProcess:
    """The daemon's end: an ``Engine``, usable within ``async with``. ``fork`` makes one."""

    def __init__(self, config: Config, pid: int, channel: Channel) -> None:
        self._config = config
        self._pidfd = os.pidfd_open(pid)
        self._channel = channel
        self._answers: dict[int, asyncio.Future[tuple[Any, list[int]]]] = {}
        self._shapes: dict[str, bytes] = {}
        self._owned: dict[str, ExitStack] = {}
        self._last = 0
        self._gone = anyio.Event()
        self._stack = ExitStack()
        self._notify: NotifyServer
        self.name = ""
        self.runtime = ""
        self.lacks = Lacks()
        self.images: ImageStore

    @classmethod
    def fork(cls, config: Config, run: Path, name: str) -> Self:
        """Start the process, which waits for ``open``. ``run`` and ``name``: of ``enter_private_mounts``.

        Must be called before the process has another thread or an event loop. Raises OSError.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            be_the_engine(parent, Channel(theirs), config, run, name)
        theirs.close()
        return cls(config, pid, Channel(ours))

    async def open(self, authority: tuple[str, str]) -> list[str]:
        """Find the engine that serves; returns the containers of an earlier daemon that were removed.

        ``authority`` is the certificate (PEM) that containers trust, and its digest.
        Raises HostUnsupported, ConfigInvalid.
        """
        asyncio.get_running_loop().add_reader(self._channel, self._hear)
        (self.name, self.runtime, self.lacks, removed), _ = await self._ask("open", authority)
        self.images = images_of(self._config, self.name)
        self._notify = self._stack.enter_context(NotifyServer())
        return list(removed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        asyncio.get_running_loop().remove_reader(self._channel)
        self._channel.close()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(STOP_SECONDS) as scope:
                await anyio.wait_readable(self._pidfd)
            if scope.cancelled_caught:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await anyio.to_thread.run_sync(os.waitid, os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)

    async def watch(self) -> None:
        """Raise EngineFailed once the process has ended, whatever ended it."""
        await self._gone.wait()
        raise errors.EngineFailed("the engine's process has ended, and the daemon can do nothing without it")

    async def probe(self) -> Capabilities:
        """What the engine says."""
        found, _ = await self._ask("probe")
        assert isinstance(found, Capabilities)  # noqa: S101
        return found

    async def create(self, shape: Shape, *, warm: bool = True) -> Slot:
        """A container of this shape, read in full. Raises EngineFailed, HostFailed, ControlNotEnforced."""
        with ExitStack() as stack:
            held = stack.enter_context(ExitStack())
            held.enter_context(self.images.hold(shape.image.digest))
            number, answer = await self._begin("create", self._pickled(shape), warm)
            try:
                (slot_id, data), fds = await asyncio.shield(answer)
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True), suppress(errors.SandboxdError, OSError):
                    await self._channel.send((None, "cancel", (number,)))
                    (slot_id, data), fds = await answer
                    await self.destroy(await self._taken(shape, slot_id, data, fds))
                raise
            slot = await self._taken(shape, slot_id, data, fds)
            slot.held = held
            self._owned[slot.id].callback(held.close)
            stack.pop_all()
        return slot

    async def confine(self, name: str, pid: int, limits: CgroupLimits) -> None:
        """Put a process into a cgroup of its own. Raises HostFailed, ControlNotEnforced, EngineFailed."""
        await self._ask("confine", name, pid, limits)

    async def release(self, name: str) -> None:
        """Take that cgroup away, with whatever is in it. Raises HostFailed, EngineFailed."""
        await self._ask("release", name)

    async def kill(self, slot: Slot) -> None:
        """End every process of the slot; its files stay readable until ``destroy``."""
        await kill(slot)

    async def destroy(self, slot: Slot) -> None:
        """Kill, reap, clean. Safe to call twice."""
        owned = self._owned.pop(slot.id, None)
        if owned is None:
            return
        with anyio.CancelScope(shield=True):
            try:
                await self._ask("destroy", slot.id)
            finally:
                owned.close()

    def _pickled(self, shape: Shape) -> bytes:
        """A shape, which is the same in thousands of requests, as the engine's process remembers it."""
        if (found := self._shapes.get(shape.digest)) is None:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            found = self._shapes[shape.digest] = pickle.dumps(shape, pickle.HIGHEST_PROTOCOL)
        return found

    async def _taken(self, shape: Shape, slot_id: str, data: bytes, fds: list[int]) -> Slot:
        try:
            slot = unpack(data, fds, shape, self._notify)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._ask("destroy", slot_id)
            raise
        owned = self._owned[slot.id] = ExitStack()
        for fd in (slot.init_pidfd, slot.workspace_fd, slot.upper_fd, slot.secrets_fd):
            if fd is not None:
                owned.callback(os.close, fd)
        for part in (slot.control, slot.listener, slot.cgroup, slot.reading, slot.doors):
            if part is not None:
                owned.callback(part.close)
        return slot

    async def _ask(self, what: str, *arguments: object) -> tuple[Any, list[int]]:
        _, answer = await self._begin(what, *arguments)
        return await answer

    async def _begin(
        self, what: str, *arguments: object
    ) -> tuple[int, asyncio.Future[tuple[Any, list[int]]]]:
        if self._gone.is_set():
            raise errors.EngineFailed("the engine's process has ended")
        self._last += 1
        number, answer = self._last, asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            await self._channel.send((number, what, arguments))
        except BaseException as error:
            self._answers.pop(number, None)  # the end of the stream may have been heard meanwhile
            if isinstance(error, OSError):
                raise errors.EngineFailed(f"the engine's process takes no request: {error}") from error
            raise
        return number, answer

    def _hear(self) -> None:
        try:
            while (received := self._channel.receive()) is not None:
                (number, ok, content), fds = received
                answer = self._answers.pop(number)
                if answer.done():  # cancelled: who asked is gone
                    continue
                if ok:
                    answer.set_result((content, fds))
                else:
                    answer.set_exception(raised(*content))
        except BlockingIOError:
            return
        except OSError:
            log.exception("the engine's process is not understood")
        asyncio.get_running_loop().remove_reader(self._channel)
        self._gone.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(errors.EngineFailed("the engine's process has ended"))
        self._answers.clear()
