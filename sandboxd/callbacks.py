"""Tells callers that asked for it that their calls have ended: at least once, also across restarts.

Theory of operation.  What is to be told is on disk with the acceptance, and goes when it was told, or given
up. The task that tells it starts a process of the caller's uid for what is due to one caller (``messenger``);
what could not be told is tried again after pauses that double.
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

from sandboxd import errors, messenger

if TYPE_CHECKING:
    from sandboxd.journal import Journal
    from sandboxd.journal.requests import Owed
    from sandboxd.models import Invocation

__all__ = ["Callbacks"]

FIRST, LONGEST = 1.0, 300.0  # seconds between two tries
TRIES = 40
AT_ONCE = 64  # messages of one process
PROCESSES = 8  # at once, one for each caller
SECONDS = 10.0  # that a process may take beyond a second for each message

Who = tuple[int, int, tuple[int, ...]]

log = structlog.get_logger("sandboxd.callbacks")


@dataclass
class _Due:
    """What is owed to a caller, and what it says."""

    owed: Owed
    line: str
    at: float
    tries: int = 0

    @property
    def who(self) -> Who:
        """Whose process tells it."""
        return self.owed.uid, self.owed.gid, self.owed.groups


class Callbacks:
    """Keeps what is owed. For one event loop."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._owed: dict[str, Owed] = {}
        self._due: dict[str, _Due] = {}
        self._wake = anyio.Event()

    def owe(self, owed: Owed) -> None:
        """A call was accepted that has a callback."""
        self._owed[owed.id] = owed

    def ended(self, done: Invocation) -> None:
        """A call has its outcome, on disk."""
        owed = self._owed.pop(done.id, None)
        if owed is None or done.outcome is None:
            return
        said = {"id": done.id, "state": done.state, "cause": done.outcome.cause}
        if done.outcome.exit_code is not None:
            said["exit_code"] = done.outcome.exit_code  # type: ignore[assignment]
        self._due[done.id] = _Due(owed, json.dumps(said) + "\n", time.monotonic())
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
        limit = anyio.CapacityLimiter(PROCESSES)
        async with anyio.create_task_group() as tasks:

            async def tell(who: Who, due: list[_Due]) -> None:
                try:
                    async with limit:
                        await self._tell(due)
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
                    tasks.start_soon(tell, who, due[:AT_ONCE])
                with anyio.move_on_after(None if soonest == math.inf else soonest - now):
                    await self._wake.wait()

    async def _tell(self, due: list[_Due]) -> None:
        results = await anyio.to_thread.run_sync(_send, due, abandon_on_cancel=True)
        for each, failed in zip(due, results, strict=True):
            each.tries += 1
            if failed is not None and each.tries < TRIES:
                each.at = time.monotonic() + min(LONGEST, FIRST * 2 ** (each.tries - 1))
                continue
            if failed is not None:
                log.warning("a callback was given up", id=each.owed.id, reason=failed)
            try:
                await self._journal.told(each.owed.id)
            except errors.SandboxdError as error:
                log.warning("a callback will be told again", id=each.owed.id, reason=str(error))
            self._due.pop(each.owed.id, None)


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
