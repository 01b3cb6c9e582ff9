"""A request of HTTP/2 that cannot be made yet: somebody has to allow it, or all of its body to be there.

Meanwhile its body comes as far as bounds let it, and no other stream waits for any of this: what came is
acknowledged for the connection, and for its own stream only when it goes on, or is wanted whole.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import anyio

from sandboxd.egress.sigv4 import EMPTY
from sandboxd.egress.site import MAX_SIGNED, TOO_LONG_TO_SIGN, Refused

if TYPE_CHECKING:
    from sandboxd.egress.http2end import Flow
    from sandboxd.egress.site import Exchange, Site
    from sandboxd.reach import Decision

__all__ = ["Undecided"]


class Undecided:
    """Of the request whose body is ``body``. Cancelling ``scope`` is the end of it."""

    def __init__(self, exchange: Exchange, body: Flow, site: Site, *, asks: bool, reads: bool) -> None:
        """``asks``: somebody has to allow it; ``reads``: its body has to be known."""
        self.scope = anyio.CancelScope()
        self._exchange = exchange
        self._body = body
        self._site = site
        self._asking = asks
        self.reads = reads
        self._changed = anyio.Event()

    def put(self, data: bytes) -> None:
        """More of the body."""
        if self._asking:
            self._body.put_early(data)
        else:
            self._body.put_paid(data)
            self.changed()

    def changed(self) -> None:
        """There is more of the body, or an end of it."""
        self._changed.set()
        self._changed = anyio.Event()

    async def answer(self, decision: Decision) -> Decision:
        """What somebody says, where they have to. Raises Refused."""
        if self._asking:
            decision = await self._site.ask(self._exchange, decision)
            self._asking = False
        return decision

    async def digest(self) -> str | None:
        """The SHA-256 of the body in hex, where it has to be known, or is. Raises Refused."""
        body = self._body
        if self.reads:
            body.pay()
            while not body.ended and len(body.data) <= MAX_SIGNED:
                await self._changed.wait()
            if len(body.data) > MAX_SIGNED:
                raise Refused(413, "denied", TOO_LONG_TO_SIGN)
            return hashlib.sha256(body.data).hexdigest()
        return EMPTY if body.ended and not body.data else None
