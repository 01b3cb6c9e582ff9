"""One container: every connection, question and refused attempt of it, until its call is over."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import select
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio

from sandboxd.egress import hello, upstream
from sandboxd.egress.greeting import first_said
from sandboxd.egress.injection import inject
from sandboxd.egress.messages import MAX_FAULT
from sandboxd.egress.names import Names, stands_for_a_name
from sandboxd.egress.nameserver import NameServer
from sandboxd.egress.questions import Questions
from sandboxd.egress.refusals import Refusals
from sandboxd.egress.relay import Cut, cut, resets
from sandboxd.egress.site import Site
from sandboxd.egress.streams import Counted, Left, Plain, while_there
from sandboxd.egress.through import GRACE, Through
from sandboxd.egress.told import Connection, Told
from sandboxd.reach import Decision

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from anyio.abc import TaskGroup

    from sandboxd.egress.budget import Budget
    from sandboxd.egress.injection import Secret
    from sandboxd.egress.inspect import Inspection
    from sandboxd.egress.site import Exchange
    from sandboxd.reach import Address, Reach

__all__ = ["Container"]

SILENT_SECONDS = 30.0  # that a program may be where HTTP alone is spoken
KINDS = (
    (socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_STREAM),
    (socket.AF_INET6, socket.SOCK_DGRAM), (socket.AF_INET6, socket.SOCK_STREAM),
    (socket.AF_NETLINK, socket.SOCK_RAW),
)  # fmt: skip
"""Of the sockets that it is given."""
MAX_OPEN = 4096  # connections at once
LOOK_AGAIN = 0.005  # seconds between two looks whether what waited was taken
TELL_SECONDS = 0.25  # after which the daemon knows what was used
MAX_FAULTS = 3
TOO_LATE = "the call ended before anything was connected to"


class Container:
    """Serves the sockets of one container; ``say`` takes what the daemon is told of it."""

    def __init__(
        self,
        fds: Sequence[int],
        say: Callable[..., None],
        *,
        reach: Reach,
        budget: Budget,
        names: dict[str, str],
        resolver: upstream.Resolver,
        begin: Callable[[Address, int], Awaitable[socket.socket]],
        look: Callable[[Counted, Site, Callable[[], Awaitable[socket.socket]]], Inspection] | None,
    ) -> None:
        """``fds``: those of ``network.namespace.Doors``, in its order; this owns them from now on.

        ``look`` serves connections whose rules look into HTTP, ``begin`` makes those outside, by these rules.
        ``names``: those that it was told before, with their addresses.
        """
        self._reach = reach
        self._budget = budget
        self._resolver = resolver
        self._begin = begin
        self._look = look
        self.secrets: dict[str, Secret] = {}
        """What requests may be given on their way out; what is written here, the next request has."""
        self._say = say
        self._sockets = [socket.socket(*kind, 0, fd) for kind, fd in zip(KINDS, fds, strict=True)]
        *_, log = self._sockets
        self._names = Names(
            self._reach,
            known=names,
            on_new=lambda name, address: say("name", name=name, address=address),
            on_refused=self._on_refused_name,
        )
        self._name_server = NameServer(self._names.answer, self._fault)
        self._told = Told(say)
        self._refused = Refusals(log, self._names, self._reach, self._told)
        self.questions = Questions(say)
        self._faults = 0
        self._open = 0
        self._scope = anyio.CancelScope()
        self._ending = self._closed = False
        self._relays: set[Through] = set()
        self._telling: asyncio.TimerHandle | None = None
        budget.on_use = self._tell_soon

    def begin(self, tasks: TaskGroup) -> None:
        """Serve it from now on."""
        tasks.start_soon(self._serve)

    async def _serve(self) -> None:
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    tcp, tcp6, dns, dns_tcp, _ = self._sockets
                    for listener in (tcp, tcp6):
                        tasks.start_soon(self._accept, tasks, listener, self._connection)
                    tasks.start_soon(self._accept, tasks, dns_tcp, self._name_server.stream)
                    tasks.start_soon(self._name_server.datagrams, dns)
                    tasks.start_soon(self._refused.run)
        finally:
            with suppress(OSError):
                self._refused.drain()
            self._tell_of_waiting()
            self._close()

    def end(self) -> None:
        """Deliver what programs have said, for as long as ``GRACE``; then the sum of all is told.

        Nobody lives in the container any more: what they wrote is all that can come.
        """
        self._ending = True
        self.questions.close(TOO_LATE)
        for relay in self._relays:
            relay.leave()
        self._scope.deadline = anyio.current_time() + GRACE
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        """End when every connection is over, and nothing waits that nobody has taken yet."""
        if not self._ending or self._open or self._closed:
            return
        waiting = select.poll()
        for sock in self._sockets[:-1]:
            waiting.register(sock, select.POLLIN)
        if waiting.poll(0):
            asyncio.get_running_loop().call_later(LOOK_AGAIN, self._end_if_idle)
        else:
            self._scope.cancel()

    def _tell_of_waiting(self) -> None:
        """Of the connections that nobody has taken yet, since their program ended right after."""
        for listener in self._sockets[:2]:
            with suppress(OSError):
                for _ in range(MAX_OPEN):
                    accepted, _ = listener.accept()
                    with accepted:
                        host, port = accepted.getsockname()[:2]
                        address = ipaddress.ip_address(host)
                        name = self._names.name_of(address) if stands_for_a_name(address) else None
                        self._told.emit("failed", Connection(name, str(address), port), TOO_LATE)

    def _close(self) -> None:
        self._closed = True
        for sock in self._sockets:
            sock.close()
        if self._telling is not None:
            self._telling.cancel()
        self._budget.on_use = lambda: None
        self._say("ended", refusals=self._told.refusals, **self._used())

    def _used(self) -> dict[str, object]:
        return {
            "limits": sorted(self._budget.reached),
            "connections": self._budget.connections,
            "requests": self._budget.requests,
            "bytes_in": self._budget.used["in"],
            "bytes_out": self._budget.used["out"],
        }

    def _tell_soon(self) -> None:
        """Something was used: the daemon hears of it before long, should this process not live to its end."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell_used)

    def _tell_used(self) -> None:
        self._telling = None
        self._say("used", **self._used())

    # events

    def _on_refused_name(self, name: str, decision: Decision) -> None:
        self._told.emit("denied", Connection(name, "", 0, "dns", rule=decision.where), decision.why)

    def _fault(self) -> None:
        """Tell of what was raised and should not have been, as long as nobody makes it a habit."""
        self._faults += 1
        if self._faults <= MAX_FAULTS:
            self._say("fault", why=traceback.format_exc()[-MAX_FAULT:])

    # connections

    async def _accept(
        self, tasks: TaskGroup, listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(listener)
                continue
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await anyio.sleep(0.05)
                continue
            if self._open >= MAX_OPEN:
                self._told.emit("limit", Connection(None, "", 0), f"{MAX_OPEN} connections are open already")
                cut(accepted)
                await anyio.lowlevel.checkpoint()
                continue
            accepted.setblocking(False)
            with suppress(OSError):
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            resets(accepted, reset=True)
            self._open += 1
            tasks.start_soon(self._guarded, serve, accepted)
            await anyio.lowlevel.checkpoint()  # connections may come faster than they are taken

    async def _guarded(
        self, serve: Callable[[socket.socket], Awaitable[None]], accepted: socket.socket
    ) -> None:
        try:
            await serve(accepted)
        except OSError:
            cut(accepted)
        except Exception:  # noqa: BLE001  (one connection's, and no reason to end the others)
            cut(accepted)
            self._fault()
        finally:
            self._open -= 1
            accepted.close()
            self._end_if_idle()

    async def _connection(self, client: socket.socket) -> None:
        host, port = client.getsockname()[:2]
        address = ipaddress.ip_address(host)
        connection = Connection(None, str(address), port, begun=time.monotonic())
        if (limit := self._budget.connect()) is not None:
            self._told.emit("limit", connection, f"network.budget.{limit} is used up")
            cut(client)
            return
        if stands_for_a_name(address):
            connection.name = self._names.name_of(address)
            if connection.name is None:
                decision = Decision(allowed=False, why=f"{address} stands for no name that was asked for")
            else:
                decision = self._reach.at(connection.name, port)
        else:
            decision = self._reach.address(address, port)
        connection.rule = decision.where
        if decision.asks:
            decision = await self._ask(client, connection, decision)
        if not decision.allowed:
            self._told.emit("denied", connection, decision.why)
            cut(client)
            return
        if connection.name is not None and self._reach.looks_inside(connection.name, port):
            await self._inspect(client, connection, connection.name)
            return
        try:
            server, found = await self._connect(connection, address)
        except upstream.Unreachable as error:
            if error.refused is not None:
                connection.rule = error.refused.where
            self._told.emit("denied" if error.refused else "failed", connection, str(error))
            cut(client)
            return
        except anyio.get_cancelled_exc_class():
            self._told.emit("failed", connection, TOO_LATE)
            raise
        connection.upstream = str(found)
        with server:
            await self._relay(client, server, connection)

    async def _ask(self, client: socket.socket, connection: Connection, decision: Decision) -> Decision:
        """Wait for somebody to decide on a connection, of which nothing is read before. Raises Left."""
        try:
            return await while_there(Plain(client), self.questions.ask(connection, decision))
        except Left as error:
            self._told.emit("failed", connection, str(error))
            raise
        except anyio.get_cancelled_exc_class():
            self._told.emit("failed", connection, TOO_LATE)
            raise

    async def _connect(self, connection: Connection, address: Address) -> tuple[socket.socket, Address]:
        if connection.name is None:
            return await upstream.connect_to([address], connection.port, self._begin)
        addresses = await self._resolver.addresses(connection.name)
        return await upstream.connect(addresses, connection.port, self._reach, connection.name, self._begin)

    async def _relay(self, client: socket.socket, server: socket.socket, connection: Connection) -> None:
        relay = Through(client, server, connection.name, self._budget)
        self._relays.add(relay)
        if self._ending:
            relay.leave()
        try:
            await relay.run()
        finally:
            self._relays.discard(relay)
            connection.sent, connection.received = relay.moved
            self._told.emit(relay.verdict, connection, relay.why)

    async def _inspect(self, client: socket.socket, connection: Connection, name: str) -> None:
        """Serve a connection whose rules look into HTTP."""
        verdict, why, counted = "failed", TOO_LATE, None
        try:
            first, rest, found = await first_said(client, connection.name, silent=SILENT_SECONDS)
            first += rest
            counted = Counted(client, first, self._budget)
            site = Site(
                name,
                connection.port,
                "http" if found is None else "https",
                reach=self._reach,
                budget=self._budget,
                ask=lambda exchange, decision: self.questions.ask(_of(connection, exchange), decision),
                inject=partial(inject, self.secrets),
                tell=partial(self._on_exchange, connection),
            )

            async def connect() -> socket.socket:
                addresses = await self._resolver.addresses(name)
                server, at = await upstream.connect(
                    addresses, connection.port, self._reach, name, self._begin
                )
                connection.upstream = str(at)
                return server

            assert self._look is not None  # noqa: S101  (a process without it gets no such rules)
            await self._look(counted, site, connect).run(found, first)
            verdict, why = "allowed", ""
        except hello.HelloMalformed as error:
            verdict, why = "denied", str(error)
            with suppress(OSError):
                client.send(hello.alert(hello.UNRECOGNIZED_NAME))
        except Cut as error:
            self._budget.reached.add(error.limit)
            verdict, why = "limit", f"network.budget.{error.limit} is used up"
        except OSError as error:
            why = str(error)
        finally:
            if counted is not None:
                connection.sent, connection.received = counted.sent, counted.received
            self._told.emit(verdict, connection, why)
        resets(client, reset=verdict != "allowed")

    def _on_exchange(self, connection: Connection, exchange: Exchange, verdict: str, why: str) -> None:
        self._told.emit(verdict, _of(connection, exchange), why)


def _of(connection: Connection, exchange: Exchange) -> Connection:
    """What is said of a connection, of a request in it."""
    return replace(
        connection,
        protocol=exchange.protocol,
        rule=exchange.rule,
        begun=exchange.begun,
        sent=exchange.sent,
        received=exchange.received,
        method=exchange.method,
        path=exchange.path,
        status=exchange.status,
        secrets=exchange.secrets,
    )
