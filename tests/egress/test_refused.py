"""Packets out of the log of a packet filter."""

from __future__ import annotations

import ipaddress
import struct

from hypothesis import given
from hypothesis import strategies as st

from sandboxd.egress.refused import Refused, read_refused


def message(packet: bytes) -> bytes:
    """A message of nfnetlink_log with a mark before the packet."""
    attributes = struct.pack("HHI", 8, 3, 1) + struct.pack("HH", 4 + len(packet), 9) + packet
    attributes += bytes(-len(attributes) % 4)
    return struct.pack("IHHII", 20 + len(attributes), 4 << 8, 0, 0, 0) + bytes(4) + attributes


TCP4 = bytes((0x45, 0, 0, 40)) + bytes(5) + b"\6" + bytes(2) + bytes((1, 1, 1, 1, 8, 8, 8, 8)) + b"\0\1\1\xbb"
UDP6 = (
    b"\x60" + bytes(5) + b"\x11\x40" + bytes(16) + ipaddress.ip_address("2001:db8::1").packed + b"\0\1\0\x7b"
)


def test_where_to() -> None:
    assert list(read_refused(message(TCP4) + message(UDP6))) == [
        Refused("tcp", ipaddress.ip_address("8.8.8.8"), 443),
        Refused("udp", ipaddress.ip_address("2001:db8::1"), 123),
    ]
    icmp = TCP4[:9] + b"\1" + TCP4[10:]
    assert list(read_refused(message(icmp))) == [Refused("protocol 1", ipaddress.ip_address("8.8.8.8"), None)]


@given(st.binary(max_size=200))
def test_anything_is_read_or_left_out(data: bytes) -> None:
    for piece in (data, message(data), message(TCP4)[: len(data)] + data):
        list(read_refused(piece))
