"""What the packet filter of a container refuses: each is judged again, for the reason, and told of."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import anyio

from sandboxd.egress.names import stands_for_a_name
from sandboxd.egress.refused import read_refused
from sandboxd.egress.told import Connection
from sandboxd.reach import Decision

if TYPE_CHECKING:
    import socket

    from sandboxd.egress.names import Names
    from sandboxd.egress.told import Told
    from sandboxd.reach import Address, Reach

__all__ = ["Refusals"]


class Refusals:
    """Of one container; ``log`` is the filter's, and stays the caller's to close."""

    def __init__(self, log: socket.socket, names: Names, reach: Reach, told: Told) -> None:
        self._log = log
        self._names = names
        self._reach = reach
        self._told = told

    async def run(self) -> None:
        """Tell of all that comes."""
        while True:
            await anyio.wait_readable(self._log)
            self.drain()

    def drain(self) -> None:
        """Tell of what is there. Raises OSError."""
        while True:
            try:
                data = self._log.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    continue  # more came than was kept
                raise
            for refused in read_refused(data):
                self._tell(refused.protocol, refused.address, refused.port or 0)

    def _tell(self, protocol: str, address: Address, port: int) -> None:
        name = self._names.name_of(address) if stands_for_a_name(address) else None
        if protocol != "tcp":
            decision = Decision(
                allowed=False, why=f"{protocol} leaves no container, but for names to port 53"
            )
        elif name is not None:
            decision = self._reach.at(name, port)
        else:
            decision = self._reach.address(address, port)
        about = Connection(name, str(address), port, protocol, rule=decision.where)
        self._told.emit("denied", about, decision.why)
