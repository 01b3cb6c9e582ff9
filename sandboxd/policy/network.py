"""The network section of a policy: names, addresses, ports and what may be said over them.

It is parsed and validated in full; what of it this release does not enforce, ``checks`` refuses. What the
rules come to is in ``reach``, and what they say of HTTP in ``httprule``.
"""

from __future__ import annotations

import ipaddress
import re
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sandboxd import errors, units
from sandboxd.httprule import SECRET, path_pattern
from sandboxd.policy.quantities import Rate, Size  # noqa: TC001, pydantic reads it at run time
from sandboxd.policy.section import Section
from sandboxd.reach import inside

__all__ = ["Budget", "Denied", "Inject", "Network", "Rule", "SessionBudget"]

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_TOKEN = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$"  # noqa: S105, RFC 9110's token, not a credential


def _host(value: str) -> str:
    name = value.lower().removesuffix(".")
    if not name.isascii():
        raise ValueError(f"{value!r} is not ASCII; write an international name in its xn-- form")
    labels = name.removeprefix("*.").split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{value!r} is not a host name; write one such as example.org or '*.example.org'")
    if labels[-1].isdigit():
        raise ValueError(f"{value!r} is an address; write it as cidr")
    return name


def _cidr(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        raise ValueError(f"{error}; write a network such as 192.0.2.0/24") from None


def _within(network: str, most: str) -> bool:
    return inside(ipaddress.ip_network(network), ipaddress.ip_network(most))


def _path(value: str) -> str:
    if not value.startswith("/") or not value.isprintable() or set(value) & set(" %#\\"):
        raise ValueError(
            f"{value!r} is not a path, with no escapes and no query; write a glob such as /repos/**"
        )
    try:
        path_pattern(value)
    except errors.InvalidRequest:
        raise ValueError(
            f"{value!r} can match no path: it has an empty component, '.' or '..', an empty set, more than "
            "64 components or four times '**'; write a glob such as /repos/**"
        ) from None
    return value


def _header_value(value: str) -> str:
    if not value.isprintable() or not value.isascii():
        raise ValueError("a header's value is of printable ASCII")
    if value.count("{secret:") != len(SECRET.findall(value)):
        raise ValueError("write a secret in a header as {secret:NAME}, with its name as under secrets")
    return value


_FRAMING = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "te", "upgrade", "trailer", "keep-alive",
     "proxy-connection", "expect"}
)  # fmt: skip
SecretName = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,127}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
HeaderName = Annotated[str, Field(pattern=_TOKEN)]
HeaderValue = Annotated[str, AfterValidator(_header_value), Field(max_length=8192)]
Number = Annotated[int, Field(ge=1, le=units.MAX)]


class SigV4(Section):
    """A signature of AWS (version 4), made anew: the program signs with keys of no worth."""

    access_key: SecretName
    """The secret that holds the access key's id."""
    secret_key: SecretName
    """The secret that holds the key itself."""
    session_token: SecretName | None = None
    """The secret that holds the token of temporary credentials."""


class Inject(Section):
    """What is set on requests on their way out: header and value, or sigv4."""

    header: HeaderName | None = None
    value: HeaderValue | None = None
    """May hold {secret:NAME} of a secret that the policy lists as: proxy."""
    sigv4: SigV4 | None = None
    plain: bool = False
    """Whether a secret may be sent to a server without TLS."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.header is None) != (self.value is None) or (self.header is None) == (self.sigv4 is None):
            raise ValueError("give header and value, or sigv4")
        if self.header is not None and self.header.lower() in _FRAMING:
            raise ValueError(f"{self.header} says how a request is carried, and cannot be set")
        return self

    def secrets(self) -> list[str]:
        """The names of the secrets that it holds."""
        if self.sigv4 is not None:
            return [name for name in self.sigv4.model_dump().values() if name is not None]
        return SECRET.findall(self.value or "")


class Http(Section):
    """What of HTTP a rule speaks of; without any of it, of everything, and also of what is no HTTP."""

    methods: Annotated[tuple[Annotated[str, Field(pattern="^[A-Z]{1,32}$")], ...], Field(max_length=32)] = ()
    """HTTP methods; without it, any."""
    paths: Annotated[tuple[Annotated[str, AfterValidator(_path)], ...], Field(max_length=256)] = ()
    """Globs of HTTP paths."""
    headers: Annotated[dict[HeaderName, HeaderValue], Field(max_length=32)] = Field(default_factory=dict)
    """Headers that a request has, each with a glob of its value."""

    @property
    def looks_inside(self) -> bool:
        """Whether the rule speaks of HTTP at all."""
        return bool(self.methods or self.paths or self.headers)


class Target(Section):
    """Whom a rule speaks of: exactly one of host and cidr."""

    host: Annotated[str, AfterValidator(_host)] | None = None
    """A name, or '*.name' for all names below it."""
    cidr: Annotated[str, AfterValidator(_cidr)] | None = None
    """A network of addresses."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.host is None) == (self.cidr is None):
            raise ValueError("give exactly one of host and cidr")
        return self

    @cached_property
    def _range(self) -> tuple[int, int, int]:
        network = ipaddress.ip_network(self.cidr or "")
        return network.version, int(network.network_address), int(network.broadcast_address)

    def covers_target(self, other: Target) -> bool:
        """Whether all that the other speaks of is spoken of here."""
        if self.cidr is not None and other.cidr is not None:
            (mine, first, last), (its, lowest, highest) = self._range, other._range
            return mine == its and first <= lowest and highest <= last
        if self.host is None or other.host is None:
            return False
        return self.host == other.host or (
            self.host.startswith("*.") and other.host.removeprefix("*").endswith(self.host[1:])
        )


class Rule(Target, Http):
    """Something that is allowed."""

    ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=64)]
    within: Annotated[tuple[Annotated[str, AfterValidator(_cidr)], ...], Field(max_length=64)] = ()
    """Networks of private or other special addresses that the host's name may lead to."""
    websocket: bool = False
    """Whether a request may go on as a WebSocket, where the rule looks into HTTP."""
    inject: Inject | None = None

    @property
    def looks_inside(self) -> bool:
        """Whether the rule speaks of HTTP at all."""
        return super().looks_inside or self.websocket or self.inject is not None

    def covers(self, other: Rule) -> bool:
        """Whether all that the other allows is surely allowed here."""
        return (
            self.covers_target(other)
            and set(other.ports) <= set(self.ports)
            and (not self.methods or (bool(other.methods) and set(other.methods) <= set(self.methods)))
            and (not self.paths or (bool(other.paths) and set(other.paths) <= set(self.paths)))
            and set(self.headers.items()) <= set(other.headers.items())
            and all(any(_within(each, most) for most in self.within) for each in other.within)
            and (self.websocket or not self.looks_inside or (other.looks_inside and not other.websocket))
        )


class Denied(Target, Http):
    """Something that is denied, whatever is allowed."""

    ports: Annotated[tuple[Port, ...], Field(max_length=64)] = ()
    """Without it, all ports."""


class _Amounts(Section):
    bytes: Size | None = None
    """Bytes in both directions together."""
    bytes_in: Size | None = None
    bytes_out: Size | None = None
    connections: Number | None = None
    requests: Number | None = None


class SessionBudget(_Amounts):
    """How much of the network all calls of a session may use, one after another."""


class Budget(_Amounts):
    """How much of the network a call may use."""

    connection_rate: Number | None = None
    """New connections per second."""
    bandwidth: Rate | None = None
    """Bytes per second."""
    session: SessionBudget | None = None
    """What all calls of a session may use together; a call without one has its own budget alone."""

    def limits(self) -> dict[str, int]:
        """Each that is set, by its path below ``network.budget``, such as ``bytes`` or ``session.bytes``."""
        found: dict[str, int] = self.model_dump(exclude_none=True, exclude={"session"})
        of_session = {} if self.session is None else self.session.model_dump(exclude_none=True)
        return found | {f"session.{name}": limit for name, limit in of_session.items()}


class Network(Section):
    """What the call may reach. Deny wins over allow; the order does not matter."""

    mode: Literal["none", "rules", "host"] = "rules"
    """rules: what is listed; none: nothing; host: the host's own network, where the configuration lets it."""
    allow: Annotated[tuple[Rule, ...], Field(max_length=1024)] = ()
    deny: Annotated[tuple[Denied, ...], Field(max_length=1024)] = ()
    budget: Budget | None = None

    @property
    def reaches_nothing(self) -> bool:
        """Whether the section says no more than its absence would."""
        return self.mode == "none" or (self.mode == "rules" and not self.allow)
