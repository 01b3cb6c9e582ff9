"""The filter of the processes that serve connections."""

from __future__ import annotations

import socket

import pytest

from sandboxd.network.filter import filter_program
from sandboxd.policy import abi, bpf

NATIVE = abi.native()
MPTCP, SCTP = 262, 132
NONBLOCK = int(socket.SOCK_NONBLOCK)
INET, INET6, UNIX, PACKET, NETLINK = 2, 10, 1, 17, 16


def verdict(name: str, *args: int) -> bool:
    """Whether a call is let through."""
    return bpf.run(filter_program(), NATIVE.numbers[name], NATIVE.audit, args) == bpf.ALLOW


@pytest.mark.parametrize("family", [INET, INET6])
@pytest.mark.parametrize(("kind", "protocol"), [(1, 0), (1, 6), (2, 0), (2, 17)])
def test_sockets_that_it_may_have(family: int, kind: int, protocol: int) -> None:
    assert verdict("socket", family, kind | NONBLOCK, protocol)


@pytest.mark.parametrize(
    "asked",
    [(INET, 1, MPTCP), (INET6, 1, SCTP), (INET, 2, socket.IPPROTO_ICMP), (INET, 3, 6), (UNIX, 1, 0),
     (PACKET, 3, 0), (NETLINK, 3, 0)],
)  # fmt: skip
def test_sockets_that_it_may_not_have(asked: tuple[int, int, int]) -> None:
    assert not verdict("socket", *asked)


@pytest.mark.parametrize("name", ["openat", "execve", "clone", "ptrace", "kill", "bind", "listen", "unshare"])
def test_calls_that_it_may_not_make(name: str) -> None:
    assert not verdict(name, 0, 0, 0, 0, 0, 0)
