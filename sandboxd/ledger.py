"""Every call that there is, in flight or finished, as its caller may see it.

A call in flight is in memory, a finished one in the journal and its spool, and one whose outcome could not
be written yet in between; all are read through the same methods. What belongs to somebody else is not
found, unless an operator asks.
"""

# ruff: noqa: A002  -- `id` is the field's name on the wire

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread

from sandboxd import canonical, errors, units
from sandboxd.call import Call
from sandboxd.contents import Contents
from sandboxd.digests import Digests
from sandboxd.journal.following import HEAD
from sandboxd.journal.output import sync_directory
from sandboxd.journal.spool import Spool, Stream
from sandboxd.models import Event, InvocationList, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from pathlib import Path

    from sandboxd.api.identity import Caller
    from sandboxd.blobs import BlobStore
    from sandboxd.journal import Journal
    from sandboxd.models import Artifact, CallbackState, Cause, Content, Invocation
    from sandboxd.scheduler import Ticket

__all__ = ["Ledger", "finish", "recovered", "retried_events", "streams_of", "unrecorded"]

LIST_LIMIT = 500
LATER = "the daemon stops, and the call waits for its next start; ask again then"


def unrecorded(reason: str | None) -> str:
    """What is said of a call that has ended, and of which nobody is told how until that is on disk."""
    return f"the call has ended, but how could not be recorded yet: {reason}; ask for it again"


class Ledger:
    """Reads calls. ``spools`` is the directory of their output and events."""

    def __init__(self, *, spools: Path, journal: Journal, blobs: BlobStore) -> None:
        spools.mkdir(mode=0o700, exist_ok=True)
        sync_directory(spools.parent)  # whose sync a spool's own does not include
        self._spools = spools
        self._journal = journal
        self._blobs = blobs
        self.digests = Digests()
        """Of large files that were read once."""
        self._contents = Contents(self.digests)
        self._flying: dict[str, Call] = {}
        self._dormant: dict[str, Ticket] = {}
        """Calls that wait since before this daemon's start, of which nothing else is in memory."""
        self.draining = False
        self._later: set[str] = set()
        """Ids of calls that were put away, for the next daemon."""
        self._unrecorded: dict[str, str] = {}
        """Calls that no task has and whose outcomes are not on disk yet, and why."""
        self._closing = anyio.Lock()

    @property
    def in_flight(self) -> tuple[str, ...]:
        """Ids of the calls that have no outcome yet."""
        return tuple(self._flying)

    async def released(self, digests: Collection[str]) -> set[str]:
        """Those of these blobs that calls in flight have released, and no record names yet."""
        return {digest for call in self._flying.values() for digest in call.released} & set(digests)

    async def _wake(self, id: str) -> None:
        """Make a dormant call one in flight, or end it. Whoever makes calls dormant says how."""

    async def _find(self, caller: Caller, id: str) -> Call | Invocation:
        asleep = self._dormant.get(id)
        if asleep is not None and (caller.sees_all or asleep.uid == caller.uid):
            if self.draining:
                raise errors.Draining(
                    "the daemon stops, and the call waits for its next start; ask again then"
                )
            await self._wake(id)
        if id in self._later:
            raise errors.Draining(LATER)
        call = self._flying.get(id)
        found: Call | Invocation | None = call or await self._journal.get(id)
        shown = found.invocation if isinstance(found, Call) else found
        if found is None or shown is None or not (caller.sees_all or shown.caller.uid == caller.uid):
            raise errors.NotFound(f"no call {id!r} of yours")
        if id in self._unrecorded:
            raise errors.HostFailed(unrecorded(self._unrecorded[id]), id=id)
        return found

    async def _spool(self, caller: Caller, id: str) -> Spool:
        found = await self._find(caller, id)
        if isinstance(found, Call):
            return found.spool
        _still_kept(found)
        if _was_silent(found) and not (self._spools / found.id).is_dir():
            return Spool.held(_events_of(found))
        return await self._closed_spool(found)

    async def _closed_spool(self, done: Invocation) -> Spool:
        """The spool of an ended call, closed here if the daemon that ran it died before it could."""
        directory = self._spools / done.id
        spool = Spool.open(directory)
        if spool.complete or done.state is not State.ENDED:
            return spool
        async with self._closing:
            try:
                return await anyio.to_thread.run_sync(_finished, directory, done)
            except errors.HostFailed:  # the disk is full: what is there can be read all the same
                return spool

    async def get(self, caller: Caller, id: str) -> Invocation:
        """One call, its streams' heads included. Raises NotFound."""
        found = await self._find(caller, id)
        if isinstance(found, Call):
            return found.invocation.model_copy(update=streams_of(found.spool))
        if found.pruned is None and (self._spools / found.id).is_dir():
            shown = streams_of(await self._closed_spool(found))
            if found.state is State.ENDED:  # else it is of an earlier attempt, and more may have come since
                _check_heads(found, shown)
            return found.model_copy(update=shown)
        return found

    async def wait(self, caller: Caller, id: str) -> Invocation:
        """The call once it has ended.

        Raises NotFound; Draining when a later daemon runs it; HostFailed when the outcome is not on disk yet.
        """
        found = await self._find(caller, id)
        if not isinstance(found, Call):
            return await self.get(caller, id)
        await found.answered.wait()
        if found.shelved:
            raise errors.Draining(LATER)
        if not found.ended.is_set():
            raise errors.HostFailed(unrecorded(found.unrecorded), id=id)
        return found.invocation

    async def list(
        self,
        caller: Caller,
        *,
        policy: str | None,
        cause: Cause | None,
        state: State | None,
        key: str | None = None,
        label: Mapping[str, str],
        before: str | None,
        limit: int,
    ) -> InvocationList:
        """A page of calls, newest first, without their output; with a ``key``, of the caller's own alone."""
        if key is None and state is not None and state is not State.ENDED:
            # what has not ended is in memory, and the journal does not follow each of its steps
            flying = (call.invocation for call in self._flying.values())
            fits = [
                one
                for one in flying
                if one.state is state
                and (caller.sees_all or one.caller.uid == caller.uid)
                and policy in {None, one.policy.name}
                and cause is None
                and label.items() <= one.labels.items()
                and (before is None or one.id < before)
            ]
            if state is State.QUEUED and cause is None:
                fits += await self._asleep(caller, policy=policy, label=label, before=before)
            fits.sort(key=lambda one: one.id, reverse=True)
            page = fits[: min(limit, LIST_LIMIT)]
            return InvocationList(invocations=page, next=page[-1].id if len(page) < len(fits) else None)
        fitting = partial(
            self._journal.list,
            uid=None if caller.sees_all and key is None else caller.uid,
            policy=policy,
            cause=cause,
            state=state,
            key=key,
            labels=label,
        )
        found = await fitting(before=before, limit=min(limit, LIST_LIMIT))
        # A page may be short because its calls are large, so its length does not say whether it is the last.
        more = bool(found) and bool(await fitting(before=found[-1].id, limit=1))
        shown = [self._now(item) for item in found]
        if cause is not None or state is State.ENDED:  # an outcome is told when it is on disk
            shown = [one for one in shown if one.state is State.ENDED]
        return InvocationList(invocations=shown, next=found[-1].id if more else None)

    async def _asleep(
        self, caller: Caller, *, policy: str | None, label: Mapping[str, str], before: str | None
    ) -> Sequence[Invocation]:
        """The newest dormant calls that fit, one more than a page has."""
        found: Sequence[Invocation] = []
        for name in sorted(self._dormant, reverse=True):
            uid = self._dormant[name].uid if name in self._dormant else None
            if len(found) > LIST_LIMIT or not (caller.sees_all or uid == caller.uid):
                continue
            one = None if before is not None and name >= before else await self._journal.get(name)
            if one is not None and policy in {None, one.policy.name} and label.items() <= one.labels.items():
                found = [*found, one.model_copy(update={"state": State.QUEUED})]
        return found

    def _now(self, item: Invocation) -> Invocation:
        """An invocation of the journal as it is now."""
        if item.id in self._flying:
            return self._flying[item.id].invocation
        if item.id in self._dormant:
            return item.model_copy(update={"state": State.QUEUED})
        if item.id in self._unrecorded:
            return item.model_copy(update={"state": State.COLLECTING, "outcome": None})
        return item

    async def callback(self, caller: Caller, id: str) -> CallbackState:
        """What became of a call's callback. Raises NotFound, also where it has none."""
        found = await self._find(caller, id)
        shown = found.invocation if isinstance(found, Call) else found
        state = await self._journal.callback(shown.id)
        if state is None:
            raise errors.NotFound(
                f"call {id!r} has no callback, or retention has removed what was known of it"
            )
        return state

    async def readable(self, caller: Caller, id: str) -> None:
        """Raise NotFound, or Pruned where its output and events were removed."""
        await self._spool(caller, id)

    async def events(self, caller: Caller, id: str, *, after: int, follow: bool) -> AsyncIterator[Event]:
        """Events from number ``after`` on, with or without waiting for those to come. Raises NotFound.

        Of a call that was pruned there is ``ended`` alone; who wants all or none asks ``readable`` before.
        """
        try:
            spool = await self._spool(caller, id)
        except errors.Pruned:
            done = await self.get(caller, id)
            yield Event(seq=max(0, after) + 1, at=done.times.ended or 0, type="ended", invocation=done)
            return
        async for event in spool.follow(after, wait=follow):
            yield event

    async def stream(
        self,
        caller: Caller,
        id: str,
        name: Literal["stdout", "stderr"],
        *,
        offset: int,
        length: int | None = None,
        follow: bool,
    ) -> AsyncIterator[bytes]:
        """The raw bytes of a stream; of an ended call no more than ``length``.

        Raises NotFound, InvalidRequest; of an ended call JournalCorrupt.
        """
        spool = await self._spool(caller, id)
        found = await self._find(caller, id)
        ended = not isinstance(found, Call) and found.state is State.ENDED
        recorded = getattr(found, name) if ended else None
        if recorded is None or not spool.complete or offset < 0:
            pieces = spool.follow_bytes(name, offset, wait=follow)
        elif not recorded.size:
            return
        else:
            path, of = self._spools / id / name, f"the {name} of call {id},"
            pieces = self._contents.read(
                path, recorded.digest, recorded.size, what=of, start=offset, length=length
            )
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def artifact(self, caller: Caller, id: str, path: str) -> Artifact:
        """A released file by its path as listed. Raises NotFound."""
        found = await self._find(caller, id)
        invocation = found.invocation if isinstance(found, Call) else found
        _still_kept(invocation)
        for artifact in invocation.artifacts:
            if artifact.path == path:
                return artifact
        raise errors.NotFound(f"call {id!r} released no file {path!r}")

    def blob(self, digest: str, size: int, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """Bytes of a released file, of which the whole has ``size``; as ``Contents.read``."""
        path = self._blobs.path(digest)
        return self._contents.read(path, digest, size, what="the content", start=start, length=length)


def _still_kept(invocation: Invocation) -> None:
    """Raise Pruned for a call of which only the record is left."""
    if invocation.pruned is not None:
        raise errors.Pruned(
            f"the output and the artifacts of call {invocation.id!r} were removed by retention; "
            "its record has their digests",
            pruned=invocation.pruned,
        )


def streams_of(spool: Spool) -> dict[str, Content]:
    """The fields of an invocation that its spool has."""
    return {"stdout": spool.content("stdout"), "stderr": spool.content("stderr")}


def _check_heads(done: Invocation, shown: Mapping[str, Content]) -> None:
    """Raise JournalCorrupt where a stream that is told as a whole is not the one that was recorded."""
    for name, content in shown.items():
        recorded = getattr(done, name)
        if recorded is None or recorded.size > HEAD or (not recorded.size and not content.size):
            continue
        data = content.decode()
        if canonical.digest_bytes(data) != recorded.digest:
            raise errors.JournalCorrupt(
                f"the {name} of call {done.id}, {recorded.digest}, is damaged: of its {recorded.size} bytes "
                f"{len(data)} are there, or others",
                digest=recorded.digest,
            )


def recovered(directory: Path) -> Spool:
    """The spool that an earlier daemon left of a call; without a directory it had no output. Blocks."""
    caps: dict[Stream, int] = {"stdout": units.MAX, "stderr": units.MAX}
    return Spool.recover(directory, caps) if directory.is_dir() else Spool.held([])


def finish(spool: Spool, done: Invocation, *, durable: bool) -> None:
    """Say ``ended`` and close, unless that was done. Blocks. Raises HostFailed, closed all the same."""
    if spool.closed:
        return
    try:
        spool.add(Event(seq=0, at=done.times.ended or 0, type="ended", invocation=done))
    finally:
        spool.close(durable=durable)


def _finished(directory: Path, done: Invocation) -> Spool:
    spool = recovered(directory)
    finish(spool, done, durable=True)
    return spool


def _was_silent(invocation: Invocation) -> bool:
    """Whether an ended call wrote nothing that was stored, and so made no files."""
    streams = (invocation.stdout, invocation.stderr)
    return all(stream is not None and stream.size == 0 for stream in streams)


def retried_events(invocation: Invocation) -> list[Event]:
    """What was told of the attempts before the last, their output and their network aside."""
    events = []
    for each in invocation.retried:
        if each.started is not None:
            events.append(Event(seq=0, at=each.started, type="started"))
        events += [Event(seq=0, at=0, type="denied", denial=denial) for denial in each.denials]
        events += [Event(seq=0, at=0, type="limit", limit=limit) for limit in each.limits_reached]
        events.append(Event(seq=0, at=each.ended, type="retry", retry=each))
    return events


def _events_of(invocation: Invocation) -> list[Event]:
    """The events of an ended call without output, as they were told while it ran."""
    times = invocation.times
    events = [Event(seq=0, at=times.accepted, type="accepted", id=invocation.id)]
    events += retried_events(invocation)
    if times.started is not None:
        events.append(Event(seq=0, at=times.started, type="started"))
    events += [Event(seq=0, at=0, type="denied", denial=denial) for denial in invocation.denials]
    events += [Event(seq=0, at=0, type="limit", limit=limit) for limit in invocation.limits_reached]
    events.append(Event(seq=0, at=times.ended or 0, type="ended", invocation=invocation))
    return [event.model_copy(update={"seq": number}) for number, event in enumerate(events, 1)]
