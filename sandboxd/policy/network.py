"""The network section of a policy: names, addresses, ports and what may be said over them.

It is parsed and validated in full; what of it this release does not enforce, ``checks`` refuses. What the
rules come to is in ``reach``.
"""

from __future__ import annotations

import ipaddress
import re
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sandboxd import units
from sandboxd.policy.quantities import Rate, Size  # noqa: TC001, pydantic reads it at run time
from sandboxd.policy.section import Section

__all__ = ["Budget", "Inject", "Network", "Rule"]

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_SECRET = re.compile(r"\{secret:([A-Z][A-Z0-9_]{0,127})\}")
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


def _path(value: str) -> str:
    if not value.startswith("/") or not value.isprintable() or " " in value:
        raise ValueError(f"{value!r} is not a path; write a glob such as /repos/**")
    return value


def _header_value(value: str) -> str:
    if not value.isprintable():
        raise ValueError("a header's value must be printable")
    return value


Port = Annotated[int, Field(ge=1, le=65535)]
HeaderName = Annotated[str, Field(pattern=_TOKEN)]
HeaderValue = Annotated[str, AfterValidator(_header_value), Field(max_length=8192)]
Number = Annotated[int, Field(ge=1, le=units.MAX)]


class Inject(Section):
    """A header that is set on requests on their way out."""

    header: HeaderName
    value: HeaderValue
    """May hold {secret:NAME} of a secret that the policy lists as: proxy."""

    def secrets(self) -> list[str]:
        """The names of the secrets that the value holds."""
        return _SECRET.findall(self.value)


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


class Rule(Target):
    """Something that is allowed."""

    ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=64)]
    methods: Annotated[tuple[Annotated[str, Field(pattern="^[A-Z]{1,32}$")], ...], Field(max_length=32)] = ()
    """HTTP methods; without it, any, and also what is not HTTP."""
    paths: Annotated[tuple[Annotated[str, AfterValidator(_path)], ...], Field(max_length=256)] = ()
    """Globs of HTTP paths."""
    headers: dict[HeaderName, HeaderValue] = Field(default_factory=dict)
    """Headers that a request must have, each with a glob of its value."""
    inject: Inject | None = None

    def covers(self, other: Rule) -> bool:
        """Whether all that the other allows is allowed here."""
        return self.covers_target(other) and set(other.ports) <= set(self.ports)


class Denied(Target):
    """Something that is denied, whatever is allowed."""

    ports: Annotated[tuple[Port, ...], Field(max_length=64)] = ()
    """Without it, all ports."""


class Budget(Section):
    """How much of the network a call may use."""

    bytes: Size | None = None
    """Bytes in both directions together."""
    bytes_in: Size | None = None
    bytes_out: Size | None = None
    connections: Number | None = None
    requests: Number | None = None
    connection_rate: Number | None = None
    """New connections per second."""
    bandwidth: Rate | None = None
    """Bytes per second."""


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
