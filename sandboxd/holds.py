"""Who is in a session: whose calls and changes take turns in it, and who has it to himself.

A call is in a session from its acceptance until it has ended; so is whatever else makes a checkpoint. Each
has a hold on it (``CallSession``), and one at a time has its turn. Nobody removes a session that somebody is
in.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio

from sandboxd import errors
from sandboxd.session import CallSession
from sandboxd.workspace import tables
from sandboxd.workspace.turns import Turns

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Iterator

    from sandboxd.api.identity import Caller
    from sandboxd.checkouts import Checkouts
    from sandboxd.config import SessionShare
    from sandboxd.journal import Journal
    from sandboxd.keeping import Keeping
    from sandboxd.layers import Layers
    from sandboxd.workspace.checkout import Checkout
    from sandboxd.workspace.store import LayerStore
    from sandboxd.workspace.tables import Checkpoint, Row

__all__ = ["Holds"]

MOMENT = 3.0  # seconds that whoever is in a session for no call gets to end


class Holds:
    """For one event loop. What belongs to another caller is not found."""

    def __init__(
        self, journal: Journal, store: LayerStore, *, layers: Layers, checkouts: Checkouts, keeping: Keeping
    ) -> None:
        self._journal = journal
        self._store = store
        self._layers = layers
        self._checkouts = checkouts
        self._keeping = keeping
        self.turns = Turns()
        self._removing: set[str] = set()
        self._brief: dict[str, anyio.Event] = {}

    # Of calls.

    async def enter(self, caller: Caller, named: str, policy: str | None) -> CallSession:
        """A call's hold on a session, which lives on until the call has left it.

        ``policy`` is what the request names. Raises NotFound, NotPermitted.
        """
        row = await self.find(caller, named)
        if row.policy is not None and policy not in {None, row.policy}:
            raise errors.NotPermitted(
                f"calls in session {named!r} run under policy {row.policy!r}, and the request asks for "
                f"{policy!r}; leave it out, or take another session",
                policies=[row.policy],
            )
        if row.id in self._removing:
            raise errors.NotFound(f"no session {named!r} of yours")
        return self.of(row, caller.sessions, self._checkouts.of(row))

    def of(self, row: Row, share: SessionShare, checkout: Checkout | None) -> CallSession:
        """A hold on a session that was found just now; ``share`` is what its caller's sessions may hold."""
        self.turns.enter(row.id)
        return CallSession(
            row,
            share,
            journal=self._journal,
            store=self._store,
            turns=self.turns,
            held=self._layers.held,
            unwritten=self._layers.unwritten,
            kept=partial(self._layers.kept, lent=row.checkout is not None),
            keeping=self._keeping,
            checkout=checkout,
        )

    def wait(self, id_: str) -> None:
        """Keep a session for a call that waits since an earlier daemon, until ``let_go``."""
        self.turns.enter(id_)

    def let_go(self, id_: str) -> None:
        """The call has entered it, or never will."""
        self.turns.leave(id_)

    # Of whoever has one to himself.

    @asynccontextmanager
    async def alone(self, row: Row, *, removing: bool = False) -> AsyncIterator[None]:
        """For the time of a block nobody else is in a session. Raises SessionBusy.

        Whoever reads its files, or is in it ``briefly``, gets a moment to end. ``removing``: and nobody
        enters it meanwhile.
        """
        with anyio.move_on_after(MOMENT):
            if (over := self._brief.get(row.id)) is not None:
                await over.wait()
            if not self.turns.inside(row.id):
                await self.turns.unread(row.id)
        named, inside = row.name or row.id, self.turns.inside(row.id)
        if inside:
            raise errors.SessionBusy(
                f"{inside} calls run in session {named!r} or wait for it; wait for them, or cancel them",
                session=row.id,
                calls=inside,
            )
        if readers := self.turns.readers(row.id):
            raise errors.SessionBusy(
                f"files of session {named!r} are being read by {readers}; wait for them",
                session=row.id,
                calls=0,
            )
        self.turns.enter(row.id)
        if removing:
            self._removing.add(row.id)
        try:
            yield
        finally:
            self._removing.discard(row.id)
            self.turns.leave(row.id)

    @contextmanager
    def briefly(self, session: str) -> Iterator[None]:
        """What is done in this block is soon over: whoever wants the session to himself waits for that."""
        over = self._brief[session] = anyio.Event()
        try:
            yield
        finally:
            over.set()
            if self._brief.get(session) is over:
                del self._brief[session]

    # Which session that is.

    async def find(self, caller: Caller, named: str) -> Row:
        """A session by its id or name, an operator's of everybody's by its id. Raises NotFound."""

        def read(connection: sqlite3.Connection) -> Row | None:
            found = tables.find(connection, named, caller.uid)
            if found is None and caller.sees_all:
                found = tables.find(connection, named, None)
            return found

        row = await self._journal.read(read)
        if row is None or self.is_over(row):
            raise errors.NotFound(f"no session {named!r} of yours; `sandboxd session create` makes one")
        return row

    async def checkpoint(self, row: Row, named: str) -> Checkpoint:
        """A checkpoint of a session, by its id or digest. Raises NotFound."""
        found = await self._journal.read(lambda connection: tables.within(connection, row, named))
        if found is None:
            raise errors.NotFound(f"session {row.name or row.id!r} has no checkpoint {named!r}")
        return found

    def is_over(self, row: Row) -> bool:
        """Whether a session's time has passed, and nobody is in it or reads it."""
        if row.expires is None or row.expires > time.time_ns() // 1000:
            return False
        return not self.turns.inside(row.id) and not self.turns.readers(row.id)
