"""Running all calls of a session again, in their order, in a fresh session.

Theory of operation.  The fresh session is a fork of the recorded one at the checkpoint that the first call
began with that is kept and whose body is there. Each call finds what those before it have left *now*. Where
the recorded session was rolled back, so is this one; where its files were changed from outside, by what no
call did, the line goes on in a fork at the recorded checkpoint, and that is said. A call that cannot be run
is told as such, and the line goes on from the next checkpoint that is kept.
"""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

import anyio
import structlog

from sandboxd import errors, models
from sandboxd.journal.sessioncalls import SessionCall, calls_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sandboxd.api.identity import Caller
    from sandboxd.journal import Journal
    from sandboxd.sessions import Sessions

__all__ = ["KEPT", "Line", "line_of", "replayed"]

KEPT = 24 * 3600 * 10**6
"""Microseconds after which a session of a replay goes that a killed daemon left."""

log = structlog.get_logger("sandboxd.replay")


class Reruns(Protocol):
    """Who runs one call again."""

    async def get(self, caller: Caller, id: str) -> models.Invocation:  # noqa: A002
        """The recorded one."""
        ...

    async def rerun(
        self, caller: Caller, recorded: models.Invocation, policy: str | None, session: str | None
    ) -> models.Replay:
        """Run it, and compare."""
        ...


class Line:
    """What is to be run: the session, its calls from the first that can be, and why others are not."""

    def __init__(self, session: str, calls: list[SessionCall], skipped: list[models.ReplayedCall]) -> None:
        self.session = session
        self.calls = calls
        self.skipped = skipped


async def line_of(journal: Journal, sessions: Sessions, caller: Caller, named: str) -> Line:
    """The line of a session. Raises NotFound, StateConflict where no call ended in it, Pruned."""
    info = await sessions.get(caller, named)
    found: list[SessionCall] = []
    above: int | None = 0
    while above is not None:
        read = partial(calls_of, session=info.id, above=above)
        part, above = await journal.read(read)
        found += part
    ran = [number for number, one in enumerate(found) if one.before is not None]
    if not ran:
        raise errors.StateConflict(f"no call has ended in session {named!r}; there is nothing to run again")
    pruned = [number for number in ran if found[number].pruned]
    start = pruned[-1] + 1 if pruned else 0
    while start < len(found) and not await sessions.keeps(info.id, found[start].before):
        start += 1
    if start == len(found) and pruned:
        last = found[pruned[-1]].id
        raise errors.Pruned(
            f"what was asked for call {last!r} and those before it was removed by retention, and no later "
            f"checkpoint of session {named!r} is kept; there is nothing to begin with",
            session=info.id,
            call=last,
        )
    if start == len(found):
        raise errors.NotFound(f"no checkpoint is kept that a call of session {named!r} began with")
    skipped = [
        models.ReplayedCall(recorded=one.id, skipped=_why(one, later=number < (pruned[-1] if pruned else -1)))
        for number, one in enumerate(found[:start])
    ]
    return Line(info.id, found[start:], skipped)


def _why(call: SessionCall, *, later: bool) -> str:
    if call.before is None:
        return "it had no turn in the session"
    if call.pruned:
        return "what was asked was removed by retention"
    return (
        "a later call was removed by retention" if later else "the checkpoint that it began with is not kept"
    )


async def replayed(
    service: Reruns, sessions: Sessions, caller: Caller, line: Line, *, policy: str | None, keep: bool
) -> AsyncGenerator[models.ReplayEvent]:
    """What came of each call, as it ends, and of all in the end. Raises nothing of a single call."""
    one = _Replay(service, sessions, caller, line, policy=policy, keep=keep)
    try:
        for each in line.skipped:
            yield one.count(each)
        for call in line.calls:
            yield one.count(await one.run(call))
        one.is_whole = True
        yield models.ReplayEvent(ended=one.summary())
    finally:
        with anyio.CancelScope(shield=True):
            await one.close()


def _problem(error: errors.SandboxdError) -> models.Problem:
    status = error.status if isinstance(error, errors.Refused) else 500
    return models.Problem(title=HTTPStatus(status).phrase, status=status, code=error.code, detail=str(error))


class _Replay:
    def __init__(
        self,
        service: Reruns,
        sessions: Sessions,
        caller: Caller,
        line: Line,
        *,
        policy: str | None,
        keep: bool,
    ) -> None:
        self._service = service
        self._sessions = sessions
        self._caller = caller
        self._line = line
        self._policy = policy
        self._keep = keep
        self.is_whole = False
        self._made: list[str] = []
        """The sessions that it ran in, the newest last."""
        self._known: dict[str, str] = {}
        """Digests of recorded checkpoints, and what is in their place."""
        self._at = ""
        self._counts = {"same": 0, "differing": 0, "skipped": 0, "failed": 0}
        self._not_captured: dict[str, None] = {}

    def count(self, one: models.ReplayedCall) -> models.ReplayEvent:
        """One more that is told."""
        if one.replay is not None:
            self._counts["differing" if one.replay.differs else "same"] += 1
            self._not_captured |= dict.fromkeys(one.replay.not_captured)
        else:
            self._counts["skipped" if one.skipped is not None else "failed"] += 1
        return models.ReplayEvent(call=one)

    async def run(self, call: SessionCall) -> models.ReplayedCall:
        """Run one call where the line stands, or has to go."""
        if call.before is None:
            return models.ReplayedCall(recorded=call.id, skipped="it had no turn in the session")
        try:
            recorded = await self._service.get(self._caller, call.id)
            session, moved = await self._stand(call.before)
            replay = await self._service.rerun(self._caller, recorded, self._policy, session)
        except errors.SandboxdError as error:
            return models.ReplayedCall(recorded=call.id, problem=_problem(error))
        replay.not_captured += [moved] if moved else []
        self._at = replay.replayed.checkpoint_after or self._at
        self._known[call.after or call.before] = self._at
        return models.ReplayedCall(recorded=call.id, replay=replay)

    async def _stand(self, before: str) -> tuple[str, str | None]:
        """The session, as it stands before a call; and what is not captured of how it came there."""
        known = self._known.get(before)
        if known is None:
            fork = models.SessionFork(
                checkpoint=before, policy=self._policy, ttl=None if self._keep else KEPT
            )
            await self._sessions.check(self._caller, self._line.session, before)
            made = await self._sessions.fork(self._caller, self._line.session, fork)
            first = not self._made
            self._made.append(made.id)
            self._known, self._at = {before: made.head.digest}, made.head.digest
            return made.id, None if first else (
                "the files before this call: they were changed by no call that ran again, so they are those "
                "of the recorded checkpoint"
            )
        if known != self._at:
            await self._sessions.rollback(self._caller, self._made[-1], known)
            self._at = known
        return self._made[-1], None

    def summary(self) -> models.SessionReplay:
        """What came of all."""
        return models.SessionReplay(
            recorded=self._line.session,
            kept=list(self._made) if self._keep else [],
            not_captured=list(self._not_captured),
            **self._counts,
        )

    async def close(self) -> None:
        """Remove the sessions that it ran in, unless they are to be kept."""
        if self._keep and self.is_whole:
            return
        for session in self._made:
            try:
                await self._sessions.delete(self._caller, session)
            except errors.SandboxdError as error:  # its time ends it
                log.warning("session of a replay not removed", id=session, reason=str(error))
