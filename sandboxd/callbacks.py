"""Tells callers that asked for it that their calls have ended: at least once, also across restarts.

Theory of operation.  What is to be told is on disk with the acceptance, with what became of it so far. A
caller's socket is told by a process of the caller's uid, which sends what is due to one caller
(``messenger``); a program of the operator's is run for one call at a time (``programs``). What could not be
told is tried again after pauses that double, and what was told when the daemon died is told again by the
next.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors, messenger, programs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd.api.identity import Caller
    from sandboxd.config import CallbackProgram
    from sandboxd.journal import Journal
    from sandboxd.journal.requests import Owed
    from sandboxd.models import Callback, Invocation, Outcome
    from sandboxd.programs import Confining

__all__ = ["Callbacks"]

PROGRAMS = 4  # at once
FIRST, LONGEST = 1.0, 300.0  # seconds between two tries
TRIES = 40
AT_ONCE = 64  # messages of one process
PROCESSES = 8  # at once, one for each caller
SECONDS = 10.0  # that a process may take beyond a second for each message

Who = tuple[int, int, tuple[int, ...], str | None]

log = structlog.get_logger("sandboxd.callbacks")


@dataclass
class _Due:
    """What is owed to a caller, and what it says."""

    owed: Owed
    line: str
    at: float
    tries: int

    @property
    def who(self) -> Who:
        """For whom it is told, and by which program: of one caller one at a time, whatever its groups."""
        owed = self.owed
        if owed.program is not None:
            return owed.uid, 0, (), owed.program
        return owed.uid, owed.gid, owed.groups, None


class Callbacks:
    """Keeps what is owed. For one event loop."""

    def __init__(
        self, journal: Journal, programs: Mapping[str, CallbackProgram], confining: Confining
    ) -> None:
        self._journal = journal
        self._programs = programs
        self._confining = confining
        self._owed: dict[str, Owed] = {}
        self._due: dict[str, _Due] = {}
        self._wake = anyio.Event()

    def check(self, caller: Caller, asked: Callback) -> None:
        """Raise NotPermitted for what is not the caller's, InvalidRequest for a program that is not there."""
        if asked.unix is not None and not caller.callback:
            raise errors.NotPermitted(
                "a callback is not yours to ask for; an operator grants it by `callback: true` of your entry "
                "in the configuration's `callers`",
                field="callback.unix",
            )
        if asked.exec is None:
            return
        if not caller.may_start(asked.exec):
            raise errors.NotPermitted(
                f"the program {asked.exec!r} is not yours to have started; an operator grants it by "
                "`callbacks` of your entry in the configuration's `callers`",
                field="callback.exec",
            )
        if asked.exec not in self._programs:
            named = ", ".join(name for name in sorted(self._programs) if caller.may_start(name))
            raise errors.InvalidRequest(
                f"the configuration's `callbacks` has no program {asked.exec!r}"
                + (f"; those of yours are {named}" if named else ""),
                field="callback.exec",
            )

    def owe(self, owed: Owed) -> None:
        """A call was accepted that has a callback."""
        self._owed[owed.id] = owed

    def ended(self, done: Invocation) -> None:
        """A call has its outcome, on disk."""
        owed = self._owed.pop(done.id, None)
        if owed is None or done.outcome is None:
            return
        said: dict[str, object] = {"id": done.id, "state": done.state, "cause": done.outcome.cause}
        if done.outcome.exit_code is not None:
            said["exit_code"] = done.outcome.exit_code
        if owed.program is not None:
            said |= _of_program(done, done.outcome)
        self._due[done.id] = _Due(owed, json.dumps(said) + "\n", time.monotonic(), owed.tries)
        self._wake.set()

    async def recover(self) -> None:
        """Take up what an earlier daemon owed, before calls are."""
        for owed in await self._journal.owed():
            self.owe(owed)
            try:
                found = await self._journal.get(owed.id) if owed.ended else None
            except errors.JournalCorrupt:  # one that cannot be read is no reason to serve nobody
                log.exception("a callback cannot be told", id=owed.id)
                continue
            if found is not None:
                self.ended(found)

    async def run(self) -> None:
        """Tell what is due, until cancelled: one caller does not wait for what another takes."""
        telling: set[Who] = set()
        sending, running = anyio.CapacityLimiter(PROCESSES), anyio.CapacityLimiter(PROGRAMS)
        async with anyio.create_task_group() as tasks:

            async def tell(who: Who, due: list[_Due]) -> None:
                try:
                    async with sending if who[-1] is None else running:
                        await (self._tell(due[:AT_ONCE]) if who[-1] is None else self._start(due[0]))
                finally:
                    telling.discard(who)
                    self._wake.set()

            while True:
                self._wake = anyio.Event()
                now, soonest = time.monotonic(), math.inf
                waiting: dict[Who, list[_Due]] = {}
                for each in self._due.values():
                    if each.at > now:
                        soonest = min(soonest, each.at)
                    elif each.who not in telling:
                        waiting.setdefault(each.who, []).append(each)
                for who, due in waiting.items():
                    telling.add(who)
                    tasks.start_soon(tell, who, due)
                with anyio.move_on_after(None if soonest == math.inf else soonest - now):
                    await self._wake.wait()

    async def _tell(self, due: list[_Due]) -> None:
        results = await anyio.to_thread.run_sync(_send, due, abandon_on_cancel=True)
        for each, failed in zip(due, results, strict=True):
            await self._note(each, failed)

    async def _start(self, due: _Due) -> None:
        name = due.owed.program or ""
        program = self._programs.get(name)
        if program is None:
            await self._note(due, f"the configuration's `callbacks` has no program {name!r}")
        else:
            await self._note(due, await programs.run(program, due.owed.id, due.line, self._confining))

    async def _note(self, each: _Due, failed: str | None) -> None:
        """Write down what became of a try."""
        each.tries += 1
        again = failed is not None and each.tries < TRIES
        if again:
            each.at = time.monotonic() + min(LONGEST, FIRST * 2 ** (each.tries - 1))
            log.info("a callback is tried again", id=each.owed.id, tries=each.tries, reason=failed)
        elif failed is not None:
            log.warning("a callback was given up", id=each.owed.id, reason=failed)
        try:
            done = None if again else time.time_ns() // 1000
            await self._journal.tried(each.owed.id, each.tries, done=done, problem=failed)
        except errors.SandboxdError as error:
            log.warning("what became of a callback is not written", id=each.owed.id, reason=str(error))
        if not again:
            self._due.pop(each.owed.id, None)


def _of_program(done: Invocation, outcome: Outcome) -> dict[str, object]:
    """What a program is told beside the end itself."""
    return {
        "outcome": outcome.model_dump(mode="json", exclude_none=True),
        "caller": done.caller.model_dump(mode="json", exclude_none=True),
        "policy": done.policy.name,
        "labels": done.labels,
        **({} if done.session is None else {"session": done.session}),
    }


def _send(due: list[_Due]) -> list[str | None]:
    """Start a process that sends these, all to one caller; for each None, or why it was not sent."""
    owed = due[0].owed
    asked = {
        "uid": owed.uid,
        "gid": owed.gid,
        "groups": list(owed.groups),
        "messages": [{"unix": each.owed.unix, "line": each.line} for each in due],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(messenger.__file__))],
            input=json.dumps(asked).encode() + b"\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS + len(due) * messenger.SECONDS,
            check=True,
            cwd="/",
            env={"LANG": "C.UTF-8"},
            start_new_session=True,
        )
        results = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [f"the process that tells it failed: {os.fsdecode(str(error))}"] * len(due)
    if not isinstance(results, list) or len(results) != len(due):
        return ["the process that tells it said something else"] * len(due)
    return [None if each is None else str(each) for each in results]
