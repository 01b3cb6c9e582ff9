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
slots beside them would only make both slower. Of each shape one interpreter starts at a time, and one that
takes long to import keeps no other shape from its slots. What a waiting slot holds of the budget is its own
memory as it is; its policy's limits are asked of the budget by the call that gets it. One that behaves as no
waiting slot should is taken away, and the next one is put off (``shelf.py``).

No fault in here ends a call: what goes wrong is logged, and calls do without slots that wait.

A waiting slot does not hold its image, so that an image can be removed while slots of it wait; at
hand-over the image is held again, and must be the very directory that it was, as must each host path that the
slot shows.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.models import SlotInfo
from sandboxd.receipt import take_reading
from sandboxd.shelf import Entry, Shelf, identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.config import PoolSize
    from sandboxd.engine.base import Capabilities, Engine, Lacks, Slot
    from sandboxd.images import ImageStore
    from sandboxd.plan import Shape

__all__ = ["Fate", "HandOver", "Pool"]

TICK = 0.5  # seconds between two looks at every slot that waits
CALM = 0.01  # seconds without a call that begins or ends until more slots are made
SLOW = 1.0  # seconds after which a slot that is being made is in nobody's way: its interpreter imports

log = structlog.get_logger(__name__)
Fate = Literal["used", "aged", "died", "drained", "evicted"]
HandOver = Literal["warm", "cold"]


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
        self._shelves: dict[str, Shelf] = {}
        self._entries: dict[int, Entry] = {}
        self._wake = anyio.Event()
        self._looked = 0.0
        self._busy = 0.0
        self._start: Callable[..., object] | None = None
        self.made = 0
        self.handed_over: Counter[HandOver] = Counter()
        self.fates: Counter[Fate] = Counter()

    async def probe(self) -> Capabilities:
        """What the engine says."""
        return await self._engine.probe()

    @property
    def lacks(self) -> Lacks:
        """What the engine says."""
        return self._engine.lacks

    async def create(
        self, shape: Shape, *, warm: bool = True, waiting: bool = True, memory: int | None = None
    ) -> Slot:
        """A slot of this shape that nobody had. Raises EngineFailed, HostFailed.

        ``warm`` is for one that has to be made; those that wait have the shape's interpreter ready, and run
        any other command as well. Without ``waiting`` one is made in any case. ``memory`` is the limit that
        the call will have: one that is less than what a waiting slot holds already asks for a new one.
        """
        now = time.monotonic()
        shelf = self._shelf(shape, now)
        if waiting:
            shelf.note(now)
        self._busy = now
        least = memory if memory is not None and memory < shape.limits.memory else None
        while waiting and shelf.waiting:
            entry = shelf.waiting[0]
            if least is not None and not entry.fits(least):
                break
            shelf.waiting.popleft()
            shelf.left(entry)
            if self._usable(entry) and entry.slot is not None:
                entry.state = "running"
                if not shelf.waiting:
                    self.wake()
                self.handed_over["warm"] += 1
                self.fates["used"] += 1
                return entry.slot
            if entry.dead:
                shelf.died(entry, now)
            if self._start is None:
                await self._discard(entry, "died")
            else:
                self._start(self._discard, entry, "died")
        # to start an interpreter while a call waits for it takes as long as to let the call start it
        warm = warm and self._size.max == 0 and least is None
        entry = self._new_entry(shape)
        if self._size.max:
            self.wake()  # those that wait may be too many beside it
        slot = await self._make(entry, warm=warm)
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
            try:
                if slot.reading is not None:
                    slot.reading.close()
            finally:
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
                    try:
                        pause = self._look(tasks.start_soon)
                    except Exception:
                        # calls do without slots that wait, and must not end with them
                        log.exception("the pool could not look after its slots")
                        await anyio.sleep(TICK)
                        continue
                    with anyio.move_on_after(pause):
                        await self._wake.wait()
        finally:
            self._start = None
            with anyio.CancelScope(shield=True):
                for shelf in list(self._shelves.values()):
                    while shelf.waiting:
                        await self._discard(shelf.waiting.popleft(), "drained")

    def _shelf(self, shape: Shape, now: float) -> Shelf:
        found = self._shelves.get(shape.digest)
        if found is None:
            found = self._shelves[shape.digest] = Shelf(shape, now, measured=now)
        return found

    def _new_entry(self, shape: Shape, *, warm: bool = False) -> Entry:
        entry = Entry(shape, time.monotonic(), warm=warm)
        self._entries[id(entry)] = entry
        return entry

    async def _make(self, entry: Entry, *, warm: bool) -> Slot:
        try:
            slot = await self._engine.create(entry.shape, warm=warm)
        finally:
            self._entries.pop(id(entry), None)
        entry.slot = slot
        self._entries[id(slot)] = entry
        self.made += 1
        return slot

    def _usable(self, entry: Entry) -> bool:
        """Whether a slot that waits may be handed over: alive, and of the files that a new one would have."""
        slot = entry.slot
        if slot is None or entry.dead:
            return False
        try:
            slot.held.enter_context(self._images.hold(entry.shape.image.digest))
            return entry.shows(self._images.resolve(entry.shape.image.digest))
        except (errors.SandboxdError, OSError):
            return False

    def _identity(self, shape: Shape) -> tuple[int, int, int]:
        return identity(self._images.resolve(shape.image.digest))

    def _look(self, start: Callable[..., object]) -> float:
        """Do what is to be done now; returns the seconds until the next look."""
        now = time.monotonic()
        if now - self._looked >= TICK:
            self._looked = now
            self._inspect(start, now)
        self._make_room(start)
        return CALM if self._refill(start, now) else TICK

    def _inspect(self, start: Callable[..., object], now: float) -> None:
        """Take away what is dead, at work, too old, or of a policy or an image that is no longer in force."""
        for key, shelf in list(self._shelves.items()):
            shelf.in_force = self._is_in_force(shelf)
            for entry in list(shelf.waiting):
                fate = self._fate(shelf, entry, now)
                if fate is not None:
                    self._take_away(start, shelf, entry, fate)
            if shelf.unused(now, self._size) and not shelf.waiting and not shelf.creating:
                del self._shelves[key]

    def _is_in_force(self, shelf: Shelf) -> bool:
        try:
            return self._in_force(shelf.shape)
        except Exception:
            log.exception("it is not known whether slots are still wanted", policy=shelf.shape.policy)
            return False

    def _fate(self, shelf: Shelf, entry: Entry, now: float) -> Fate | None:
        """Why a slot may wait no longer, or None."""
        if entry.slot is None or entry.dead:
            shelf.died(entry, now)
            log.warning("a slot died while it waited", policy=shelf.shape.policy, id=entry.name)
            return "died"
        if not shelf.in_force:
            return "drained"
        if shelf.unused(now, self._size) or now - entry.since > self._size.age / 1e6:
            return "aged"
        if not entry.slot.warm:  # nothing but our own code is in it
            return None
        try:
            quiet = entry.look(entry.slot, now)
        except (errors.SandboxdError, OSError, ValueError):
            log.exception("a slot that waits cannot be measured", policy=shelf.shape.policy, id=entry.name)
            return "died"
        if not quiet:
            shelf.misbehaved(entry, now)
            log.warning("a slot used CPU while it waited", policy=shelf.shape.policy, id=entry.name)
            return "evicted"
        return None

    def _make_room(self, start: Callable[..., object]) -> None:
        """Take away what is over the budget: what grew, then of the shapes that were used longest ago."""
        room = self._room()
        held = self._held()
        begun = len(self._entries) - held
        slots = held - room.slots - max(0, room.running - begun)
        memory = self._cost() - room.memory
        if slots <= 0 and memory <= 0:
            return
        shelves = sorted(self._shelves.values(), key=lambda shelf: shelf.used)
        waiting = [(shelf, entry) for shelf in shelves for entry in shelf.waiting]
        if memory > 0:
            waiting.sort(key=lambda one: not one[1].grown)
        now = time.monotonic()
        for shelf, entry in waiting:
            if slots <= 0 and memory <= 0:
                return
            slots, memory = slots - 1, memory - entry.cost
            if entry.grown:
                shelf.misbehaved(entry, now)
                log.warning("a slot grew while it waited", policy=shelf.shape.policy, id=entry.name)
            self._take_away(start, shelf, entry, "evicted")

    def _take_away(self, start: Callable[..., object], shelf: Shelf, entry: Entry, fate: Fate) -> None:
        shelf.waiting.remove(entry)
        shelf.left(entry)
        start(self._discard, entry, fate)

    def _held(self) -> int:
        """Slots that are no call's: those that wait, and those that are being made to wait."""
        return sum(len(shelf.waiting) + shelf.creating for shelf in self._shelves.values())

    def _cost(self) -> int:
        """Bytes that those hold."""
        return sum(shelf.held() for shelf in self._shelves.values())

    def _refill(self, start: Callable[..., object], now: float) -> bool:
        """Start to make slots that are wanted; whether some must wait until calls leave a moment for it."""
        room, put_off = self._room(), False
        free = (os.cpu_count() or 1) - self._making(now)
        for shelf in sorted(self._shelves.values(), key=lambda shelf: -shelf.used):
            wanted, interprets = shelf.wanted(now, self._size), shelf.interprets(now)
            while len(shelf.waiting) + shelf.creating < wanted:
                if interprets and shelf.creating:
                    break  # it may import for long: one at a time
                if free <= 0 or self._held() >= room.slots:
                    return False
                if now < self._busy + CALM:
                    put_off = True
                    break
                if self._cost() + shelf.cost > room.memory:
                    break
                free -= 1
                shelf.creating += 1
                start(self._add, shelf, self._new_entry(shelf.shape, warm=True), interprets)
        return put_off

    def _making(self, now: float) -> int:
        """Containers that are being made, but for those that take long."""
        return sum(entry.state == "creating" and now - entry.since < SLOW for entry in self._entries.values())

    async def _add(self, shelf: Shelf, entry: Entry, interprets: bool) -> None:  # noqa: FBT001  (by a task's start)
        try:
            image = self._identity(shelf.shape)
            slot = await self._make(entry, warm=interprets)
            try:
                if slot.reading is None:
                    slot.reading = await anyio.to_thread.run_sync(take_reading, slot)
                # removed and made again since the first look: then it is not known which one is mounted
                if image != self._identity(shelf.shape):
                    raise errors.NotFound(f"the image {shelf.shape.image.name!r} was replaced")
                entry.begin_to_wait(slot, time.monotonic())
                slot.held.close()
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self.destroy(slot)
                raise
            entry.image = image
            shelf.waiting.append(entry)
        except (errors.SandboxdError, OSError) as error:
            shelf.making.begin(time.monotonic())
            log.warning("no slot could be made ahead", policy=shelf.shape.policy, reason=str(error))
        except Exception:
            shelf.making.begin(time.monotonic())
            log.exception("a fault of ours while a slot was made ahead", policy=shelf.shape.policy)
        finally:
            self._entries.pop(id(entry), None)
            shelf.creating -= 1
            self.wake()

    async def _discard(self, entry: Entry, fate: Fate) -> None:
        self.fates[fate] += 1
        if entry.slot is None:
            return
        try:
            await self.destroy(entry.slot)
        except Exception:
            log.exception("a slot that waited was not cleared away", id=entry.slot.id)
