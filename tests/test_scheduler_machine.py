"""The queue against a model of it, with the journal that it is in: who goes next, what a restart keeps."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from invocations import call, ended

from sandboxd import errors, models
from sandboxd.journal import Accepted, Journal, outcome_header
from sandboxd.journal.requests import Open, describe
from sandboxd.scheduler import Scheduler, Ticket

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

MEMORY, SLOTS, CPUS, QUEUE = 100, 3, 4000, 12
WEIGHTS = {1: 1, 2: 1, 3: 2, 4: 1}
CONCURRENT = {1: None, 2: None, 3: None, 4: 1}
"""Of each caller."""
REQUEST = models.Request(argv=["true"])


@dataclass
class Waiting:
    """A call as the model has it."""

    invocation: models.Invocation
    uid: int
    ticket: Ticket
    accepted: int
    """Its place in the order of all acceptances."""
    attempts: int = 0
    resting: bool = False


class QueueMachine(RuleBasedStateMachine):
    """Acceptances, ends and restarts; what the scheduler grants is judged by the model when it does."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="sandboxd-queue-"))
        self.starts = 0
        self.calls: dict[str, Waiting] = {}
        self.done: set[str] = set()
        self.number = 0
        self.granted: list[str] = []
        self.since: dict[tuple[int, int], Counter[int]] = {}
        """Starts of two callers since both have calls that could start."""
        self.pressed = False

    # The daemon's part: what ``calls`` and ``recovery`` do with the queue and the journal.

    @initialize()
    def open(self) -> None:
        self._portal = start_blocking_portal()
        self.portal = self._portal.__enter__()
        self.serve()

    def serve(self) -> None:
        self._opened: AbstractContextManager[Journal] = self.portal.wrap_async_context_manager(
            Journal.open(self.directory / str(self.starts))
        )
        self.journal = self._opened.__enter__()
        self.scheduler = Scheduler(memory=MEMORY, slots=SLOTS, queue=QUEUE, cpus=CPUS)
        self.scheduler.pressed = lambda: self.pressed
        self.since.clear()

    def ticket(self, id_: str, row: Open) -> Ticket:
        return Ticket(
            row.uid,
            row.memory,
            cpus=row.cpus,
            priority=row.priority,
            serial=row.serial,
            concurrent=CONCURRENT[row.uid],
            weight=WEIGHTS[row.uid],
            on_grant=partial(self.on_grant, id_),
        )

    def on_grant(self, id_: str) -> None:
        """The scheduler gave a turn: within its caller, nobody was before it."""
        this = self.calls[id_]
        for other in self.calls.values():
            if other.uid == this.uid and other.ticket.state == "waiting":
                mine, theirs = ((-one.ticket.priority, one.ticket.order) for one in (this, other))
                assert mine < theirs, "within a caller, by priority and then as they came"
        self.granted.append(id_)

    def enqueue(self, tickets: list[Ticket]) -> None:
        async def all_of_them() -> None:
            if len(tickets) == 1:
                self.scheduler.enqueue(tickets[0])
                return
            with self.scheduler.paused():
                for ticket in tickets:
                    self.scheduler.enqueue(ticket)

        self.portal.call(all_of_them)
        self.settle()

    def settle(self) -> None:
        """What follows a turn in the daemon: it is on disk that the call may have started."""
        for id_ in self.granted:
            one = self.calls[id_]
            one.attempts, one.resting = one.attempts + 1, False
            self.portal.call(self.journal.started, id_, one.attempts)
            for pair, starts in self.since.items():
                if one.uid in pair:
                    starts[one.uid] += 1
        self.granted.clear()
        self.judge_fairness()

    def judge_fairness(self) -> None:
        """Of two callers who could both go on all the time, none is ahead by more than a call."""
        ready = {one.uid for one in self.calls.values() if one.ticket.state == "waiting"}
        able = {uid for uid in ready if CONCURRENT[uid] is None}
        for pair in itertools.combinations(sorted(WEIGHTS), 2):
            if not able.issuperset(pair):
                self.since.pop(pair, None)
                continue
            starts = self.since.setdefault(pair, Counter())
            got, another = ((starts[uid] / WEIGHTS[uid], 1 / WEIGHTS[uid]) for uid in pair)
            assert abs(got[0] - another[0]) <= got[1] + another[1], (pair, starts)

    @rule(
        uid=st.sampled_from(sorted(WEIGHTS)),
        memory=st.sampled_from([10, 40, 100, 150]),
        cpus=st.sampled_from([0, 1000, 4000]),
        priority=st.integers(-1, 1),
        serial=st.sampled_from([None, None, "s", "t"]),
    )
    def accept(self, uid: int, memory: int, cpus: int, priority: int, serial: str | None) -> None:
        waiting = [one for one in self.calls.values() if one.ticket.state in {"waiting", "blocked"}]
        refused: dict[str, object] = {}
        try:
            self.scheduler.check_room(uid)
        except errors.QueueFull as full:
            refused = full.details
        if refused:
            assert waiting, "there is room in an empty queue"
            assert refused["queued"] == len(waiting)
            assert refused["yours"] == sum(one.uid == uid for one in waiting)
            return
        assert len(waiting) < QUEUE
        invocation = call(uid=uid)
        asked = describe(REQUEST)
        row = Open(
            invocation.id, uid, groups=json.dumps([uid]), tied=0, memory=memory, cpus=cpus,
            priority=priority, serial=serial, known=1,
        )  # fmt: skip
        self.number += 1
        ticket = self.ticket(invocation.id, row)
        self.calls[invocation.id] = Waiting(invocation, uid, ticket, self.number)
        assert self.portal.call(self.journal.accept, Accepted(invocation, asked.digest, asked, row)) is None
        self.enqueue([ticket])

    def pick(self, states: set[str], number: int) -> str | None:
        fits = sorted(id_ for id_, one in self.calls.items() if one.ticket.state in states)
        return fits[number % len(fits)] if fits else None

    @rule(number=st.integers(0, 30))
    def finish(self, number: int) -> None:
        id_ = self.pick({"running"}, number)
        if id_ is not None:
            self.end(id_, models.Cause.EXITED)

    @rule(number=st.integers(0, 30))
    def cancel(self, number: int) -> None:
        id_ = self.pick({"running", "waiting", "blocked", "resting"}, number)
        if id_ is not None:
            self.end(id_, models.Cause.CANCELLED)

    def end(self, id_: str, cause: models.Cause) -> None:
        one = self.calls.pop(id_)
        done = ended(one.invocation, cause)
        self.portal.call(self.journal.ended, done, outcome_header(done))
        self.done.add(id_)
        self.portal.call(self._leave, one.ticket)
        self.portal.call(self._leave, one.ticket)  # it is safe to call twice
        self.settle()

    async def _leave(self, ticket: Ticket) -> None:
        self.scheduler.leave(ticket)

    @rule(number=st.integers(0, 30))
    def rest(self, number: int) -> None:
        """An attempt has ended, and another follows."""
        id_ = self.pick({"running"}, number)
        if id_ is None:
            return
        one = self.calls[id_]
        one.resting = True
        one.invocation = one.invocation.model_copy(
            update={"state": models.State.QUEUED, "attempts": one.attempts}
        )
        self.portal.call(self._rest, one)
        self.settle()

    async def _rest(self, one: Waiting) -> None:
        self.journal.follow(one.invocation, memory=one.ticket.memory)
        self.scheduler.rest(one.ticket)

    @rule(number=st.integers(0, 30))
    def again(self, number: int) -> None:
        id_ = self.pick({"resting"}, number)
        if id_ is not None:
            self.enqueue([self.calls[id_].ticket])

    @precondition(lambda self: hasattr(self, "scheduler"))
    @rule(pressed=st.booleans())
    def press(self, *, pressed: bool) -> None:
        self.pressed = pressed
        self.portal.call(self._look)
        self.settle()

    async def _look(self) -> None:
        self.scheduler._look_again()

    @rule(killed=st.booleans())
    def restart(self, *, killed: bool) -> None:
        """Go on with what the journal has: what may have run has ended, all else waits as it waited."""
        if killed:
            after = self.directory / str(self.starts + 1)
            after.mkdir(mode=0o700)
            for path in (self.directory / str(self.starts)).iterdir():
                if path.is_file() and not path.name.endswith("-shm"):
                    shutil.copy2(path, after / path.name)
            self.starts += 1
        self._opened.__exit__(None, None, None)
        self.serve()
        rows = self.portal.call(self.journal.open_calls)
        assert {row.id for row in rows} == self.calls.keys()
        before = {id_: one.ticket for id_, one in self.calls.items()}
        for row in rows:
            self.calls[row.id].ticket = self.ticket(row.id, row)
        tickets = []
        for row in rows:
            one, was = self.calls[row.id], before[row.id]
            assert (row.uid, row.started, bool(row.resting)) == (one.uid, one.attempts, one.resting)
            assert (row.memory, row.cpus, row.priority, row.serial) == (
                was.memory, was.cpus, was.priority, was.serial,
            )  # fmt: skip
            if row.started and not row.resting:
                self.end(row.id, models.Cause.FAILED)
                continue
            tickets.append(one.ticket)
        numbers = [self.calls[row.id].accepted for row in rows if row.id in self.calls]
        assert numbers == sorted(numbers), "in the order of their acceptance"
        if tickets:
            self.enqueue(tickets)

    @invariant()
    def budgets_are_kept_and_nobody_waits_for_nothing(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running = [one for one in self.calls.values() if one.ticket.granted]
        waiting = [one for one in self.calls.values() if one.ticket.state == "waiting"]
        blocked = [one for one in self.calls.values() if one.ticket.state == "blocked"]
        queue = self.scheduler
        assert (queue.running, queue.queued) == (len(running), len(waiting) + len(blocked))
        assert queue.memory_used == sum(one.ticket.memory for one in running)
        assert queue.cpus_used == sum(one.ticket.cpus for one in running)
        assert len(running) <= SLOTS
        assert len(running) <= 1 or (queue.memory_used <= MEMORY and queue.cpus_used <= CPUS)
        for uid, most in CONCURRENT.items():
            assert most is None or sum(one.uid == uid for one in running) <= most
        for serial in ("s", "t"):
            of_it = [one for one in self.calls.values() if one.ticket.serial == serial]
            live = [one for one in of_it if one.ticket.state in {"running", "waiting", "resting"}]
            assert len(live) <= 1, "of a series one has its turn"
            assert live or not of_it, "and one of them does"
        able = [one for one in waiting if sum(each.uid == one.uid for each in running) < (
            CONCURRENT[one.uid] or SLOTS)]  # fmt: skip
        if able and not running:
            pytest.fail("nothing runs, and one may always run")
        if able and not self.pressed and len(running) < SLOTS:
            fit = [
                queue.memory_used + one.ticket.memory <= MEMORY and queue.cpus_used + one.ticket.cpus <= CPUS
                for one in able
            ]
            assert not all(fit), "there is room for whoever is next"

    @invariant()
    def the_journal_has_the_same(self) -> None:
        if not hasattr(self, "journal"):
            return
        assert {row.id for row in self.portal.call(self.journal.open_calls)} == self.calls.keys()
        assert (report := self.portal.call(self.journal.verify)).ok
        assert report.records == len(self.done)

    def teardown(self) -> None:
        try:
            if hasattr(self, "journal"):
                self.everybody_comes_to_an_end()
                self._opened.__exit__(None, None, None)
                self._portal.__exit__(None, None, None)
        finally:
            shutil.rmtree(self.directory)

    def everybody_comes_to_an_end(self) -> None:
        self.pressed = False
        while self.calls:
            id_ = self.pick({"running"}, 0) or self.pick({"resting"}, 0)
            assert id_ is not None, "nobody waits for ever"
            self.end(id_, models.Cause.EXITED)


TestQueue = QueueMachine.TestCase
EXAMPLES = max(8, int(os.environ.get("SANDBOXD_HYPOTHESIS_EXAMPLES", "0")) // 10)
TestQueue.settings = settings(deadline=None, max_examples=EXAMPLES, stateful_step_count=40)
