"""A shelf: the slots of one shape that wait, how many are wanted, and when none is made.

In a slot that waits is nothing but our own code or, with ``warm`` in the policy, an interpreter with modules
that are as hostile as any tool: what such a one holds and uses is read twice a second (``Entry.look``). One
that spends CPU, grows or dies early shows what the next would do, so after it none is started for a while,
longer each time (``Pause``): slots without an interpreter wait meanwhile.

All weigh the same on the CPU, waiting or not: to raise a slot's weight again at hand-over would be a write to
its cgroup more in each call, while one that is not quiet is gone after a second.
"""

from __future__ import annotations

import os
import select
from collections import deque
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sandboxd.config import PoolSize
    from sandboxd.engine.base import Slot
    from sandboxd.images import HostBind, Image
    from sandboxd.plan import Mount, Shape

__all__ = ["COST", "Entry", "Pause", "Shelf", "State", "identity"]

COST = 1 << 20
"""Bytes of memory that a waiting slot counts for at least: its two processes, page tables and mounts."""
SLACK = 1 << 20  # bytes by which a reading may be behind: the kernel charges by batches for each CPU
GROWTH = 16 << 20  # bytes beyond what it took to make it, after which a slot goes before all others
QUIET = 0.02  # seconds of CPU in a second that a slot may use while it waits
NOISE = 10_000  # microseconds of CPU from one look to the next that are never too much
BURST = 1.0  # seconds within which calls count as one burst
HALF_LIFE = 60.0  # seconds
YOUNG = 30.0  # seconds: a slot that ends sooner says something of the next one
FIRST = 1.0  # seconds of the first pause; each is twice the one before
LONGEST = 60.0  # seconds
FORGET = 600.0  # seconds without a fault until the first pause is short again
REMEMBERED = 8  # slots whose cost says what the next one will cost

State = Literal["creating", "waiting", "running", "destroying"]


def identity(image: Image) -> tuple[int, int, int]:
    """What tells an image's directory from one of the same content that was made later. Raises OSError.

    One that the engine keeps is known by its content alone.
    """
    if image.rootfs is None:
        return 0, 0, 0
    found = os.stat(image.rootfs)  # noqa: PTH116  (for each call)
    return found.st_dev, found.st_ino, found.st_ctime_ns


@dataclass(eq=False)
class Entry:
    """One slot and where it is in its life."""

    shape: Shape
    since: float
    state: State = "creating"
    slot: Slot | None = None
    image: tuple[int, int, int] | None = None
    warm: bool = False
    """Whether it was made ahead of its call."""
    memory: int = 0
    """Bytes that it held at the last look, or when it began to wait."""
    cost: int = COST
    """Bytes of the budget that it counts for while it waits."""
    peak: int = COST
    """The most that it was seen to hold."""
    made: int = COST
    """What it took to make it."""
    cpu: int = 0
    looked: float = 0.0

    @property
    def name(self) -> str | None:
        """The slot's id, once there is a slot."""
        return None if self.slot is None else self.slot.id

    @property
    def dead(self) -> bool:
        """Whether PID 1 has ended, or said anything: it has nothing to say before its command."""
        if self.slot is None:
            return True
        poll = select.poll()
        poll.register(self.slot.init_pidfd, select.POLLIN)
        poll.register(self.slot.control.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def shows(self, image: Image) -> bool:
        """Whether a new slot would show the same files: those of the image, and of each host path.

        Raises OSError.
        """
        if self.slot is None or self.image != identity(image):
            return False
        binds: tuple[HostBind | Mount, ...] = (*image.binds, *self.shape.mounts)
        for target, source in {bind.target: bind.source for bind in binds}.items():
            found = os.stat(source)  # noqa: PTH116  (for each call)
            if self.slot.presented[target] != (found.st_dev, found.st_ino):
                return False
        return True

    @property
    def grown(self) -> bool:
        """Whether it holds more than what it took to make it."""
        return self.memory > self.made + GROWTH

    def begin_to_wait(self, slot: Slot, now: float) -> None:
        """Take the measures that later looks are compared with. Raises HostFailed."""
        self.made = self.peak = max(COST, slot.cgroup.usage().memory_peak)
        self.cpu, self.looked = slot.cgroup.cpu_total(), now
        self.memory = slot.cgroup.memory()
        self.cost = max(COST, self.memory)
        self.state, self.since = "waiting", now

    def look(self, slot: Slot, now: float) -> bool:
        """Read what it holds; whether it was quiet since the last look. Raises HostFailed."""
        used, before = slot.cgroup.cpu_total(), self.cpu
        allowed = max(QUIET * (now - self.looked) * 1e6, NOISE)
        self.cpu, self.looked = used, now
        self.memory = slot.cgroup.memory()
        self.cost = max(COST, self.memory)
        self.peak = max(self.peak, self.memory)
        return used - before <= allowed

    def fits(self, memory: int) -> bool:
        """Whether a call may have no more than these bytes in it: no kernel takes a limit below the usage."""
        return memory >= self.memory + SLACK


@dataclass
class Pause:
    """When something that went wrong is tried again."""

    until: float = 0.0
    count: int = 0

    def over(self, now: float) -> bool:
        """Whether it may be tried."""
        return now >= self.until

    def begin(self, now: float) -> None:
        """It went wrong. What goes wrong during a pause began before it, and makes none longer."""
        if now < self.until:
            return
        if now - self.until > FORGET:
            self.count = 0
        self.until = now + min(FIRST * 2**self.count, LONGEST)
        self.count += 1


@dataclass(eq=False)
class Shelf:
    """What is known of one shape."""

    shape: Shape
    used: float
    demand: float = 0.0
    measured: float = 0.0
    begun: deque[float] = field(default_factory=deque)
    waiting: deque[Entry] = field(default_factory=deque)
    creating: int = 0
    in_force: bool = True
    making: Pause = field(default_factory=Pause)
    interpreter: Pause = field(default_factory=Pause)
    seen: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def note(self, now: float) -> None:
        """A call of this shape begins."""
        self.begun.append(now)
        while self.begun[0] < now - BURST:
            self.begun.popleft()
        self.demand = max(self._recent(now), float(len(self.begun)))
        self.measured = self.used = now

    def wanted(self, now: float, size: PoolSize) -> int:
        """How many slots shall wait: none of a shape that is kept, which its first call makes."""
        if self.shape.kept or not self.in_force or not self.making.over(now) or self.unused(now, size):
            return 0
        return min(max(ceil(self._recent(now) - 0.5), size.min), size.max)

    def unused(self, now: float, size: PoolSize) -> bool:
        """Whether nobody has asked for this shape for so long that no slot of it shall wait."""
        return now - self.used > size.age / 1e6

    def interprets(self, now: float) -> bool:
        """Whether the next slot shall have the shape's interpreter."""
        return self.shape.warm is not None and self.interpreter.over(now)

    @property
    def cost(self) -> int:
        """Bytes that a slot in making is taken to need: the most that one of the last ones held."""
        return max((COST, *self.seen, *(entry.peak for entry in self.waiting)))

    def held(self) -> int:
        """Bytes that the slots hold which are nobody's."""
        waiting = sum(entry.cost for entry in self.waiting)
        return waiting + self.creating * self.cost if self.creating else waiting

    def left(self, entry: Entry) -> None:
        """Remember what a slot needed that waits no more."""
        self.seen.append(entry.peak)

    def misbehaved(self, entry: Entry, now: float) -> None:
        """A slot did what no slot does while it waits: make none like it for a while."""
        interprets = entry.slot is not None and entry.slot.warm
        (self.interpreter if interprets else self.making).begin(now)

    def died(self, entry: Entry, now: float) -> None:
        """A slot died while it waited."""
        if now - entry.since < YOUNG:
            self.misbehaved(entry, now)

    def _recent(self, now: float) -> float:
        """The demand, as far as it is not forgotten."""
        return float(self.demand * 0.5 ** ((now - self.measured) / HALF_LIFE))
