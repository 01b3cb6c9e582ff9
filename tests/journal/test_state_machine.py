"""The journal against a model of it: what is accepted, ended, asked for twice, killed and started again."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from invocations import call, ended

from sandboxd import canonical, errors, models
from sandboxd.journal import Accepted, Existing, Journal, outcome_header
from sandboxd.journal.records import body

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")
REQUESTS = [canonical.digest_bytes(name) for name in (b"one", b"another")]
UIDS = st.integers(1, 3)
KEYS = st.one_of(st.none(), st.sampled_from("abc"))


@dataclass
class Model:
    """What a journal has to have."""

    calls: dict[str, models.Invocation] = field(default_factory=dict)
    keys: dict[tuple[int, str], tuple[str, str]] = field(default_factory=dict)
    chain: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    @property
    def open(self) -> list[str]:
        return sorted(id_ for id_, one in self.calls.items() if one.outcome is None)


class JournalMachine(RuleBasedStateMachine):
    """Steps a caller and a daemon can take; after each of them the journal is compared with the model."""

    calls: Bundle[str] = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="sandboxd-journal-"))
        self.state = self.directory / "0"
        self.starts = 0
        self.model = Model()

    def do(self, what: Coroutine[None, None, T]) -> T:
        return self.loop.run_until_complete(what)

    @initialize()
    def open(self) -> None:
        self.journal = Journal.open(self.state)
        self.do(self.journal.__aenter__())

    @rule(target=calls, uid=UIDS, key=KEYS, request=st.sampled_from(REQUESTS))
    def accept(self, uid: int, key: str | None, request: str) -> str:
        invocation = call(uid=uid, key=key)
        known = self.model.keys.get((uid, key)) if key is not None else None
        try:
            found = self.do(self.journal.accept(Accepted(invocation, request)))
        except errors.KeyConflict as conflict:
            assert known is not None
            assert known[1] != request
            found = Existing(conflict.details["id"], known[1])
        if known is not None:
            assert found is not None
            assert (found.id, found.request_digest) == known
            return known[0]
        assert found is None
        self.model.calls[invocation.id] = invocation
        if key is not None:
            self.model.keys[uid, key] = invocation.id, request
        return invocation.id

    @rule(id_=calls, attempts=st.integers(1, 3))
    def start(self, id_: str, attempts: int) -> None:
        known = self.model.calls[id_]
        changed = known.model_copy(update={"state": models.State.RUNNING, "attempts": attempts})
        self.journal.follow(changed)
        if known.outcome is None:
            self.model.calls[id_] = changed

    @rule(id_=calls, cause=st.sampled_from(models.Cause), text=st.text(max_size=20))
    def end(self, id_: str, cause: models.Cause, text: str) -> None:
        done = ended(self.model.calls[id_], cause, text)
        known = self.model.calls[id_]
        if known.outcome is not None and body(done) == body(known):  # the same, as after a sync that failed
            head = self.do(self.journal.ended(done, outcome_header(done)))
            assert str(head) == self.model.heads[-1]
            return
        if known.outcome is not None:
            with pytest.raises(errors.StateConflict):
                self.do(self.journal.ended(done, outcome_header(done)))
            return
        head = self.do(self.journal.ended(done, outcome_header(done)))
        self.model.calls[id_] = done
        self.model.chain.append(id_)
        self.model.heads.append(str(head))
        assert head.n == len(self.model.chain)

    @rule(id_=consumes(calls), uid=UIDS)
    def end_what_is_not_there(self, id_: str, uid: int) -> None:
        stranger = ended(call(uid=uid))
        with pytest.raises(errors.NotFound):
            self.do(self.journal.ended(stranger, outcome_header(stranger)))

    @rule()
    def restart(self) -> None:
        self.do(self.journal.__aexit__(None, None, None))
        self.open()

    @rule()
    def kill(self) -> None:
        """Go on from the files as they are now, which is what a process that is killed leaves."""
        self.starts += 1
        new = self.directory / str(self.starts)
        new.mkdir(mode=0o700)
        for path in self.state.iterdir():
            if path.is_file() and not path.name.endswith("-shm"):
                shutil.copy2(path, new / path.name)
        self.do(self.journal.__aexit__(None, None, None))
        self.state = new
        self.open()

    @rule(uid=UIDS, key=st.sampled_from("abc"))
    def find(self, uid: int, key: str) -> None:
        found = self.do(self.journal.find_key(uid, key))
        known = self.model.keys.get((uid, key))
        assert (None if found is None else (found.id, found.request_digest)) == known

    @rule(uid=st.one_of(st.none(), UIDS), cause=st.one_of(st.none(), st.sampled_from(models.Cause)))
    def filtered(self, uid: int | None, cause: models.Cause | None) -> None:
        found = self.do(self.journal.list(uid=uid, cause=cause, limit=500))
        fits = [
            one.id
            for one in self.model.calls.values()
            if uid in {None, one.caller.uid}
            and (cause is None or (one.outcome is not None and one.outcome.cause is cause))
        ]
        assert [one.id for one in found] == sorted(fits, reverse=True)

    @invariant()
    def it_has_what_the_model_has(self) -> None:
        if not hasattr(self, "journal"):
            return
        report = self.do(self.journal.verify(self.model.heads[-1] if self.model.heads else None))
        assert report.ok, report.problem
        assert report.records == len(self.model.chain)
        assert [one.id for one in self.do(self.journal.in_flight())] == self.model.open
        for id_, known in self.model.calls.items():
            found = self.do(self.journal.get(id_))
            assert found is not None
            assert (found.state, found.outcome, found.attempts) == (
                known.state,
                known.outcome,
                known.attempts,
            )

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.do(self.journal.__aexit__(None, None, None))
        self.do(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.directory)


TestJournal = JournalMachine.TestCase
EXAMPLES = max(8, int(os.environ.get("SANDBOXD_HYPOTHESIS_EXAMPLES", "0")) // 10)
TestJournal.settings = settings(deadline=None, max_examples=EXAMPLES, stateful_step_count=30)
