"""What a policy's network rules come to: which names are answered, which connections are let through.

Pure, and one for all: the rules of the container's own packet filter are written from it, the process that
serves the container's connections asks it, and so do a policy's examples. Deny wins over allow.

A name stands for an address of ``STANDINS`` in its container. All names that may be reached at the same ports
have their addresses from one block, so that a packet filter that was loaded before any name was asked for
refuses every other port.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from sandboxd.excerpt import excerpt
from sandboxd.httprule import ambiguous

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sandboxd.httprule import HttpRequest, HttpRule, Injection

__all__ = [
    "DNS_PORT",
    "NEVER",
    "STANDINS",
    "STANDINS6",
    "Allow",
    "Decision",
    "Deny",
    "NetworkRules",
    "Reach",
    "inside",
    "standin6",
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Cidr = ipaddress.IPv4Network | ipaddress.IPv6Network
T = TypeVar("T")

DNS_PORT = 53  # of every address: the container's own resolver
STANDINS = ipaddress.IPv4Network("198.18.0.0/15")  # RFC 2544: on no network that anybody has
STANDINS6 = ipaddress.IPv6Network("fd73:616e:6462:6f78::/64")  # RFC 4193

NEVER: tuple[Cidr, ...] = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
            "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
            "::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64",
            "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10",
            "fec0::/10", "ff00::/8",
        ),
    )
)  # fmt: skip
"""Where nothing connects to unless a rule names it: private, shared, local, multicast, reserved, and the
forms of IPv6 that hold an address of IPv4 (RFC 6890 and its registries)."""


@dataclass(frozen=True)
class Allow:
    """A host name, ``*.`` with a name, or a network of addresses; and the ports that may be reached there."""

    target: str
    ports: tuple[int, ...]
    where: str
    """File and line."""
    http: HttpRule | None = None
    """Which requests; None: any, and also what is no HTTP."""
    within: tuple[str, ...] = ()
    """Of a name: networks inside one of ``NEVER`` that it may lead to."""
    ask: bool = False
    """Whether somebody has to allow what the rule speaks of, each time. No key of a policy says so yet."""


@dataclass(frozen=True)
class Deny:
    """The same; no ports are all ports."""

    target: str
    ports: tuple[int, ...]
    where: str
    http: HttpRule | None = None
    """Which requests; None: nothing is connected to at all."""


@dataclass(frozen=True)
class NetworkRules:
    """The rules of a policy, as data."""

    allow: tuple[Allow, ...]
    deny: tuple[Deny, ...]
    budget: tuple[tuple[str, int], ...] = ()
    """By the names of a policy's ``network.budget``, such as ``bytes`` and ``session.bytes``."""

    @property
    def look_inside(self) -> bool:
        """Whether TLS is ended on the way for any of them, so that a container has to trust who does it."""
        rules: tuple[Allow | Deny, ...] = (*self.allow, *self.deny)
        return any(rule.http is not None for rule in rules)


@dataclass(frozen=True)
class Decision:
    """Whether something may happen, why, and the rule (file and line) that says so, if one does."""

    allowed: bool
    why: str
    where: str | None = None
    injections: tuple[Injection, ...] = ()
    """What is put into a request that is allowed."""
    asks: bool = False
    """Whether it is allowed only once somebody has said so."""


class Reach:
    """The compiled rules. Deny wins over ask, and ask over allow."""

    def __init__(self, rules: NetworkRules) -> None:
        self._allow: dict[str, list[Allow]] = {}
        self._deny: dict[str, list[Deny]] = {}
        self._networks: list[tuple[Cidr, Allow]] = []
        self._refused: list[tuple[Cidr, Deny]] = []
        self._named: dict[int, list[Allow]] = {}
        """Rules for names, by port."""
        for rule in rules.allow:
            if (network := _network(rule.target)) is None:
                self._allow.setdefault(rule.target, []).append(rule)
                for port in rule.ports:
                    self._named.setdefault(port, []).append(rule)
            else:
                self._networks.append((network, rule))
        for deny in rules.deny:
            if (network := _network(deny.target)) is None:
                self._deny.setdefault(deny.target, []).append(deny)
            else:
                self._refused.append((network, deny))

    # names

    def ports(self, name: str) -> frozenset[int]:
        """The ports at which a name may be reached; none of them: the name is not answered."""
        found = {port for rule in _matching(self._allow, name) for port in rule.ports}
        for deny in _matching(self._deny, name):
            if deny.http is None:
                found.difference_update(deny.ports or tuple(found))
        return frozenset(found)

    def name(self, name: str) -> Decision:
        """Whether a name is answered."""
        if ports := self.ports(name):
            return Decision(allowed=True, why=f"{name} may be reached at {_said(ports)}")
        for deny in _matching(self._deny, name):
            if deny.http is None:
                return Decision(allowed=False, why=f"{deny.target} is denied", where=deny.where)
        return Decision(allowed=False, why=f"no rule allows {name}")

    def at(self, name: str, port: int) -> Decision:
        """Whether a name may be reached at a port."""
        for deny in _matching(self._deny, name):
            if deny.http is None and port in (deny.ports or (port,)):
                return Decision(allowed=False, why=f"{deny.target} is denied", where=deny.where)
        if matching := [rule for rule in _matching(self._allow, name) if port in rule.ports]:
            asks = not self.looks_inside(name, port)  # where rules do, it is requests that are asked about
            return _allowing(matching, asks=asks)
        ports = self.ports(name)
        said = f"{name} is allowed at {_said(ports)}, not at {port}" if ports else f"no rule allows {name}"
        return Decision(allowed=False, why=said)

    def looks_inside(self, name: str, port: int) -> bool:
        """Whether what is said to a name at a port is HTTP that rules have to see, and nothing else."""
        rules: tuple[Allow | Deny, ...] = (*_matching(self._allow, name), *_matching(self._deny, name))
        return any(rule.http is not None and port in (rule.ports or (port,)) for rule in rules)

    def request(self, name: str, port: int, asked: HttpRequest) -> Decision:
        """Whether a request may be made of a name where rules look inside."""
        denied = [rule for rule in _matching(self._deny, name) if port in (rule.ports or (port,))]
        allowed = [rule for rule in _matching(self._allow, name) if port in rule.ports]
        rules: tuple[Allow | Deny, ...] = (*denied, *allowed)
        said = f"{excerpt(asked.method, 32)} {excerpt(asked.path.decode(errors='replace'), 1024)}"
        of_paths = any(rule.http is not None and rule.http.paths for rule in rules)
        if of_paths and (why := ambiguous(asked.target)) is not None:
            return Decision(allowed=False, why=f"{said}: {why}")
        if any(rule.http is not None and rule.http.methods for rule in rules) and not asked.method.isupper():
            return Decision(allowed=False, why=f"{said}: its method is not in upper case, as methods are")
        for deny in denied:
            if deny.http is None or deny.http.matches(asked, denies=True):
                return Decision(allowed=False, why=f"{said} is denied", where=deny.where)
        matching = [rule for rule in allowed if rule.http is None or rule.http.matches(asked)]
        if asked.websocket:
            matching = [rule for rule in matching if rule.http is None or rule.http.websocket]
        if not matching:
            what = "WebSocket " if asked.websocket else ""
            return Decision(allowed=False, why=f"no rule allows the {what}request {said}")
        injections: dict[str, Injection] = {}
        for rule in matching:
            if rule.http is not None and rule.http.inject is not None:
                injections.setdefault(rule.http.inject.header.lower(), rule.http.inject)
        return _allowing(matching, injections=tuple(injections.values()))

    def offers(self, name: str, port: int) -> list[str]:
        """What of HTTP the rules allow of a name at a port, a line for each rule; for who was refused."""
        return [
            rule.target if rule.http is None else f"{rule.target}: {rule.http.said}"
            for rule in _matching(self._allow, name)
            if port in rule.ports
        ]

    @cached_property
    def blocks(self) -> tuple[tuple[frozenset[int], ipaddress.IPv4Network], ...]:
        """The sets of ports that names have, each with the block of addresses that stand for such names."""
        mentioned = {*self._allow, *self._deny}
        sets = {self.ports(_example(pattern)) for pattern in mentioned} - {frozenset()}
        ordered = sorted(sets, key=sorted)
        bits = len(ordered).bit_length()  # the first block is nobody's: that of the resolver
        networks = STANDINS.subnets(prefixlen_diff=bits)
        next(networks)
        return tuple(zip(ordered, networks, strict=False))

    # addresses

    def address(self, address: Address, port: int) -> Decision:
        """Whether a connection to an address itself is let through."""
        deny = self._denied(address, port)
        if deny is not None:
            return deny
        return self._allowed(address, port) or Decision(
            allowed=False, why=f"no rule allows the address {address} at port {port}"
        )

    def upstream(self, name: str, address: Address, port: int) -> Decision:
        """Whether an address that an allowed name stands for outside may be connected to."""
        if (deny := self._denied(address, port)) is not None:
            return deny
        if (never := _never(address)) is None:
            return Decision(allowed=True, why=f"{address} is a public address")
        for rule in _matching(self._allow, name):
            if port in rule.ports and any(_leads(network, never, address) for network in rule.within):
                return Decision(allowed=True, why=f"{name} may lead to {address}", where=rule.where)
        return self._allowed(address, port) or Decision(
            allowed=False,
            why=f"{address} is in {never}, which is reached only where the name's own rule (within) or "
            "a rule with a cidr inside it says so",
        )

    def leads(self, address: Address, port: int) -> bool:
        """Whether there is a rule by which a connection may be made to an address, whatever the name."""
        if self._denied(address, port) is not None:
            return False
        never = _never(address)
        rules = self._named.get(port, ())
        if never is None and rules:
            return True
        if never is not None and any(_leads(each, never, address) for rule in rules for each in rule.within):
            return True
        return self._allowed(address, port) is not None

    def _denied(self, address: Address, port: int) -> Decision | None:
        for network, deny in self._refused:
            if address.version == network.version and address in network and port in (deny.ports or (port,)):
                return Decision(allowed=False, why=f"{deny.target} is denied", where=deny.where)
        return None

    def _allowed(self, address: Address, port: int) -> Decision | None:
        never = _never(address)
        matching = [
            rule
            for network, rule in self._networks
            if address.version == network.version and address in network and port in rule.ports
            if never is None or inside(network, never)
        ]
        return _allowing(matching) if matching else None

    def networks(self) -> tuple[list[tuple[Cidr, Allow]], list[tuple[Cidr, Allow]]]:
        """The networks that are allowed: those inside one of ``NEVER``, and the others."""
        special: list[tuple[Cidr, Allow]] = []
        others: list[tuple[Cidr, Allow]] = []
        for network, rule in self._networks:
            is_special = any(inside(network, never) for never in NEVER)
            (special if is_special else others).append((network, rule))
        return special, others

    @property
    def refused(self) -> Sequence[tuple[Cidr, Deny]]:
        """The networks that are denied."""
        return self._refused


def _allowing(
    matching: Sequence[Allow], *, asks: bool = True, injections: tuple[Injection, ...] = ()
) -> Decision:
    """By those rules, at least one, the closest first."""
    asking = next((rule for rule in matching if rule.ask), None) if asks else None
    rule = asking or matching[0]
    return Decision(
        allowed=True,
        why=f"{rule.target} is allowed",
        where=rule.where,
        injections=injections,
        asks=asking is not None,
    )


def standin6(block: ipaddress.IPv4Network) -> ipaddress.IPv6Network:
    """The block of IPv6 beside one of ``STANDINS``: the same addresses in the last 32 bits."""
    first = int(STANDINS6.network_address) + int(block.network_address)
    return ipaddress.IPv6Network((first, 96 + block.prefixlen))


def _network(target: str) -> Cidr | None:
    return ipaddress.ip_network(target) if "/" in target else None


def _matching(rules: dict[str, list[T]], name: str) -> Iterator[T]:
    """The rules that speak of a name, those of the closest pattern first."""
    for pattern in _patterns(name):
        yield from rules.get(pattern, ())


def _patterns(name: str) -> Iterator[str]:
    """The patterns that match a name, the closest first."""
    yield name
    _, dot, rest = name.partition(".")
    while dot:
        yield f"*.{rest}"
        _, dot, rest = rest.partition(".")


def _example(pattern: str) -> str:
    """A name that a pattern matches, and no closer one does."""
    return "\0" + pattern[1:] if pattern.startswith("*.") else pattern


def _never(address: Address) -> Cidr | None:
    for network in NEVER:
        if address.version == network.version and address in network:
            return network
    return None


def _leads(within: str, never: Cidr, address: Address) -> bool:
    network = ipaddress.ip_network(within)
    return address.version == network.version and address in network and inside(network, never)


def inside(network: Cidr, other: Cidr) -> bool:
    """Whether all of a network is in another."""
    if isinstance(network, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and network.subnet_of(other)
    return isinstance(other, ipaddress.IPv6Network) and network.subnet_of(other)


def _said(ports: frozenset[int]) -> str:
    return ("port " if len(ports) == 1 else "ports ") + ", ".join(map(str, sorted(ports)))
