"""What becomes of the requests between both ends of an HTTP/2 connection: each goes on, or ends, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from h2.errors import ErrorCodes

from sandboxd.egress.site import MAX_SIGNED, Refused

if TYPE_CHECKING:
    from anyio.abc import TaskGroup
    from h2.events import DataReceived

    from sandboxd.egress.http2end import End
    from sandboxd.egress.http2pair import Pair
    from sandboxd.egress.site import Site, Verdict

__all__ = ["Requests"]

READ_WHOLE = 4 * MAX_SIGNED  # bytes of bodies that are read before they are sent, of all streams at once
TOO_MUCH_TO_SIGN = f"the bodies of requests on one connection that are signed anew have {READ_WHOLE} bytes"
LINGER_SECONDS = 1.0


class Requests:
    """Those of one connection of a program, whose end ``client`` is."""

    def __init__(self, client: End, site: Site) -> None:
        self.client = client
        self.server: End | None = None
        """The other end, as long as there is one."""
        self.tasks: TaskGroup | None = None
        self._site = site
        self.pairs: dict[int, Pair] = {}
        """By the program's stream."""
        self.made: dict[int, Pair] = {}
        """The same by the server's, once they have one."""
        self.waiting: dict[int, Pair] = {}
        """Those that are to have one."""

    def on_data(self, end: End, pair: Pair | None, event: DataReceived, *, out: bool) -> None:
        """Bytes of a body came."""
        flow = None if pair is None else pair.out if out else pair.back
        if pair is None or flow is None or flow.over or (out and pair.refused):
            end.acknowledge(event.flow_controlled_length, event.stream_id)
            return
        end.acknowledge(event.flow_controlled_length - len(event.data), event.stream_id)
        if out:
            pair.came += len(event.data)
        if out and pair.undecided is not None:
            pair.undecided.put(event.data)
            if pair.out.paid and sum(each.out.paid for each in self.pairs.values()) > READ_WHOLE:
                self.refuse(pair, Refused(429, "limit", TOO_MUCH_TO_SIGN))
        else:
            flow.put(event.data)

    def on_over(self, pair: Pair) -> None:
        """All of a direction of a request has gone on, or none of it will any more."""
        if pair.back.over and (pair.out.over or pair.refused):
            self._forget(pair)
            if not pair.asked and self.tasks is not None:
                self.tasks.start_soon(self._stop, pair.ours)
            self._tell(pair, "allowed")

    async def _stop(self, stream: int) -> None:
        """Have the program send no more of a request that was answered.

        Not at once: there are some, curl 7.88 too, that take a reset while they send for a failure, and do
        not look at the answer before it.
        """
        await anyio.sleep(LINGER_SECONDS)
        self.client.reset(stream, ErrorCodes.NO_ERROR)

    def end_out(self, pair: Pair) -> None:
        """The server has answered, and takes no more of the request."""
        pair.out.drop()
        self.on_over(pair)

    def give_up(self, pair: Pair, why: str, code: int) -> None:
        """End a request on both sides."""
        self._tell(pair, "failed", why)
        pair.out.drop()
        pair.back.drop()
        if self.server is not None:
            self.server.reset(pair.theirs, code)
        self.client.reset(pair.ours, code)
        self._forget(pair)

    def _forget(self, pair: Pair) -> None:
        pair.decided()
        self.pairs.pop(pair.ours, None)
        self.waiting.pop(pair.ours, None)
        self.made.pop(pair.theirs, None)

    def fail(self, pair: Pair, why: str) -> None:
        """The server does not do it: say why where nothing was said yet."""
        if pair.answering:
            self.give_up(pair, why, ErrorCodes.INTERNAL_ERROR)
            return
        if self.server is not None:
            self.server.reset(pair.theirs, ErrorCodes.CANCEL)
        self.refuse(pair, Refused(502, "failed", why))

    def refuse_waiting(self, refused: Refused) -> None:
        """Those that no server has got."""
        for pair in list(self.waiting.values()):
            self.refuse(pair, refused)

    def refuse(self, pair: Pair, refused: Refused) -> None:
        """Say why a request is not made."""
        self._tell(pair, refused.verdict, refused.why)
        pair.decided()
        pair.out.drop()
        pair.back.source = None
        self.waiting.pop(pair.ours, None)
        self.made.pop(pair.theirs, None)
        pair.refused = pair.answering = True
        if not self.client.http.is_open(pair.ours):
            pair.back.drop()
            self._forget(pair)
            return
        headers, body = self._site.explain(refused)
        self.client.say(pair.ours, [(b":status", str(refused.status).encode()), *headers], last=False)
        pair.back.put(b"" if pair.exchange.method == "HEAD" else body, last=True)
        self.client.add(pair.back)

    def _tell(self, pair: Pair, verdict: Verdict, why: str = "") -> None:
        if not pair.exchange.told:
            pair.exchange.sent, pair.exchange.received = pair.out.moved, pair.back.moved
            self._site.tell(pair.exchange, verdict, why)

    def tell_all(self, verdict: Verdict, why: str) -> None:
        """Of all that nothing was told of yet."""
        for pair in self.pairs.values():
            self._tell(pair, verdict, why)
