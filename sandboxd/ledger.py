"""Every call that there is, in flight or finished, as its caller may see it.

A call in flight is in memory, a finished one in the journal and its spool, and one whose outcome could not
be written yet in between; all are read through the same methods. What belongs to somebody else is not
found, unless an operator asks.
"""

# ruff: noqa: A002  -- `id` is the field's name on the wire

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import anyio

from sandboxd import errors
from sandboxd.call import Call
from sandboxd.journal.spool import Spool
from sandboxd.models import Event, InvocationList

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from sandboxd.api.identity import Caller
    from sandboxd.blobs import BlobStore
    from sandboxd.journal import Journal
    from sandboxd.models import Artifact, Cause, Content, Invocation, State

__all__ = ["Ledger", "streams_of"]

LIST_LIMIT = 500
CHUNK = 256 * 1024  # bytes of an artifact that are read at once


class Ledger:
    """Reads calls. ``spools`` is the directory of their output and events."""

    def __init__(self, *, spools: Path, journal: Journal, blobs: BlobStore) -> None:
        spools.mkdir(mode=0o700, exist_ok=True)
        self._spools = spools
        self._journal = journal
        self._blobs = blobs
        self._flying: dict[str, Call] = {}
        self._unrecorded: dict[str, Invocation] = {}

    @property
    def in_flight(self) -> tuple[str, ...]:
        """Ids of the calls that have no outcome yet."""
        return tuple(self._flying)

    async def _find(self, caller: Caller, id: str) -> Call | Invocation:
        call = self._flying.get(id)
        found: Call | Invocation | None = call or self._unrecorded.get(id) or await self._journal.get(id)
        shown = found.invocation if isinstance(found, Call) else found
        if found is None or shown is None or not (caller.sees_all or shown.caller.uid == caller.uid):
            raise errors.NotFound(f"no call {id!r} of yours")
        return found

    async def _spool(self, caller: Caller, id: str) -> Spool:
        found = await self._find(caller, id)
        if isinstance(found, Call):
            return found.spool
        directory = self._spools / found.id
        if _was_silent(found) and not directory.is_dir():
            return Spool.held(_events_of(found))
        return Spool.open(directory)

    async def get(self, caller: Caller, id: str) -> Invocation:
        """One call, its streams' heads included. Raises NotFound."""
        found = await self._find(caller, id)
        if isinstance(found, Call):
            return found.invocation.model_copy(update=streams_of(found.spool))
        directory = self._spools / found.id
        if directory.is_dir():
            return found.model_copy(update=streams_of(Spool.open(directory)))
        return found

    async def wait(self, caller: Caller, id: str) -> Invocation:
        """The call once it has ended. Raises NotFound."""
        found = await self._find(caller, id)
        if not isinstance(found, Call):
            return await self.get(caller, id)
        await found.ended.wait()
        return found.invocation

    async def list(
        self,
        caller: Caller,
        *,
        policy: str | None,
        cause: Cause | None,
        state: State | None,
        label: Mapping[str, str],
        before: str | None,
        limit: int,
    ) -> InvocationList:
        """A page of calls, newest first, without their output."""
        fitting = partial(
            self._journal.list,
            uid=None if caller.sees_all else caller.uid,
            policy=policy,
            cause=cause,
            state=state,
            labels=label,
        )
        found = await fitting(before=before, limit=min(limit, LIST_LIMIT))
        # A page may be short because its calls are large, so its length does not say whether it is the last.
        more = bool(found) and bool(await fitting(before=found[-1].id, limit=1))
        shown = [
            self._flying[item.id].invocation
            if item.id in self._flying
            else self._unrecorded.get(item.id, item)
            for item in found
        ]
        return InvocationList(invocations=shown, next=found[-1].id if more else None)

    async def events(self, caller: Caller, id: str, *, after: int, follow: bool) -> AsyncIterator[Event]:
        """Events from number ``after`` on, with or without waiting for those to come. Raises NotFound."""
        spool = await self._spool(caller, id)
        async for event in spool.follow(after, wait=follow):
            yield event

    async def stream(
        self, caller: Caller, id: str, name: Literal["stdout", "stderr"], *, offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        """The raw bytes of a stream. Raises NotFound."""
        spool = await self._spool(caller, id)
        async for chunk in spool.follow_bytes(name, offset, wait=follow):
            yield chunk

    async def artifact(self, caller: Caller, id: str, path: str) -> tuple[Artifact, AsyncIterator[bytes]]:
        """A released file by its path as listed, and its bytes. Raises NotFound."""
        found = await self._find(caller, id)
        invocation = found.invocation if isinstance(found, Call) else found
        for artifact in invocation.artifacts:
            if artifact.path == path:
                return artifact, _chunks(self._blobs.path(artifact.digest))
        raise errors.NotFound(f"call {id!r} released no file {path!r}")


def streams_of(spool: Spool) -> dict[str, Content]:
    """The fields of an invocation that its spool has."""
    return {"stdout": spool.content("stdout"), "stderr": spool.content("stderr")}


def _was_silent(invocation: Invocation) -> bool:
    """Whether an ended call wrote nothing that was stored, and so made no files."""
    streams = (invocation.stdout, invocation.stderr)
    return all(stream is not None and stream.size == 0 for stream in streams)


def _events_of(invocation: Invocation) -> list[Event]:
    """The events of an ended call without output, as they were told while it ran."""
    times = invocation.times
    events = [Event(seq=0, at=times.accepted, type="accepted", id=invocation.id)]
    if times.started is not None:
        events.append(Event(seq=0, at=times.started, type="started"))
    events += [Event(seq=0, at=0, type="denied", denial=denial) for denial in invocation.denials]
    events += [Event(seq=0, at=0, type="limit", limit=limit) for limit in invocation.limits_reached]
    events.append(Event(seq=0, at=times.ended or 0, type="ended", invocation=invocation))
    return [event.model_copy(update={"seq": number}) for number, event in enumerate(events, 1)]


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        while data := await file.read(CHUNK):
            yield data
