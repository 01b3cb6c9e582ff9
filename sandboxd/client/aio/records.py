"""The part of ``AsyncClient`` that is about what is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.aio.exchanges import Exchanges
from sandboxd.client.aio.stream import AsyncStream, decoded
from sandboxd.client.calls import records

if TYPE_CHECKING:
    from typing import Unpack

    from sandboxd import models
    from sandboxd.client.calls.records import SearchFields

__all__ = ["Records"]


class Records(Exchanges):
    """What is recorded of calls: found again, run again, removed."""

    async def search(self, q: str = "", **fields: Unpack[SearchFields]) -> models.SearchResults:
        """A page of ended calls whose command or output fits. Raises InvalidRequest."""
        return await self._do(records.search(q, **fields))

    async def lineage(self, digest: str) -> models.Lineage:
        """Which calls released a file of this digest, and what they were made of. Raises NotFound."""
        return await self._do(records.lineage(digest))

    async def replay(self, id: str, *, policy: str | None = None) -> models.Replay:  # noqa: A002
        """Run an ended call again and compare; under the policy of its record, or another one."""
        return await self._do(records.replay(id, policy))

    async def replay_session(
        self, session: str, *, policy: str | None = None, keep: bool = False
    ) -> AsyncStream[models.ReplayEvent]:
        """Run the calls of a session again in a fresh one, and compare each as it ends.

        The last event has ``ended``. With ``keep`` the fresh session stays. Raises NotFound, StateConflict,
        Pruned.
        """
        answer = await self._open(records.replay_session(session, policy, keep=keep))
        return AsyncStream(answer, decoded(answer, records.replay_event))

    async def prune(self, *, age: int | None = None, size: int | None = None) -> models.Pruning:
        """Remove bodies, output and artifacts older than ``age`` (µs) or beyond ``size`` bytes, now."""
        return await self._do(records.prune(age, size))
