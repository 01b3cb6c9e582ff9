"""What the packet filter of a container refused: messages of nfnetlink_log, and the packets in them."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Refused", "read_refused"]

NFULNL_MSG_PACKET = 4 << 8
NFULA_PAYLOAD = 9
HEADER = 16  # nlmsghdr
GENERIC = 4  # nfgenmsg
PROTOCOLS = {6: "tcp", 17: "udp"}


@dataclass(frozen=True)
class Refused:
    """One packet: where to. ``port`` is None for a protocol that has none."""

    protocol: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int | None


def read_refused(data: bytes) -> Iterator[Refused]:
    """The packets of one read of the log's socket; what is not understood is left out."""
    at = 0
    while at + HEADER <= len(data):
        length, kind = struct.unpack_from("IH", data, at)
        if length < HEADER:
            return
        if kind == NFULNL_MSG_PACKET:
            packet = _payload(data[at + HEADER + GENERIC : at + length])
            found = None if packet is None else _destination(packet)
            if found is not None:
                yield found
        at += length + 3 & ~3


def _payload(attributes: bytes) -> bytes | None:
    at = 0
    while at + 4 <= len(attributes):
        length, kind = struct.unpack_from("HH", attributes, at)
        if length < 4:
            return None
        if kind & 0x3FFF == NFULA_PAYLOAD:
            return attributes[at + 4 : at + length]
        at += length + 3 & ~3
    return None


def _destination(packet: bytes) -> Refused | None:
    try:
        if packet[0] >> 4 == 4:
            protocol, start = packet[9], (packet[0] & 15) * 4
            address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.IPv4Address(packet[16:20])
        else:
            protocol, start = packet[6], 40
            address = ipaddress.IPv6Address(packet[24:40])
        port = int.from_bytes(packet[start + 2 : start + 4]) if protocol in PROTOCOLS else None
    except (IndexError, ipaddress.AddressValueError):
        return None
    return Refused(PROTOCOLS.get(protocol, f"protocol {protocol}"), address, port)
