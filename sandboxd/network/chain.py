"""The packet filter of a container's network namespace, as text for nftables.

What is let through is decided where a connection begins (``output``): a program sees a refusal there and
then, and the attempt is logged. What is let through arrives on ``lo`` like everything else and is steered to
one listener (``steer``), which learns from ``getsockname`` what was meant. Loopback addresses are the tool's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.reach import DNS_PORT, NEVER, standin6

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd.reach import Cidr, Reach

__all__ = ["LISTEN_PORT", "LOG_GROUP", "TABLE", "write_chain"]

TABLE = "sandboxd"
LISTEN_PORT = 1
"""A port that no tool can have: those below 1024 are not its own to bind."""
LOG_GROUP = 1
SNAP = 80  # bytes of a refused packet: both headers of IPv6 with room for options of IPv4


def write_chain(reach: Reach) -> str:
    """The commands that make the table. Their order is that of what they decide."""
    rules = [
        "ip daddr 127.0.0.0/8 accept",
        "ip6 daddr ::1 accept",
        # Only the kernel sends these: a tool has no raw socket, and none for ping.
        "meta l4proto { icmp, ipv6-icmp } accept",
        "tcp flags & (syn | ack) != syn accept",
        "ip daddr 224.0.0.0/3 jump refuse",
        "ip6 daddr ff00::/8 jump refuse",
        f"meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept",
        f"udp sport {DNS_PORT} accept",
    ]
    rules += [f"{_to(network)}{_at(deny.ports)} jump refuse" for network, deny in reach.refused]
    for ports, block in reach.blocks:
        rules += [f"{_to(network)}{_at(ports)} accept" for network in (block, standin6(block))]
    special, others = reach.networks()
    rules += [f"{_to(network)}{_at(rule.ports)} accept" for network, rule in special]
    if others:
        rules += [f"{_to(network)} jump refuse" for network in NEVER]
        rules += [f"{_to(network)}{_at(rule.ports)} accept" for network, rule in others]
    return f"""\
table inet {TABLE} {{
    chain refuse {{
        limit rate 500/second burst 500 packets log group {LOG_GROUP} snaplen {SNAP}
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        {_lines(rules)}
        jump refuse
    }}
    chain steer {{
        type filter hook prerouting priority mangle; policy accept;
        ip daddr 127.0.0.0/8 accept
        ip6 daddr ::1 accept
        tcp dport {DNS_PORT} accept
        meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:{LISTEN_PORT} accept
        meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:{LISTEN_PORT} accept
    }}
}}
"""


def _to(network: Cidr) -> str:
    return f"{'ip' if network.version == 4 else 'ip6'} daddr {network}"


def _at(ports: Iterable[int]) -> str:
    listed = ", ".join(map(str, sorted(ports)))
    return f" tcp dport {{ {listed} }}" if listed else ""


def _lines(rules: Iterable[str]) -> str:
    return "\n        ".join(rules)
