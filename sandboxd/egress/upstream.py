"""The other side of a connection: the addresses that a name has outside, and connecting to one of them."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.resolver

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from sandboxd.reach import Address, Decision, Reach

    Begin = Callable[[Address, int], Awaitable[socket.socket]]

__all__ = ["Resolver", "Unreachable", "connect", "host_names"]

LOOKUP_SECONDS = 10.0
CONNECT_SECONDS = 10.0  # for one address
MAX_ADDRESSES = 8
KEPT = 4096  # names
MAX_KEPT = 64  # addresses of one
MAX_LINES = 200_000


class Unreachable(Exception):
    """Raised when nothing can be connected to. ``refused``: where rules are in the way, not the network."""

    def __init__(self, why: str, refused: Decision | None = None) -> None:
        super().__init__(why)
        self.refused = refused


def host_names(file: Path = Path("/etc/hosts")) -> dict[str, list[str]]:
    """The addresses of names that the host has by itself, hosts(5)."""
    found: dict[str, list[str]] = {}
    with suppress(OSError):
        for line in file.read_text(errors="replace").splitlines()[:MAX_LINES]:
            address, *names = line.partition("#")[0].split() or [""]
            with suppress(ValueError):
                ipaddress.ip_address(address)
                for name in names:
                    found.setdefault(name.lower(), []).append(address)
    return found


class Resolver:
    """Asks the host's name servers. What was answered is kept as long as it says itself."""

    def __init__(
        self,
        nameservers: Sequence[str],
        hosts: Mapping[str, Sequence[str]],
        port: int,
        backend: dns.asyncbackend.Backend,
    ) -> None:
        self._hosts = hosts
        self._backend = backend
        self._resolver = dns.asyncresolver.Resolver(configure=False)
        self._resolver.nameservers = list(nameservers)
        self._resolver.port = port
        self._resolver.lifetime = LOOKUP_SECONDS
        self._kept: dict[str, tuple[float, list[Address]]] = {}

    async def addresses(self, name: str) -> list[Address]:
        """Those of both families, none where the name has none. Raises Unreachable."""
        if (fixed := self._hosts.get(name)) is not None:
            return [ipaddress.ip_address(address) for address in fixed]
        kept = self._kept.get(name)
        if kept is not None and kept[0] > time.monotonic():
            return kept[1]
        found: dict[str, list[Address]] = {}
        until = [time.monotonic() + 60]
        failed: list[str] = []

        async def ask(kind: str) -> None:
            try:
                answer = await self._resolver.resolve(
                    name + ".", kind, raise_on_no_answer=False, backend=self._backend
                )
            except dns.resolver.NXDOMAIN:
                return
            except dns.exception.DNSException as error:
                failed.append(str(error))
                return
            if answer.rrset is not None:
                items = islice(answer.rrset, MAX_KEPT)
                found[kind] = [ipaddress.ip_address(item.address) for item in items]
                until.append(time.monotonic() + answer.rrset.ttl)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "A")
            tasks.start_soon(ask, "AAAA")
        addresses = [*found.get("A", ()), *found.get("AAAA", ())]
        if not addresses and failed:
            raise Unreachable(f"the name {name} could not be looked up: {failed[0]}")
        if len(self._kept) >= KEPT:
            self._kept.clear()
        self._kept[name] = min(until), addresses
        return addresses


async def connect(
    addresses: Sequence[Address], port: int, reach: Reach, name: str, begin: Begin
) -> tuple[socket.socket, Address]:
    """A connection to the first address that may be connected to and answers. Raises Unreachable.

    What was checked is what is connected to: the name is not looked up again. ``begin`` makes a connection,
    which may still be on its way.
    """
    if not addresses:
        raise Unreachable(f"the name {name} has no address")
    decisions = {address: reach.upstream(name, address, port) for address in addresses}
    allowed = [address for address, decision in decisions.items() if decision.allowed]
    if not allowed:
        refused = next(iter(decisions.values()))
        raise Unreachable(f"{name} is not where it may be: {refused.why}", refused)
    return await connect_to(allowed[:MAX_ADDRESSES], port, begin)


async def connect_to(addresses: Sequence[Address], port: int, begin: Begin) -> tuple[socket.socket, Address]:
    """A connection to the first of them that answers. Raises Unreachable."""
    why = ""
    for address in addresses:
        try:
            with anyio.fail_after(CONNECT_SECONDS):
                return await _connect(address, port, begin), address
        except TimeoutError:
            why = f"{address} does not answer at port {port}"
        except OSError as error:
            why = f"{address}, port {port}: {error.strerror or error}"
    raise Unreachable(why)


async def _connect(address: Address, port: int, begin: Begin) -> socket.socket:
    sock = await begin(address, port)
    try:
        await anyio.wait_writable(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code)) from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock
