"""A pool by itself over a real engine: what ``create`` does with slots that are not what a call needs.

This file is also the process that has the engine, which needs a mount namespace of its own.
"""

from __future__ import annotations

import json
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from itself import told_by

from sandboxd.config import Config
from sandboxd.engine.host import EngineHost, enter_private_mounts, instance_name
from sandboxd.engine.oci import OciEngine
from sandboxd.engine.probe import probe_shape
from sandboxd.plan import ImageRef
from sandboxd.pool import Pool, Room

if TYPE_CHECKING:
    from sandboxd.engine.base import Slot
    from sandboxd.plan import Shape

SLOTS = 2
SLOW = 1.0  # seconds that it takes to end a slot here


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    seen: dict[str, object] = json.loads(told_by(__file__, tmp_path_factory).splitlines()[-1])
    return seen


def test_a_call_with_less_memory_than_a_slot_holds_leaves_it_alone(found: dict[str, object]) -> None:
    assert found["memory below usage"] == "cold, those that wait stay"
    assert found["memory above usage"] == "warm"
    assert found["memory of the policy"] == "warm"


def test_a_call_may_ask_for_a_slot_that_nobody_made_ahead(found: dict[str, object]) -> None:
    assert found["not waiting"] == "cold, those that wait stay"


def test_one_that_is_made_in_spite_of_those_that_wait_takes_their_place_at_once(
    found: dict[str, object],
) -> None:
    assert found["over the budget"] == 0


def test_dead_slots_are_in_no_calls_way(found: dict[str, object]) -> None:
    assert found["beside dead slots"] == "cold"
    seconds = found["seconds beside dead slots"]
    assert isinstance(seconds, float)
    assert seconds < SLOW


class SlowToEnd(OciEngine):
    """As the real one, but that it takes long."""

    async def destroy(self, slot: Slot) -> None:
        if slot.reading is not None:
            with anyio.CancelScope(shield=True):  # as all of the real one is
                await anyio.sleep(SLOW)
        await super().destroy(slot)


def end(slot: Slot) -> None:
    """Kill PID 1 and wait until it is dead, without the pool having a look meanwhile."""
    signal.pidfd_send_signal(slot.init_pidfd, signal.SIGKILL)
    dead = select.poll()
    dead.register(slot.init_pidfd, select.POLLIN)
    assert dead.poll(10_000)


class Trial:
    """A pool with a budget of few slots, and what of it runs."""

    def __init__(self, host: EngineHost, config: Config) -> None:
        [engine] = host.engines()
        engine.__class__ = SlowToEnd
        image = host.images.resolve("base")
        self.shape: Shape = replace(probe_shape(), image=ImageRef(image.name, image.digest))
        self.running = 0
        self.budget = SLOTS + 1
        self.pool = Pool(engine, config.pool, images=host.images, room=self.room, in_force=lambda _: True)

    def room(self) -> Room:
        return Room(self.budget - self.running, 2**30, self.running)

    def waiting(self) -> set[str]:
        return {slot.id for slot in self.pool.slots() if slot.id and slot.state == "waiting"}

    async def filled(self) -> set[str]:
        with anyio.fail_after(10):
            while len(self.waiting()) < SLOTS:  # noqa: ASYNC110  (no event tells)
                await anyio.sleep(0.01)
        return self.waiting()

    async def of(self, *, waiting: bool = True, memory: int | None = None) -> str:
        """What a call gets that asks like this."""
        before = await self.filled()
        self.running += 1
        slot = await self.pool.create(self.shape, waiting=waiting, memory=memory)
        kind = "warm" if slot.id in before else "cold"
        if before <= self.waiting():
            kind += ", those that wait stay"
        await self.pool.destroy(slot)
        self.running -= 1
        return kind

    async def beside_dead(self) -> tuple[str, float]:
        before = await self.filled()
        for entry in self.pool._entries.values():
            assert entry.slot is not None
            end(entry.slot)
        began = time.monotonic()
        slot = await self.pool.create(self.shape)
        took = time.monotonic() - began
        await self.pool.destroy(slot)
        return "warm" if slot.id in before else "cold", took

    async def over(self) -> int:
        """Slots beyond the budget, soon after one was made."""
        await self.filled()
        self.budget, self.running = SLOTS, 1
        slot = await self.pool.create(self.shape, waiting=False)
        await anyio.sleep(0.02)  # far less than the pool takes until it looks by itself
        found = len(self.waiting()) + self.running - self.budget
        await self.pool.destroy(slot)
        self.running = 0
        return found


async def main(state: Path) -> dict[str, object]:
    """Try each."""
    config = Config.model_validate(
        {"state": str(state), "runtime": "builtin", "pool": {"min": SLOTS, "max": SLOTS}}
    )
    seen: dict[str, object] = {}
    with EngineHost(config, RUN, instance_name(state)) as host:
        trial = Trial(host, config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(trial.pool.run)
            await trial.pool.destroy(await trial.pool.create(trial.shape))
            seen["memory below usage"] = await trial.of(memory=2**16)
            seen["memory above usage"] = await trial.of(memory=trial.shape.limits.memory - 4096)
            seen["memory of the policy"] = await trial.of(memory=trial.shape.limits.memory)
            seen["not waiting"] = await trial.of(waiting=False)
            seen["beside dead slots"], seen["seconds beside dead slots"] = await trial.beside_dead()
            seen["over the budget"] = await trial.over()
            tasks.cancel_scope.cancel()
    return seen


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    RUN = enter_private_mounts(instance_name(directory))
    sys.stdout.write(json.dumps(anyio.run(main, directory)))
