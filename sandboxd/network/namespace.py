"""A container's network namespace: every address is its own loopback's, and the sockets that answer there.

Nothing leads out of it. ``lo`` has a route for all of IPv4 and IPv6, so that every address that the packet
filter lets through arrives at a socket of ours, which was opened in there and is served by somebody outside.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.kernel.inside import in_network_namespace, in_new_network_namespace
from sandboxd.kernel.nft import run_nft
from sandboxd.network.chain import LISTEN_PORT, LOG_GROUP, SNAP
from sandboxd.reach import DNS_PORT

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SYSCTLS", "Doors", "InForce", "in_force", "open_doors", "proc_sys", "reference"]

BACKLOG = 4096
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75  # linux/in.h, linux/in6.h
IPV6_RECVPKTINFO = 49
LOG_BUFFER = 1 << 20
MAX_WAITING = 4096  # messages; their buffers hold fewer

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12  # linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLMSG_ERROR = 2
RT_TABLE_LOCAL = 255
NFULNL_MSG_CONFIG = 4 << 8 | 1  # the subsystem of nfnetlink_log, and its message
NFULA_CFG_CMD, NFULA_CFG_MODE, NFULA_CFG_QTHRESH = 1, 2, 5  # linux/netfilter/nfnetlink_log.h
NFULNL_CFG_CMD_BIND, NFULNL_COPY_PACKET = 1, 2
LO = 1  # the first interface of a namespace

PORT_START = "net/ipv4/ip_unprivileged_port_start"
SYSCTLS = {
    PORT_START: "1024",
    "net/ipv4/ping_group_range": "1 0",  # nobody
    "net/ipv4/icmp_echo_ignore_all": "1",  # or every address "answers"
    "net/ipv6/icmp/echo_ignore_all": "1",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/lo/disable_ipv6": "0",
}


@dataclass
class Doors:
    """The sockets of one namespace, as descriptors; who takes them has them to close."""

    tcp: int
    """Gets every TCP connection of IPv4 that the packet filter lets through, once ``begin`` was called."""
    tcp6: int
    dns: int
    """Datagrams to port 53 of any address."""
    dns_tcp: int
    refused: int
    """The log of what the packet filter refused (nfnetlink_log)."""

    @property
    def closed(self) -> bool:
        """Whether nobody serves them any more, and everything is refused."""
        return self.tcp < 0

    def begin(self) -> None:
        """Take connections from now on, which are refused before, and forget what was asked and refused.

        Raises OSError.
        """
        if self.closed:
            raise OSError(errno.EBADF, "nobody serves the container's connections any more")
        for fd in (self.tcp, self.tcp6, self.dns_tcp):
            with _borrowed(fd, socket.AF_INET) as listener:
                listener.listen(BACKLOG)
        for fd in (self.dns, self.refused):
            with _borrowed(fd, socket.AF_INET) as waiting:
                _empty(waiting)

    def rest(self) -> None:
        """Refuse connections from now on, until ``begin``. Raises OSError."""
        if self.closed:
            return
        for fd in (self.tcp, self.tcp6, self.dns_tcp):
            with _borrowed(fd, socket.AF_INET) as listener:
                listener.shutdown(socket.SHUT_RD)  # it listens no more, and stays bound

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All of them, in the order of the fields."""
        return astuple(self)

    def knocked(self) -> bool:
        """Whether anything waits at one of them that nobody has taken yet."""
        poll = select.poll()
        for fd in self.descriptors:
            poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close all. Safe to call twice."""
        if not self.closed:
            for fd in self.descriptors:
                os.close(fd)
            self.tcp = self.tcp6 = self.dns = self.dns_tcp = self.refused = -1


@contextmanager
def _borrowed(fd: int, family: int) -> Iterator[socket.socket]:
    """A socket for what needs no address: of whatever family is said, which the kernel is not asked for."""
    sock = socket.socket(family, socket.SOCK_STREAM, 0, fd)
    try:
        yield sock
    finally:
        sock.detach()


def _empty(sock: socket.socket) -> None:
    for _ in range(MAX_WAITING):  # whoever fills it may go on
        try:
            sock.recv(1)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # more came than was kept
                raise


def open_doors(namespace: int, chain: str) -> Doors:
    """Make a namespace, given as a descriptor, ready: addresses, routes, filter (text of nftables), sockets.

    Raises OSError, also on a host whose kernel has no IPv6.
    """
    return in_network_namespace(namespace, lambda: _open_doors(chain))


@dataclass(frozen=True)
class InForce:
    """What the kernel says of a namespace."""

    filter: str
    """Its rules, as nftables lists them."""
    sysctls: str


def in_force(namespace: int) -> InForce:
    """Read what a namespace, given as a descriptor, has. Raises OSError."""
    return in_network_namespace(namespace, _read)


@lru_cache(maxsize=256)
def reference(chain: str) -> InForce:
    """What a namespace has that was made ready with this text: one that is made for that. Raises OSError."""

    def fresh() -> InForce:
        _open_doors(chain).close()
        return _read()

    return in_new_network_namespace(fresh)


def _read() -> InForce:
    return InForce(run_nft("list ruleset"), _sysctls())


def _sysctls() -> str:
    return " ".join(f"{name.removeprefix('net/')}={_sysctl(name)}" for name in SYSCTLS)


def _sysctl(name: str) -> str:
    return " ".join(proc_sys(name).read_text().split())


def proc_sys(name: str) -> Path:
    """The file of a sysctl, that of the namespace of whoever opens it."""
    return Path("/proc/sys", name)


def _open_doors(chain: str) -> Doors:
    # until the end nothing else binds in there, and a daemon in a container may not have CAP_NET_BIND_SERVICE
    for name, value in {**SYSCTLS, PORT_START: "0"}.items():
        proc_sys(name).write_text(value)
    _request(NETLINK_ROUTE, _routes())
    run_nft(chain)
    made: list[int] = []
    try:
        made.append(_listener(socket.AF_INET, socket.IPPROTO_IP, IP_TRANSPARENT, LISTEN_PORT))
        made.append(_listener(socket.AF_INET6, socket.IPPROTO_IPV6, IPV6_TRANSPARENT, LISTEN_PORT))
        made.append(_resolver(socket.SOCK_DGRAM))
        made.append(_resolver(socket.SOCK_STREAM))
        made.append(_log())
        proc_sys(PORT_START).write_text(SYSCTLS[PORT_START])
    except BaseException:
        for fd in made:
            os.close(fd)
        raise
    return Doors(*made)


@lru_cache(maxsize=1)
def _routes() -> bytes:
    """The requests that bring ``lo`` up and make every address its own; the same for every container."""
    from pyroute2 import IPBatch  # noqa: PLC0415  (slow to import, and few daemons have policies with a network)

    with IPBatch() as batch:
        batch.link("set", index=LO, state="up")
        for family in (socket.AF_INET, socket.AF_INET6):
            batch.route(
                "add", family=family, dst="default", type="local", oif=LO, table=RT_TABLE_LOCAL, scope="host"
            )
        return bytes(batch.batch)


def _request(protocol: int, messages: bytes) -> None:
    """Send requests of netlink and wait for their answers. Raises OSError, that of the first refusal."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as netlink:
        netlink.send(messages)
        _answered(netlink, messages)


def _answered(netlink: socket.socket, messages: bytes) -> None:
    left, offset = 0, 0
    while offset < len(messages):
        offset += struct.unpack_from("I", messages, offset)[0] + 3 & ~3
        left += 1
    while left:
        answer = netlink.recv(65536)
        offset = 0
        while offset < len(answer):
            length, kind, *_, code = struct.unpack_from("=IHHIIi", answer, offset)
            if kind == NLMSG_ERROR:
                left -= 1
                if code:
                    raise OSError(-code, f"netlink: {os.strerror(-code)}")
            offset += length + 3 & ~3


def _listener(family: int, level: int, transparent: int, port: int) -> int:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(level, transparent, 1)
        sock.bind(("", port))
        return sock.detach()
    finally:
        sock.close()


def _resolver(kind: int) -> int:
    """Port 53 of every address, of both families. Without SO_REUSEADDR, so that nobody can bind over it."""
    sock = socket.socket(socket.AF_INET6, kind | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        sock.bind(("", DNS_PORT))
        return sock.detach()
    finally:
        sock.close()


def _log() -> int:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_NETFILTER)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LOG_BUFFER)
        sock.bind((0, 0))
        bind = _log_request(NFULA_CFG_CMD, struct.pack("B", NFULNL_CFG_CMD_BIND))
        copy = _log_request(NFULA_CFG_MODE, struct.pack(">IBx", SNAP, NFULNL_COPY_PACKET))
        at_once = _log_request(NFULA_CFG_QTHRESH, struct.pack(">I", 1))  # and not a second later
        sock.setblocking(True)
        for message in (bind, copy, at_once):
            sock.send(message)
            _answered(sock, message)
        sock.setblocking(False)
        return sock.detach()
    finally:
        sock.close()


def _log_request(attribute: int, value: bytes) -> bytes:
    """A message of nfnetlink_log: nlmsghdr, nfgenmsg and one attribute."""
    padded = value + bytes(-len(value) % 4)
    body = struct.pack(">BBH", socket.AF_UNSPEC, 0, LOG_GROUP) + struct.pack("HH", 4 + len(value), attribute)
    header = struct.pack(
        "IHHII", 16 + len(body) + len(padded), NFULNL_MSG_CONFIG, NLM_F_REQUEST | NLM_F_ACK, 0, 0
    )
    return header + body + padded
