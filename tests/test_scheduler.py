"""Admission: budgets hold at every moment, nobody starves, and a caller's calls start in their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sandboxd import errors
from sandboxd.scheduler import Scheduler, Ticket

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
        turn = self.scheduler.admitted(Ticket(asked.uid, asked.memory, concurrent=concurrent, weight=weight))
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
                async with scheduler.admitted(Ticket(1, 1)):
                    await anyio.sleep_forever()

            scheduler.check_room(1)
            for _ in range(3):
                tasks.start_soon(hold)
            await anyio.wait_all_tasks_blocked()
            assert (scheduler.running, scheduler.queued) == (1, 2)
            with pytest.raises(errors.QueueFull) as caught:
                scheduler.check_room(1)
            assert caught.value.details["retry_after"] >= 1
            told = {name: caught.value.details[name] for name in ("queued", "yours", "running", "limit")}
            assert told == {"queued": 2, "yours": 2, "running": 1, "limit": 2}
            assert caught.value.details["which"] == "queue"
            assert "as many as the queue holds (2)" in str(caught.value)
            assert caught.value.details["estimate"] > 0
            tasks.cancel_scope.cancel()
        assert (scheduler.running, scheduler.queued) == (0, 0)

    anyio.run(run)


@pytest.mark.parametrize(
    ("others", "most", "accepted", "which"),
    [(0, None, 40, "share"), (0, 7, 7, "caller"), (30, None, 16, "share"), (3, 100, 38, "share")],
)
def test_a_refusal_names_the_limit_that_was_hit(
    others: int, most: int | None, accepted: int, which: str
) -> None:
    scheduler = Scheduler(memory=MEMORY, slots=1, queue=50)
    scheduler.enqueue(Ticket(9, 1))  # it runs
    for _ in range(others):
        scheduler.enqueue(Ticket(2, 1))
    own = 0
    while own < 50:
        try:
            scheduler.check_room(1, most)
        except errors.QueueFull as error:
            full = error
            break
        scheduler.enqueue(Ticket(1, 1))
        own += 1
    assert own == accepted
    told = {name: full.details[name] for name in ("queued", "yours", "which", "limit")}
    assert told == {"queued": others + own, "yours": own, "which": which, "limit": own}
    assert f"({own})" in str(full)
    # when to come again, and when a call would start, are two things, and both are said
    assert f"Try again in {full.details['retry_after']} s" in str(full)
    assert full.details["estimate"] > full.details["retry_after"]
    assert "might start in" in str(full)


@pytest.mark.timeout(60)
def test_100_000_that_wait_make_no_step_long() -> None:
    """Were each step to look at all that wait, there were ten billion looks, and a minute would not do."""
    scheduler = Scheduler(memory=1 << 40, slots=1, queue=10**6)
    tickets = [Ticket(number % 7, 1, priority=number % 3) for number in range(100_000)]
    for ticket in tickets:
        scheduler.enqueue(ticket)
    assert (scheduler.running, scheduler.queued) == (1, 99_999)
    for ticket in [*tickets[40_000:60_000], *tickets]:  # those in the middle are withdrawn, then all the rest
        scheduler.leave(ticket)
    assert (scheduler.running, scheduler.queued) == (0, 0)


class Fairness(RuleBasedStateMachine):
    """The scheduler beside a model that looks at all that wait, each time anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(memory=MEMORY, slots=SLOTS, queue=10**6, cpus=2000)
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.resting: list[Ticket] = []
        self.turned: dict[int, list[Ticket]] = {}
        self.owed: dict[int, int] = {}

    def granted(self, ticket: Ticket) -> None:
        assert ticket in self.waiting
        self.waiting.remove(ticket)
        before = [
            other
            for other in self.waiting
            if other.uid == ticket.uid
            and (-other.priority, other.order) < (-ticket.priority, ticket.order)
            and not (other.serial and any(other.serial == each.serial for each in [*self.running, ticket]))
            and not (other.serial and any(other.serial == each.serial for each in self.resting))
            and not (
                other.serial and any(o.serial == other.serial and o.order < other.order for o in self.waiting)
            )
        ]
        assert not before, "first by priority, then by order"
        self.running.append(ticket)
        if ticket.uid in self.owed:
            del self.owed[ticket.uid]
        for uid in self.owed:
            self.owed[uid] += 1
            assert self.owed[uid] <= SLOTS, "a first call waits for no more than one turn of others"

    @rule(
        uid=st.integers(0, 3),
        memory=st.integers(1, MEMORY),
        cpus=st.integers(1, 2000),
        priority=st.integers(-2, 2),
        serial=st.none() | st.sampled_from(["a", "b"]),
        concurrent=st.none() | st.integers(1, 2),
        weight=st.integers(1, 3),
    )
    def ask(self, uid: int, **asked: Any) -> None:
        if asked["serial"]:
            asked["serial"] += str(uid)
        first = not any(ticket.uid == uid for ticket in [*self.waiting, *self.running, *self.resting])
        ticket = Ticket(uid, **asked)
        ticket.on_grant = lambda: self.granted(ticket)
        self.waiting.append(ticket)
        if first and ticket.serial is None:
            self.owed[uid] = 0
        self.scheduler.enqueue(ticket)

    @precondition(lambda self: self.waiting or self.running or self.resting)
    @rule(which=st.integers(0, 10**6), again=st.booleans())
    def end(self, which: int, *, again: bool) -> None:
        held = [*self.running, *self.waiting, *self.resting]
        ticket = held[which % len(held)]
        for each in (self.waiting, self.running, self.resting):
            if ticket in each:
                again = again and each is self.running
                each.remove(ticket)
        if ticket.uid in self.owed and not any(other.uid == ticket.uid for other in self.waiting):
            del self.owed[ticket.uid]
        if again:
            self.resting.append(ticket)
            self.scheduler.rest(ticket)
        else:
            self.scheduler.leave(ticket)

    @precondition(lambda self: self.resting)
    @rule()
    def come_again(self) -> None:
        ticket = self.resting.pop()
        self.waiting.append(ticket)
        self.scheduler.enqueue(ticket)

    @invariant()
    def holds(self) -> None:
        scheduler = self.scheduler
        assert len(self.running) <= SLOTS
        if len(self.running) > 1:
            assert sum(ticket.memory for ticket in self.running) <= MEMORY
            assert sum(ticket.cpus for ticket in self.running) <= 2000
        series = [ticket.serial for ticket in [*self.running, *self.resting] if ticket.serial]
        assert len(series) == len(set(series)), "one of a series at a time"
        assert (scheduler.running, scheduler.queued) == (len(self.running), len(self.waiting))
        assert scheduler.memory_used == sum(ticket.memory for ticket in self.running)
        if not self.running:  # nobody starves: what waits, waits for a series that rests
            resting = {ticket.serial for ticket in self.resting}
            assert all(ticket.serial in resting for ticket in self.waiting)


TestFairness = Fairness.TestCase
TestFairness.settings = settings(max_examples=150, stateful_step_count=60)


def test_10_000_calls_of_one_delay_the_first_of_another_by_one_turn() -> None:
    scheduler = Scheduler(memory=10**9, slots=1, queue=10**6)
    many = [Ticket(1, 1, weight=5) for _ in range(10_000)]
    for ticket in many:
        scheduler.enqueue(ticket)
    for ended in many[:500]:
        scheduler.leave(ended)
    other = Ticket(2, 1)
    scheduler.enqueue(other)
    assert not other.granted
    scheduler.leave(many[500])
    assert other.granted


def test_a_priority_jumps_nobody_but_its_own_caller() -> None:
    scheduler = Scheduler(memory=10**9, slots=1, queue=100)
    running, low, high, other = (
        Ticket(1, 1),
        Ticket(1, 1),
        Ticket(1, 1, priority=9),
        Ticket(2, 1, priority=-9),
    )
    for ticket in (running, low, high, other):
        scheduler.enqueue(ticket)
    order = []
    for _ in range(4):
        [now] = [ticket for ticket in (running, low, high, other) if ticket.granted]
        order.append(now)
        scheduler.leave(now)
    assert order == [running, other, high, low]


def test_under_pressure_one_runs_and_no_more_until_it_falls() -> None:
    async def run() -> None:
        scheduler = Scheduler(memory=10**9, slots=8, queue=100)
        pressed = True
        scheduler.pressed = lambda: pressed
        tickets = [Ticket(1, 1) for _ in range(3)]
        turn = anyio.Event()
        tickets[2].on_grant = turn.set
        for ticket in tickets:
            scheduler.enqueue(ticket)
        assert [ticket.granted for ticket in tickets] == [True, False, False]
        scheduler.leave(tickets[0])
        assert [ticket.granted for ticket in tickets] == [False, True, False]
        pressed = False
        with anyio.fail_after(5):
            await turn.wait()  # nothing ended: it looks again by itself

    anyio.run(run)


def ticket(granted: list[str], name: str, **fields: Any) -> Ticket:
    made = Ticket(fields.pop("uid", 1), fields.pop("memory", 60), **fields)
    made.on_grant = lambda: granted.append(name)
    return made


async def test_what_a_series_keeps_is_held_and_its_calls_run_on_it() -> None:
    scheduler, granted = Scheduler(memory=MEMORY, slots=SLOTS, queue=100), list[str]()
    first = ticket(granted, "first", serial="s", cpus=2, concurrent=1)
    scheduler.enqueue(first)
    hold = scheduler.keep(first)
    scheduler.leave(first)
    assert (scheduler.running, scheduler.memory_used, scheduler.cpus_used) == (1, 60, 2)
    assert (scheduler.kept, scheduler.holds) == (60, 1)
    other = ticket(granted, "other", uid=2)
    scheduler.enqueue(other)
    assert granted == ["first"]  # 60 of 100 are kept
    second, third = (ticket(granted, name, serial="s", concurrent=1) for name in ("second", "third"))
    scheduler.enqueue(second)  # waits for nothing, though its caller may run one at a time
    scheduler.enqueue(third)
    assert granted == ["first", "second"]
    scheduler.leave(second)
    assert granted == ["first", "second", "third"]
    assert (scheduler.running, scheduler.memory_used) == (1, 60)
    scheduler.leave(third)
    scheduler.release(hold)
    scheduler.release(hold)
    assert granted[-1] == "other"
    scheduler.leave(other)
    assert (scheduler.running, scheduler.memory_used, scheduler.cpus_used, scheduler.queued) == (0, 0, 0, 0)


async def test_a_call_holds_on_to_what_was_kept_when_that_ends_under_it() -> None:
    scheduler, granted = Scheduler(memory=MEMORY, slots=SLOTS, queue=100), list[str]()
    first, second, third = (ticket(granted, name, serial="s") for name in ("1", "2", "3"))
    scheduler.enqueue(first)
    hold = scheduler.keep(first)
    scheduler.leave(first)
    scheduler.enqueue(second)
    scheduler.enqueue(third)
    scheduler.release(hold)  # its container ended with it
    assert (scheduler.running, scheduler.memory_used, scheduler.holds) == (1, 60, 0)
    scheduler.leave(second)
    assert granted == ["1", "2", "3"]
    assert (scheduler.running, scheduler.memory_used) == (1, 60)
    scheduler.leave(third)
    assert (scheduler.running, scheduler.memory_used) == (0, 0)


async def test_a_hold_counts_to_its_callers_share() -> None:
    scheduler, granted = Scheduler(memory=MEMORY, slots=SLOTS, queue=100), list[str]()
    first = ticket(granted, "first", memory=10, serial="s", concurrent=1)
    scheduler.enqueue(first)
    hold = scheduler.keep(first)
    scheduler.leave(first)
    alone = ticket(granted, "alone", memory=10, concurrent=1)
    scheduler.enqueue(alone)
    assert granted == ["first"]
    scheduler.release(hold)
    assert granted == ["first", "alone"]


async def test_what_is_kept_stays_its_callers_whoever_runs_on_it() -> None:
    """As an operator does, in somebody else's session."""
    scheduler = Scheduler(memory=100, slots=4, queue=10)
    first = Ticket(1, 30, serial="s")
    scheduler.enqueue(first)
    hold = scheduler.keep(first)
    scheduler.leave(first)
    riding, other = Ticket(0, 5, serial="s"), Ticket(0, 10)
    scheduler.enqueue(riding)
    scheduler.enqueue(other)
    assert (riding.granted, other.granted) == (True, True)
    scheduler.leave(other)
    scheduler.release(hold)  # its container ended under the call
    assert (scheduler.running, scheduler.memory_used) == (1, 30)
    scheduler.leave(riding)
    assert (scheduler.running, scheduler.memory_used, scheduler._shares) == (0, 0, {})


async def test_whoever_cannot_start_beside_what_is_kept_is_told_of() -> None:
    scheduler = Scheduler(memory=100, slots=4, queue=10, cpus=2000)
    starved: list[str] = []
    scheduler.on_starved = lambda: starved.append("yes")
    first = Ticket(1, 30, serial="s")
    scheduler.enqueue(first)
    hold = scheduler.keep(first)
    running = Ticket(2, 10)
    scheduler.enqueue(running)
    large = Ticket(3, 95)
    scheduler.enqueue(large)
    small = Ticket(4, 60)
    scheduler.enqueue(small)
    assert not large.granted
    assert starved == []  # a call runs on it
    scheduler.leave(first)
    assert starved == ["yes"]
    scheduler.leave(running)
    scheduler.release(hold)
    assert large.granted


async def test_whoever_waits_for_calls_that_run_is_not() -> None:
    scheduler = Scheduler(memory=100, slots=4, queue=10)
    starved: list[str] = []
    scheduler.on_starved = lambda: starved.append("yes")
    first = Ticket(1, 30, serial="s")
    scheduler.enqueue(first)
    scheduler.keep(first)
    scheduler.leave(first)
    running, waiting = Ticket(2, 60), Ticket(3, 60)
    scheduler.enqueue(running)
    scheduler.enqueue(waiting)
    assert starved == []
    scheduler.leave(running)
    assert waiting.granted
