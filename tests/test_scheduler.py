"""Admission: budgets hold at every moment, nobody starves, and a caller's calls start in their order."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd import errors
from sandboxd.scheduler import Scheduler

MEMORY, SLOTS = 100, 3


@dataclass(frozen=True)
class Asked:
    """A call: who, how much memory, for how many turns of the loop it runs, and whether it gives up."""

    uid: int
    memory: int
    turns: int
    gives_up: bool


calls = st.lists(
    st.builds(
        Asked,
        uid=st.integers(0, 3),
        memory=st.integers(1, MEMORY),
        turns=st.integers(0, 4),
        gives_up=st.booleans(),
    ),
    max_size=25,
)
shares = st.dictionaries(
    st.integers(0, 3), st.tuples(st.none() | st.integers(1, 2), st.integers(1, 4)), min_size=4, max_size=4
)


class Run:
    """Runs calls under a scheduler and checks the budgets whenever one starts."""

    def __init__(self, share: dict[int, tuple[int | None, int]]) -> None:
        self.scheduler = Scheduler(memory=MEMORY, slots=SLOTS, queue=100)
        self.share = share
        self.now: list[Asked] = []
        self.started: list[tuple[int, Asked]] = []
        self.ended = 0

    async def call(self, number: int, asked: Asked) -> None:
        concurrent, weight = self.share[asked.uid]
        turn = self.scheduler.admitted(asked.uid, asked.memory, concurrent=concurrent, weight=weight)
        scope = anyio.CancelScope()
        if asked.gives_up:
            scope.deadline = anyio.current_time() + 0.0005
        with scope:
            async with turn:
                self.now.append(asked)
                self.started.append((number, asked))
                self.check()
                try:
                    for _ in range(asked.turns):
                        await anyio.lowlevel.checkpoint()
                finally:
                    self.now.remove(asked)
        self.ended += 1

    def check(self) -> None:
        assert len(self.now) <= SLOTS
        assert sum(asked.memory for asked in self.now) <= MEMORY
        for uid, (concurrent, _) in self.share.items():
            running = sum(asked.uid == uid for asked in self.now)
            assert concurrent is None or running <= concurrent

    async def all(self, asked: list[Asked]) -> None:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for number, one in enumerate(asked):
                    tasks.start_soon(self.call, number, one)


@given(asked=calls, share=shares)
@settings(max_examples=60)
def test_budgets_hold_and_everything_ends(
    asked: list[Asked], share: dict[int, tuple[int | None, int]]
) -> None:
    run = Run(share)
    anyio.run(run.all, asked)
    assert run.ended == len(asked)  # nobody starved: each ran, or gave up itself
    assert {number for number, _ in run.started} >= {
        number for number, one in enumerate(asked) if not one.gives_up
    }
    assert (run.scheduler.running, run.scheduler.queued) == (0, 0)
    assert run.scheduler.memory_used == 0
    assert not run.scheduler._shares  # a caller without calls is forgotten


@given(asked=calls, share=shares)
@settings(max_examples=40)
def test_calls_of_one_caller_start_in_order_of_acceptance(
    asked: list[Asked], share: dict[int, tuple[int | None, int]]
) -> None:
    run = Run(share)
    anyio.run(run.all, asked)
    for uid in share:
        order = [number for number, one in run.started if one.uid == uid]
        assert order == sorted(order)


def test_callers_take_turns_by_weight() -> None:
    share: dict[int, tuple[int | None, int]] = {1: (None, 1), 2: (None, 3)}
    asked = [Asked(1, MEMORY, 1, gives_up=False)] * 40 + [Asked(2, MEMORY, 1, gives_up=False)] * 12
    run = Run(share)
    anyio.run(run.all, asked)
    # the caller with 40 calls before it does not make the other wait: of the first 16, 3 of 4 are the other's
    first = [one.uid for _, one in run.started[:17]]
    assert 11 <= first.count(2) <= 13


def test_a_large_call_is_not_passed_by_small_ones_for_ever() -> None:
    share: dict[int, tuple[int | None, int]] = {1: (None, 1), 2: (None, 1)}
    small = Asked(1, 40, 3, gives_up=False)
    run = Run(share)
    anyio.run(run.all, [small, small, Asked(2, MEMORY, 1, gives_up=False), *[small] * 20])
    order = [one.uid for _, one in run.started]
    assert order.index(2) <= 3  # as soon as it is its turn, nobody behind it starts


def test_a_full_queue_says_when_to_come_again() -> None:
    async def run() -> None:
        scheduler = Scheduler(memory=MEMORY, slots=1, queue=2)
        async with anyio.create_task_group() as tasks:

            async def hold() -> None:
                async with scheduler.admitted(1, 1, concurrent=None, weight=1):
                    await anyio.sleep_forever()

            scheduler.check_room(1)
            for _ in range(3):
                tasks.start_soon(hold)
            await anyio.wait_all_tasks_blocked()
            assert (scheduler.running, scheduler.queued) == (1, 2)
            with pytest.raises(errors.QueueFull) as caught:
                scheduler.check_room(1)
            assert caught.value.details["retry_after"] >= 1
            tasks.cancel_scope.cancel()
        assert (scheduler.running, scheduler.queued) == (0, 0)

    anyio.run(run)
