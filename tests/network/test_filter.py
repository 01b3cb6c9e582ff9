"""The filter of the processes that serve connections."""

from __future__ import annotations

import socket

import pytest

from sandboxd.network.filter import filter_program
from sandboxd.policy import abi, bpf

NATIVE = abi.native()
MPTCP, SCTP = 262, 132
NONBLOCK = int(socket.SOCK_NONBLOCK)
NOSIGNAL, FASTOPEN = int(socket.MSG_NOSIGNAL), int(socket.MSG_FASTOPEN)
INET, INET6, UNIX, PACKET, NETLINK = 2, 10, 1, 17, 16


def verdict(name: str, *args: int) -> bool:
    """Whether a call is let through."""
    return bpf.run(filter_program(), NATIVE.numbers[name], NATIVE.audit, args) == bpf.ALLOW


@pytest.mark.parametrize("family", [INET, INET6, UNIX, PACKET, NETLINK])
@pytest.mark.parametrize(
    ("kind", "protocol"), [(1, 0), (1, 6), (2, 0), (2, 17), (3, 0), (1, MPTCP), (1, SCTP)]
)
def test_it_can_make_no_socket(family: int, kind: int, protocol: int) -> None:
    assert not verdict("socket", family, kind | NONBLOCK, protocol)
    assert not verdict("socketpair", family, kind | NONBLOCK, protocol)


@pytest.mark.parametrize(("name", "flags"), [("sendto", 3), ("sendmsg", 2)])
def test_it_can_send_and_not_connect_as_it_does(name: str, flags: int) -> None:
    asked = [0] * 6
    assert verdict(name, *asked)
    asked[flags] = NOSIGNAL
    assert verdict(name, *asked)
    asked[flags] = NOSIGNAL | FASTOPEN
    assert not verdict(name, *asked)


@pytest.mark.parametrize(
    "name",
    [
        "openat",
        "execve",
        "clone",
        "ptrace",
        "kill",
        "bind",
        "listen",
        "unshare",
        "connect",
        "sendmmsg",
        "io_uring_setup",
        "setns",
        "pidfd_getfd",
    ],
)
def test_calls_that_it_may_not_make(name: str) -> None:
    assert not verdict(name, 0, 0, 0, 0, 0, 0)
