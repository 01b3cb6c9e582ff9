"""The host that an inspected connection is to: what may be asked of it, and what is told of each request."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sandboxd.egress.upstream import Unreachable
from sandboxd.excerpt import excerpt
from sandboxd.httprule import HttpRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from sandboxd.egress.budget import Budget
    from sandboxd.egress.streams import Broken
    from sandboxd.reach import Decision, Reach

__all__ = [
    "HOP_BY_HOP",
    "MAX_SIGNED",
    "TOO_LONG_TO_SIGN",
    "Exchange",
    "Refused",
    "Site",
    "exchange_of",
    "head_of",
    "needs_digest",
    "not_reached",
    "without_hops",
]

Headers = list[tuple[bytes, bytes]]
Verdict = Literal["allowed", "denied", "failed", "limit"]

HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings", b"expect", b"alt-svc"}
)  # fmt: skip
"""RFC 9110, section 7.6.1: what is said to the next hop, and goes no further; and other ways to it."""
MAX_OFFERS = 20
MAX_PATH = 2048
MAX_WHY = 1024
MAX_SIGNED = 8 * 2**20  # bytes of a body that is read before it is sent
TOO_LONG_TO_SIGN = f"a body of more than {MAX_SIGNED} bytes cannot be signed anew"


class Refused(Exception):
    """Raised for a request that is not made; ``status`` and ``why`` are the answer to it."""

    def __init__(self, status: int, verdict: Verdict, why: str, rule: str | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.verdict = verdict
        self.why = excerpt(why, MAX_WHY)
        self.rule = rule


@dataclass
class Exchange:
    """One request and its answer, as they go."""

    method: str
    path: str
    protocol: str
    begun: float = field(default_factory=time.monotonic)
    rule: str | None = None
    status: int = 0
    sent: int = 0
    """Bytes of the request's body."""
    received: int = 0
    """Bytes of the answer's body."""
    secrets: tuple[str, ...] = ()
    """Name and version of each that was put into the request."""
    told: bool = False


class Site:
    """``name`` and ``port`` are what the container connected to; ``tell`` takes each exchange in the end."""

    def __init__(
        self,
        name: str,
        port: int,
        scheme: Literal["http", "https"],
        *,
        reach: Reach,
        budget: Budget,
        ask: Callable[[Exchange, Decision], Awaitable[Decision]],
        inject: Callable[[Decision, HttpRequest, str | None], tuple[Headers, tuple[str, ...]]],
        tell: Callable[[Exchange, Verdict, str], None],
    ) -> None:
        """``ask`` gives the answer to what a decision leaves open, some time. ``inject`` gives the headers
        that a request goes out with, for a decision, and the secrets in them; it raises Refused.
        """
        self.name = name
        self.port = port
        self.scheme: Literal["http", "https"] = scheme
        self._reach = reach
        self._budget = budget
        self._ask = ask
        self._inject = inject
        self._tell = tell
        self._authorities = {f"{name}:{port}", f"{name}.:{port}"}
        if self.authority == name.encode():
            self._authorities |= {name, f"{name}."}

    @property
    def authority(self) -> bytes:
        """As a request names it."""
        default = 80 if self.scheme == "http" else 443
        return (self.name if self.port == default else f"{self.name}:{self.port}").encode()

    def check_authority(self, authority: bytes) -> None:
        """Raise Refused for a request that is of another host than the connection."""
        if authority.decode("latin-1").lower() not in self._authorities:
            said = excerpt(authority.decode("latin-1"), 255)
            raise Refused(
                421, "denied", f"the request is of {said!r}, and the connection to {self.name}:{self.port}"
            )

    def judge(self, request: HttpRequest, exchange: Exchange) -> Decision:
        """What the rules say of a request. Raises Refused where they do not allow it.

        What ``asks`` goes on to ``ask`` before it is dressed.
        """
        decision = self._reach.request(self.name, self.port, request)
        exchange.rule = decision.where
        if not decision.allowed:
            raise Refused(403, "denied", decision.why, decision.where)
        return decision

    async def ask(self, exchange: Exchange, decision: Decision) -> Decision:
        """Wait for somebody to allow a request. Raises Refused where they do not."""
        answer = await self._ask(exchange, decision)
        if not answer.allowed:
            raise Refused(403, "denied", answer.why, answer.where)
        return answer

    def dress(
        self, request: HttpRequest, exchange: Exchange, decision: Decision, body_digest: str | None = None
    ) -> Headers:
        """The headers that an allowed request goes out with, with what is put into it. Raises Refused.

        ``body_digest``: the SHA-256 of its body in hex, where that is known.
        """
        if (limit := self._budget.request()) is not None:
            raise Refused(429, "limit", f"network.budget.{limit} is used up")
        if not decision.injections:
            return list(request.headers)
        if request.method in ("TRACE", "TRACK"):
            why = f"{request.method} has the server say back what is put into the request"
            raise Refused(405, "denied", why, decision.where)
        if self.scheme == "http" and any(each.over_tls for each in decision.injections):
            why = "a secret goes over TLS alone, unless its rule says plain: true; ask for https"
            raise Refused(403, "denied", why, decision.where)
        headers, exchange.secrets = self._inject(decision, request, body_digest)
        return headers

    def tell(self, exchange: Exchange, verdict: Verdict, why: str = "") -> None:
        """An exchange is over; told once."""
        if not exchange.told:
            exchange.told = True
            self._tell(exchange, verdict, why)

    def explain(self, refused: Refused) -> tuple[Headers, bytes]:
        """The answer to a request that is not made: its headers, and a problem (RFC 9457)."""
        body: dict[str, object] = {
            "type": "about:blank",
            "title": "refused by the sandbox" if refused.verdict == "denied" else "not done by the sandbox",
            "status": refused.status,
            "detail": refused.why,
            "verdict": refused.verdict,
            "rule": refused.rule,
        }
        if refused.verdict == "denied":
            body["allowed"] = self._reach.offers(self.name, self.port)[:MAX_OFFERS]
        data = json.dumps(body).encode() + b"\n"
        headers = [
            (b"server", b"sandboxd"),
            (b"content-type", b"application/problem+json"),
            (b"cache-control", b"no-store"),
            (b"content-length", str(len(data)).encode()),
        ]
        return headers, data


def without_hops(
    headers: Iterable[tuple[bytes, bytes]], keep: frozenset[bytes] = frozenset()
) -> list[tuple[bytes, bytes]]:
    """Headers, in lower case, without what is said to the next hop alone."""
    listed = list(headers)
    said = (value for name, value in listed if name == b"connection")
    named = {token.strip().lower() for value in said for token in value.split(b",")}
    dropped = (HOP_BY_HOP | named) - {b"host", b"content-length"} - keep
    return [(name, value) for name, value in listed if name not in dropped]


def head_of(
    method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], *, websocket: bool
) -> HttpRequest:
    """A request, without what is said to the next hop alone."""
    return HttpRequest(method.decode("latin-1"), target, tuple(without_hops(headers)), websocket)


def not_reached(error: Broken | Unreachable) -> Refused:
    """The answer to a request whose server cannot be connected to."""
    rule = error.refused if isinstance(error, Unreachable) else None
    if rule is not None:
        return Refused(403, "denied", str(error), rule.where)
    return Refused(502, "failed", str(error))


def needs_digest(request: HttpRequest, decision: Decision) -> bool:
    """Whether what is put into a request depends on its body, which has to be read first."""
    if not any(injection.secret_key for injection in decision.injections):
        return False
    return not any(name == b"x-amz-content-sha256" for name, _ in request.headers)


def exchange_of(request: HttpRequest, protocol: str) -> Exchange:
    """What is told of a request, before it is."""
    path = excerpt(request.path.decode(errors="replace"), MAX_PATH)
    return Exchange(excerpt(request.method, 32), path, protocol)
