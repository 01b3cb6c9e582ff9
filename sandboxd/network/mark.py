"""What changes when the rules or the sysctls of a network namespace do: read again without entering it.

A socket of netlink answers for the namespace that it was made in, and a file of ``/proc/sys/net`` for the one
that it was opened in, whoever asks. So both are opened once, by a thread that joins the namespace for that,
and are then some system calls to read.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from sandboxd.kernel.inside import in_network_namespace
from sandboxd.network.namespace import SYSCTLS, proc_sys

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Mark"]

NETLINK_NETFILTER = 12  # linux/netlink.h
NLM_F_REQUEST = 0x1
NFT_MSG_NEWGEN, NFT_MSG_GETGEN = 10 << 8 | 15, 10 << 8 | 16  # the subsystem of nftables, and its messages
NFTA_GEN_ID = 1
ASK = struct.pack("IHHIIBBH", 20, NFT_MSG_GETGEN, NLM_F_REQUEST, 0, 0, socket.AF_UNSPEC, 0, 0)
READ_MAX = 256


class Mark:
    """Of one namespace. ``descriptors`` keep it alive, and are whoever's who has them to close."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        """``descriptors``: those of one that was opened, in their order."""
        self.descriptors = list(descriptors)
        self._netlink, *self._sysctls = self.descriptors

    @classmethod
    def open(cls, namespace: int) -> Self:
        """That of a namespace, given as a descriptor. Raises OSError."""
        return cls(in_network_namespace(namespace, _open))

    def read(self) -> tuple[int, tuple[bytes, ...]]:
        """The number that nftables gives the rules, another one with each change, and the sysctls.

        Raises OSError.
        """
        return self._generation(), tuple(os.pread(fd, READ_MAX, 0) for fd in self._sysctls)

    def _generation(self) -> int:
        os.write(self._netlink, ASK)
        answer = os.read(self._netlink, 4096)
        (kind,), (attribute,) = struct.unpack_from("4xH", answer), struct.unpack_from("2xH", answer, 20)
        if (kind, attribute) != (NFT_MSG_NEWGEN, NFTA_GEN_ID):
            raise OSError(errno.EPROTO, "nftables does not say which generation its rules have")
        (generation,) = struct.unpack_from(">I", answer, 24)
        return int(generation)


def _open() -> list[int]:
    with ExitStack() as stack:
        made = [os.open(proc_sys(name), os.O_RDONLY | os.O_CLOEXEC) for name in SYSCTLS]
        for fd in made:
            stack.callback(os.close, fd)
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        stack.pop_all()
        return [netlink.detach(), *made]
