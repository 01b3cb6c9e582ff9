"""Slots that wait: containers made ahead of their calls, each for one call.

Theory of operation.  A shape that is used gets slots ahead of time: as many as calls of it began within a
second lately (``demand``, which halves every minute), at least ``pool.min`` and at most ``pool.max``. One
task of the daemon makes them, takes away those that are too old, of a policy or an image that is no longer
in force, or dead, and looks again after each change and twice a second. ``create`` gives a waiting slot of
exactly the shape that is asked for, or makes one; the caller cannot tell but by the time. ``destroy`` ends
a slot for good: none comes back.

Calls come first. Waiting slots take only what running calls leave of the daemon's budget, and give it up
when a call is granted its turn. A slot is made in the background only while fewer containers are being made
than there are CPUs and no call has begun or ended a moment before: where calls leave no such moment, to make
slots beside them would only make both slower. What a waiting slot
holds of the budget is its own memory, at least ``COST``; its policy's limits are asked of the budget by the
call that gets it.

A waiting slot does not hold its image, so that an image can be removed while slots of it wait; at
hand-over the image is held again, and must be the very directory that it was.
"""

from __future__ import annotations

import os
import select
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.models import SlotInfo
from sandboxd.receipt import take_reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.config import PoolSize
    from sandboxd.engine.base import Capabilities, Engine, Slot
    from sandboxd.images import ImageStore
    from sandboxd.plan import Shape

__all__ = ["COST", "Fate", "HandOver", "Pool"]

COST = 1 << 20
"""Bytes of memory that a waiting slot counts for at least: its two processes, page tables and mounts."""
TICK = 0.5  # seconds between two looks at every slot that waits
CALM = 0.01  # seconds without a call that begins or ends until more slots are made
BURST = 1.0  # seconds within which calls count as one burst
HALF_LIFE = 60.0  # seconds
AGAIN = 5.0  # seconds until a shape of which no slot could be made is tried again

log = structlog.get_logger(__name__)
State = Literal["creating", "waiting", "running", "destroying"]
Fate = Literal["used", "aged", "died", "drained", "evicted"]
HandOver = Literal["warm", "cold"]


@dataclass(eq=False)
class _Entry:
    """One slot and where it is in its life."""

    shape: Shape
    since: float
    state: State = "creating"
    slot: Slot | None = None
    image: tuple[int, int, int] | None = None
    warm: bool = False


@dataclass(eq=False)
class _Shelf:
    """What is known of one shape."""

    shape: Shape
    used: float
    demand: float = 0.0
    measured: float = 0.0
    begun: deque[float] = field(default_factory=deque)
    waiting: deque[_Entry] = field(default_factory=deque)
    creating: int = 0
    cost: int = COST
    retry: float = 0.0
    in_force: bool = True

    def note(self, now: float) -> None:
        """A call of this shape begins."""
        self.begun.append(now)
        while self.begun[0] < now - BURST:
            self.begun.popleft()
        self.demand = max(self.recent(now), float(len(self.begun)))
        self.measured = self.used = now

    def recent(self, now: float) -> float:
        """The demand, as far as it is not forgotten."""
        return float(self.demand * 0.5 ** ((now - self.measured) / HALF_LIFE))


@dataclass(frozen=True)
class Room:
    """What running calls leave of the budget: containers, and bytes."""

    slots: int
    memory: int
    running: int
    """Calls that have their turn; one that has no slot yet may take one that waits."""


class Pool:
    """An ``Engine`` over an engine. For one event loop; ``run`` is to be a task of it."""

    def __init__(
        self,
        engine: Engine,
        size: PoolSize,
        *,
        images: ImageStore,
        room: Callable[[], Room],
        in_force: Callable[[Shape], bool],
    ) -> None:
        """``in_force``: whether a call that is accepted now could get this shape."""
        self._engine = engine
        self._size = size
        self._images = images
        self._room = room
        self._in_force = in_force
        self._shelves: dict[str, _Shelf] = {}
        self._entries: dict[int, _Entry] = {}
        self._wake = anyio.Event()
        self._making = 0
        self._looked = 0.0
        self._busy = 0.0
        self._start: Callable[..., object] | None = None
        self.made = 0
        self.handed_over: Counter[HandOver] = Counter()
        self.fates: Counter[Fate] = Counter()

    async def probe(self) -> Capabilities:
        """What the engine says."""
        return await self._engine.probe()

    async def create(self, shape: Shape, *, warm: bool = True) -> Slot:
        """A slot of this shape that nobody had. Raises EngineFailed, HostFailed.

        ``warm`` is for one that has to be made; those that wait have the shape's interpreter ready, and run
        any other command as well.
        """
        now = time.monotonic()
        shelf = self._shelf(shape, now)
        shelf.note(now)
        self._busy = now
        while shelf.waiting:
            entry = shelf.waiting.popleft()
            if entry.slot is not None and self._usable(entry):
                entry.state = "running"
                if not shelf.waiting:
                    self.wake()
                self.handed_over["warm"] += 1
                self.fates["used"] += 1
                return entry.slot
            await self._discard(entry, "died")
        entry = _Entry(shape, now)
        self._making += 1
        try:
            # to start an interpreter while a call waits for it takes as long as to let the call start it
            slot = await self._make(entry, warm=warm and self._size.max == 0)
        finally:
            self._making -= 1
        self.handed_over["cold"] += 1
        entry.state = "running"
        return slot

    async def kill(self, slot: Slot) -> None:
        """End every process of the slot."""
        await self._engine.kill(slot)

    async def destroy(self, slot: Slot) -> None:
        """Take the slot away; another takes its place in the background, where one is wanted."""
        entry = self._entries.get(id(slot))
        if entry is not None:
            entry.state = "destroying"
        try:
            if slot.reading is not None:
                slot.reading.close()
            await self._engine.destroy(slot)
        finally:
            self._entries.pop(id(slot), None)
            self._busy = time.monotonic()
            self.wake()

    def wake(self) -> None:
        """Have the background task look at once."""
        self._wake.set()

    def give_way(self) -> None:
        """Take away what is over the budget, now that a call has its turn."""
        if self._start is not None:
            self._make_room(self._start)
        self.wake()

    def slots(self) -> list[SlotInfo]:
        """Every slot that there is, the longest in its state first."""
        now, at = time.monotonic(), time.time_ns() // 1000
        return [
            SlotInfo(
                id=None if entry.slot is None else entry.slot.id,
                state=entry.state,
                policy=entry.shape.policy,
                image=entry.shape.image.name,
                shape=entry.shape.digest,
                since=at - int((now - entry.since) * 1e6),
                warm=entry.warm,
            )
            for entry in sorted(self._entries.values(), key=lambda entry: entry.since)
        ]

    async def run(self) -> None:
        """Keep the slots that shall wait, until cancelled; then take all that wait away."""
        try:
            async with anyio.create_task_group() as tasks:
                self._start = tasks.start_soon
                while True:
                    self._wake = anyio.Event()
                    with anyio.move_on_after(self._look(tasks.start_soon)):
                        await self._wake.wait()
        finally:
            self._start = None
            with anyio.CancelScope(shield=True):
                for shelf in self._shelves.values():
                    while shelf.waiting:
                        await self._discard(shelf.waiting.popleft(), "drained")

    def _shelf(self, shape: Shape, now: float) -> _Shelf:
        found = self._shelves.get(shape.digest)
        if found is None:
            found = self._shelves[shape.digest] = _Shelf(shape, now, measured=now)
        return found

    async def _make(self, entry: _Entry, *, warm: bool) -> Slot:
        key = id(entry)
        self._entries[key] = entry
        try:
            slot = await self._engine.create(entry.shape, warm=warm)
        finally:
            del self._entries[key]
        entry.slot = slot
        self._entries[id(slot)] = entry
        self.made += 1
        return slot

    def _usable(self, entry: _Entry) -> bool:
        """Whether a slot that waits may be handed over: alive, of an image that is still there."""
        slot = entry.slot
        if slot is None or _is_dead(slot):
            return False
        try:
            slot.held.enter_context(self._images.hold(entry.shape.image.digest))
            return entry.image == self._identity(entry.shape)
        except (errors.SandboxdError, OSError):
            return False

    def _identity(self, shape: Shape) -> tuple[int, int, int]:
        """What tells an image's directory from one of the same content that was made later."""
        rootfs = self._images.resolve(shape.image.digest).rootfs
        if rootfs is None:
            raise errors.NotFound("an image without a root file system")
        found = os.stat(rootfs)  # noqa: PTH116  (for each call)
        return found.st_dev, found.st_ino, found.st_ctime_ns

    def _look(self, start: Callable[..., object]) -> float:
        """Do what is to be done now; returns the seconds until the next look."""
        now = time.monotonic()
        if now - self._looked >= TICK:
            self._looked = now
            self._inspect(start, now)
        self._make_room(start)
        return CALM if self._refill(start, now) else TICK

    def _inspect(self, start: Callable[..., object], now: float) -> None:
        """Take away what is dead, too old, or of a policy or an image that is no longer in force."""
        for key, shelf in list(self._shelves.items()):
            shelf.in_force = self._in_force(shelf.shape)
            unused = now - shelf.used > self._size.age / 1e6
            for entry in list(shelf.waiting):
                fate: Fate | None = None
                if entry.slot is None or _is_dead(entry.slot):
                    fate = "died"
                elif not shelf.in_force:
                    fate = "drained"
                elif unused or now - entry.since > self._size.age / 1e6:
                    fate = "aged"
                if fate is not None:
                    shelf.waiting.remove(entry)
                    start(self._discard, entry, fate)
            if unused and not shelf.waiting and not shelf.creating:
                del self._shelves[key]

    def _make_room(self, start: Callable[..., object]) -> None:
        """Take away what is over the budget, of the shapes that were used longest ago first."""
        room = self._room()
        begun = len(self._entries) - self._held()
        slots = self._held() - room.slots - max(0, room.running - begun)
        memory = self._cost() - room.memory
        for shelf in sorted(self._shelves.values(), key=lambda shelf: shelf.used):
            while (slots > 0 or memory > 0) and shelf.waiting:
                start(self._discard, shelf.waiting.popleft(), "evicted")
                slots, memory = slots - 1, memory - shelf.cost

    def _held(self) -> int:
        """Slots that are no call's: those that wait, and those that are being made to wait."""
        return sum(len(shelf.waiting) + shelf.creating for shelf in self._shelves.values())

    def _cost(self) -> int:
        """Bytes that those hold."""
        return sum((len(shelf.waiting) + shelf.creating) * shelf.cost for shelf in self._shelves.values())

    def _refill(self, start: Callable[..., object], now: float) -> bool:
        """Start to make slots that are wanted; whether some must wait until calls leave a moment for it."""
        room, cpus, put_off = self._room(), os.cpu_count() or 1, False
        for shelf in sorted(self._shelves.values(), key=lambda shelf: -shelf.used):
            if not shelf.in_force or now < shelf.retry or now - shelf.used > self._size.age / 1e6:
                continue
            wanted = min(max(ceil(shelf.recent(now) - 0.5), self._size.min), self._size.max)
            while len(shelf.waiting) + shelf.creating < wanted:
                if self._making >= cpus or self._held() >= room.slots:
                    return False
                if now < self._busy + CALM:
                    put_off = True
                    break
                if self._cost() + shelf.cost > room.memory:
                    break
                shelf.creating += 1
                self._making += 1
                start(self._add, shelf)
        return put_off

    async def _add(self, shelf: _Shelf) -> None:
        entry = _Entry(shelf.shape, time.monotonic(), warm=True)
        try:
            image = await anyio.to_thread.run_sync(self._identity, shelf.shape)
            slot = await self._make(entry, warm=True)
            try:
                slot.reading = await anyio.to_thread.run_sync(take_reading, slot)
                # removed and made again since the first look: then it is not known which one is mounted
                if image != self._identity(shelf.shape):
                    raise errors.NotFound(f"the image {shelf.shape.image.name!r} was replaced")
                shelf.cost = max(COST, slot.cgroup.usage().memory_peak)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self.destroy(slot)
                raise
        except (errors.SandboxdError, OSError) as error:
            shelf.retry = time.monotonic() + AGAIN
            log.warning("no slot could be made ahead", policy=shelf.shape.policy, reason=str(error))
            return
        finally:
            shelf.creating -= 1
            self._making -= 1
        slot.held.close()
        entry.image, entry.state, entry.since = image, "waiting", time.monotonic()
        shelf.waiting.append(entry)
        self.wake()

    async def _discard(self, entry: _Entry, fate: Fate) -> None:
        self.fates[fate] += 1
        if entry.slot is None:
            return
        try:
            await self.destroy(entry.slot)
        except errors.SandboxdError:
            log.exception("a slot that waited was not cleared away", id=entry.slot.id)


def _is_dead(slot: Slot) -> bool:
    """Whether PID 1 of the slot has ended, or said anything: it has nothing to say before its command."""
    poll = select.poll()
    poll.register(slot.init_pidfd, select.POLLIN)
    poll.register(slot.control.fileno(), select.POLLIN)
    return bool(poll.poll(0))
