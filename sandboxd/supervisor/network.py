"""The network of one call: served from hand-over to the end, and what is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.models import Denial, Event, LimitReached, NetworkUse
from sandboxd.network.questions import nobody

if TYPE_CHECKING:
    from sandboxd.engine.base import Slot
    from sandboxd.journal.spool import Spool
    from sandboxd.models import NetworkEvent
    from sandboxd.network.entrance import Entrance, Entrances
    from sandboxd.network.gateway import Gateway
    from sandboxd.network.questions import Answer, Decide, Question
    from sandboxd.reach import NetworkRules
    from sandboxd.session import CallSession
    from sandboxd.supervisor.kept import Kept
    from sandboxd.supervisor.secrets import CallSecrets

__all__ = ["CallNetwork"]


KINDS = {"dns": "name", "http": "request", "https": "request"}


class CallNetwork:
    """Of the call ``id`` of the caller ``uid``; its events go to ``spool``.

    ``session``: where the call has its turn. ``decide``: who answers what the rules leave open, without
    secrets in what is asked.
    """

    def __init__(
        self,
        gateway: Gateway,
        entrances: Entrances,
        id: str,  # noqa: A002
        uid: int,
        spool: Spool,
        *,
        secrets: CallSecrets,
        session: CallSession | None = None,
        decide: Decide = nobody,
    ) -> None:
        self._gateway = gateway
        self._entrances = entrances
        self._id = id
        self._uid = uid
        self._spool = spool
        self._secrets = secrets
        self._session = session
        self._asked = decide
        self._served = self._ending = self._inhabited = False
        self._given: set[tuple[str, int]] = set()
        """Names and versions of the secrets that requests may have been given."""
        self.entrance: Entrance | None = None
        """The way to the servers inside, where the policy exposes ports."""
        self._lasting: Entrance | None = None
        """The one of a container that is kept."""
        self.fault: errors.AttemptFailed | None = None
        """Why not all that happened is among the events."""

    async def begin(self, slot: Slot, kept: Kept | None = None) -> None:
        """Have the connections of a slot served, and let its caller in, as far as the policy says so.

        Whoever has the session is let into a container that is ``kept`` until that ends. Raises HostFailed,
        EngineFailed.
        """
        self._inhabited = slot.shape.kept
        if slot.shape.expose:
            self.entrance = self._entrances.enter(self._id, self._uid, slot, self._on_event)
        if self._session is not None:
            session, way = self._session.row.id, self.entrance
            if kept is not None and way is not None:
                if kept.way is None:
                    kept.way = self._entrances.enter(session, self._uid, slot, self._on_event)
                way = self._lasting = kept.way
                way.tell(self._on_event)
            self._entrances.sessions[session] = way
        if slot.doors is not None:
            given = self._secrets.proxied
            self._given = {(name, version) for name, (version, _) in given.items()}
            self._secrets.on_rotated(self._on_rotated)
            left = await self._left(slot)
            try:
                await self._gateway.serve(
                    self._id, self._uid, slot, self._on_event, given, left=left, decide=self._decide
                )
            except errors.HostFailed:
                if self._session is not None:
                    self._session.used_network(NetworkUse())
                raise
            self._served = True
            now = self._secrets.proxied  # what changed while it was handed over
            if stale := {name: now.get(name) for name in given if now.get(name) != given[name]}:
                self._gateway.renew(self._id, stale)

    async def begin_end(self) -> None:
        """Cut what is left; ``end`` waits for that, and something else can be done first."""
        if self._lasting is not None:
            self._lasting.tell(None)
        elif self._session is not None and self.entrance is self._entrances.sessions.get(
            self._session.row.id
        ):
            self._entrances.sessions.pop(self._session.row.id, None)
        if self.entrance is not None:
            await self.entrance.begin_end()
        if self._served and not self._ending:
            self._ending = True
            await self._gateway.begin_end(self._id, inhabited=self._inhabited)

    async def end(self) -> NetworkUse:
        """Cut what is left; the sum. Safe to call twice."""
        await self.begin_end()
        if self.entrance is not None:
            await self.entrance.end()
        if not self._served:
            return NetworkUse()
        self._served = False
        use = await self._gateway.end(self._id)
        if self._session is not None:
            self._session.used_network(use)
        return use

    async def _left(self, slot: Slot) -> dict[str, int]:
        """What the budget of all calls of its session has left, which is held for it from now on."""
        rules = slot.shape.network
        if self._session is None or rules is None:
            return {}
        return await self._session.hold_network(dict(rules.budget))

    async def _decide(self, question: Question) -> Answer:
        return await self._asked(self._secrets.question(question))

    def _on_rotated(self, name: str, version: int | None, value: bytes) -> None:
        if version is not None:
            self._given.add((name, version))
        self._gateway.renew(self._id, {name: None if version is None else (version, value)})

    def _on_event(self, event: NetworkEvent) -> None:
        # who says so may be anybody
        known = {f"{name}@{version}": (name, version) for name, version in self._given}
        given = [use for use in event.secrets if use in known]
        for use in given:
            name, version = known[use]
            self._secrets.note_use(name, "proxy", version)
        event = self._secrets.event(event.model_copy(update={"secrets": given}))
        try:
            self._spool.add(Event(seq=0, at=0, type="network", network=event))
        except errors.AttemptFailed as error:
            self.fault = error


def denials(use: NetworkUse) -> list[Denial]:
    """What was refused, as denials."""
    return [
        Denial(
            kind=KINDS.get(refusal.protocol, "connection"),
            name=refusal.target if not refusal.port else _endpoint(refusal.target, refusal.port),
            count=refusal.count,
            detail=refusal.why,
            rule=refusal.rule or "",
        )
        for refusal in use.refusals
    ]


def limits(use: NetworkUse, rules: NetworkRules | None) -> list[LimitReached]:
    """The budgets that were reached; none of them ends a call."""
    budget = {} if rules is None else dict(rules.budget)
    return [LimitReached(limit=f"network.budget.{name}", value=budget.get(name, 0)) for name in use.limits]


def _endpoint(target: str, port: int) -> str:
    return f"[{target}]:{port}" if ":" in target else f"{target}:{port}"
