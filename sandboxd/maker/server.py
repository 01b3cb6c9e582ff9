"""The process of the engine, the daemon's other half: makes slots, reads them in full, clears them away."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.engine.host import EngineHost
from sandboxd.kernel.orphans import adopt_orphans
from sandboxd.maker.channel import MAX_SHAPES, failure
from sandboxd.maker.transfer import pack
from sandboxd.receipt import take_reading

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sandboxd.config import Config
    from sandboxd.engine.base import Engine, Lacks, Slot
    from sandboxd.kernel.cgroup import Cgroup, CgroupLimits
    from sandboxd.kernel.cgroup_tree import CgroupTree
    from sandboxd.maker.channel import Channel
    from sandboxd.plan import Shape

__all__ = ["be_the_engine"]

PR_SET_PDEATHSIG = 1  # prctl(2)
PR_SET_NAME = 15
NAME = b"sandboxd-engine"
WORKER_THREADS = 64

log = structlog.get_logger("sandboxd.engine")


def be_the_engine(parent: int, channel: Channel, config: Config, run: Path, name: str) -> NoReturn:
    """Serve the daemon ``parent`` in a process that was just forked; never returns."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NAME, NAME, 0, 0, 0)
    status = 1
    try:
        if os.getppid() == parent:  # else it ended before it could take us along
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _leave_it_to_the_daemon)
            adopt_orphans()
            anyio.run(Server(channel, config, run, name).serve)
        status = 0
    except BaseException:
        log.exception("the engine's process failed")
    finally:
        os._exit(status)


def _leave_it_to_the_daemon(*_: object) -> None:
    """A handler, and not SIG_IGN, which programs would inherit that are started from here."""


class Server:
    """The engine's end."""

    def __init__(self, channel: Channel, config: Config, run: Path, name: str) -> None:
        self._channel = channel
        self._config = config
        self._run = run
        self._name = name
        self._processes = (0, os.getppid())  # on cgroup v2 both have to leave where containers shall be
        self._host = ExitStack()
        self._engine: Engine
        self._cgroups: CgroupTree
        self._confined: dict[str, Cgroup] = {}
        self._shapes: dict[bytes, Shape] = {}
        self._slots: dict[str, Slot] = {}
        self._making: dict[int, anyio.CancelScope] = {}

    async def serve(self) -> None:
        """Answer until the daemon closes its end; then clear everything away."""
        anyio.to_thread.current_default_thread_limiter().total_tokens = WORKER_THREADS
        with self._host:
            async with anyio.create_task_group() as tasks:
                while True:
                    try:
                        received = self._channel.receive()
                    except BlockingIOError:
                        await anyio.wait_readable(self._channel)
                        continue
                    if received is None:
                        break
                    (number, what, arguments), _ = received
                    if what == "cancel":
                        if (scope := self._making.get(*arguments)) is not None:
                            scope.cancel()
                        continue
                    if what == "create":  # from here on it can be cancelled, also before its task runs
                        self._making[number] = anyio.CancelScope()
                    tasks.start_soon(self._answer, number, what, arguments)
                for scope in self._making.values():
                    scope.cancel()
            for slot in list(self._slots.values()):
                await self._engine.destroy(slot)
            for name in list(self._confined):
                await anyio.to_thread.run_sync(self._release, name)

    async def _answer(self, number: int, what: str, arguments: tuple[Any, ...]) -> None:
        try:
            match what:
                case "create":
                    await self._create(number, *arguments)
                    return
                case "destroy":
                    content: object = None
                    await self._destroy(*arguments)
                case "confine":
                    content = None
                    await anyio.to_thread.run_sync(self._confine, *arguments)
                case "release":
                    content = None
                    await anyio.to_thread.run_sync(self._release, *arguments)
                case "probe":
                    content = await self._engine.probe()
                case "open":
                    content = await self._open(*arguments)
                case _:
                    raise errors.EngineFailed(f"an unknown request {what!r}")
        except Exception as error:  # noqa: BLE001  (whatever it is, the daemon is told)
            await self._say(number, failure(error), ok=False)
        else:
            await self._say(number, content)

    async def _say(self, number: int, content: object, fds: Sequence[int] = (), *, ok: bool = True) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the end of the stream says it
            await self._channel.send((number, ok, content), fds)

    async def _open(self, authority: tuple[str, str]) -> tuple[str, str, Lacks, list[str]]:
        host = self._host.enter_context(
            EngineHost(self._config, self._run, self._name, self._processes, authority)
        )
        self._cgroups = host.cgroups
        removed = host.clean_leftovers()
        engine = self._engine = await host.open_engine()
        gc.collect()
        gc.freeze()
        return engine.name, engine.runtime.name, engine.lacks, removed

    async def _create(self, number: int, pickled: bytes, warm: bool) -> None:  # noqa: FBT001  (a message)
        scope = self._making[number]
        try:
            with scope:
                await self._hand_over(number, await self._engine.create(self._shape(pickled), warm=warm))
        finally:
            del self._making[number]
        if scope.cancelled_caught:
            raise errors.EngineFailed("nobody wants this container any more")

    def _shape(self, pickled: bytes) -> Shape:
        if (shape := self._shapes.get(pickled)) is None:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            shape = self._shapes[pickled] = pickle.loads(pickled)  # noqa: S301  (of our own process)
        return shape

    async def _hand_over(self, number: int, slot: Slot) -> None:
        try:
            if slot.warm:  # the process may be anybody's, and take long to be read
                reading = slot.reading = await anyio.to_thread.run_sync(take_reading, slot)
            else:
                reading = slot.reading = take_reading(slot)
            listener = os.dup(slot.listener.fd)
            try:
                slot.listener.close()  # two that serve it would wait for one notification, and one for ever
                data, fds = pack(slot, listener)
                await self._channel.send((number, True, (slot.id, data)), fds)
            finally:
                os.close(listener)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._engine.destroy(slot)
            raise
        self._slots[slot.id] = slot
        # the daemon has these now; what is left here is what it takes to clear the slot away
        slot.control.close()
        if slot.doors is not None:
            slot.doors.close()
        reading.close()
        slot.held.close()

    def _confine(self, name: str, pid: int, limits: CgroupLimits) -> None:
        cgroup = self._confined[name] = self._cgroups.create(name, limits)
        cgroup.join(pid)

    def _release(self, name: str) -> None:
        cgroup = self._confined.pop(name)
        cgroup.kill()
        cgroup.remove()

    async def _destroy(self, slot_id: str) -> None:
        slot = self._slots.pop(slot_id, None)
        if slot is not None:
            await self._engine.destroy(slot)
