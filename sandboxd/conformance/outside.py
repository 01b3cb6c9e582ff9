"""What the suite's containers may reach: a name server and a server, on this host's loopback.

The daemon asks the one for names, and the policy allows the other by the name that it has there. Nothing
of it is an address of somebody else's, and no network of this host is changed.
"""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MOVED", "SERVED", "Outside", "open_outside"]

HERE = "127.0.0.1"
SERVED, MOVED = "served.conformance.test", "moved.conformance.test"
"""Names of the server: one that the policy lets lead to this host, one that it does not."""


class Outside:
    """The servers' ports, and what they were asked."""

    def __init__(self, dns_socket: socket.socket, server: socket.socket) -> None:
        self._dns = dns_socket
        self._server = server
        self.asked: list[str] = []
        """The names that were asked for."""
        self.connections = 0

    @property
    def config(self) -> str:
        """What a daemon's configuration says to ask this name server, and to allow all that policies can."""
        port = self._dns.getsockname()[1]
        return f"network: {{host: true, nameservers: [{HERE}], port: {port}}}\n"

    @property
    def port(self) -> int:
        """Where the server is."""
        port: int = self._server.getsockname()[1]
        return port

    def answer_names(self) -> None:
        """Until its socket is closed."""
        with suppress(OSError):
            while True:
                question, sender = self._dns.recvfrom(4096)
                with suppress(dns.exception.DNSException):
                    self._dns.sendto(self._answer(question), sender)

    def _answer(self, question: bytes) -> bytes:
        query = dns.message.from_wire(question)
        name = query.question[0].name.to_text(omit_final_dot=True)
        self.asked.append(name)
        response = dns.message.make_response(query)
        if name not in {SERVED, MOVED}:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif query.question[0].rdtype == dns.rdatatype.A:
            response.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", "A", HERE))
        return response.to_wire()

    def answer_connections(self) -> None:
        """Send back what comes, in each connection after the other; until its socket is closed."""
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self.connections += 1
                with connection, suppress(OSError):
                    connection.settimeout(10)
                    while data := connection.recv(65536):
                        connection.sendall(data)


@contextmanager
def open_outside() -> Iterator[Outside]:
    """Both servers, until the end."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns_socket,
        socket.create_server((HERE, 0), backlog=64) as server,
    ):
        dns_socket.bind((HERE, 0))
        outside = Outside(dns_socket, server)
        threads = [
            threading.Thread(target=work, daemon=True)
            for work in (outside.answer_names, outside.answer_connections)
        ]
        for thread in threads:
            thread.start()
        try:
            yield outside
        finally:
            for sock in (dns_socket, server):
                with suppress(OSError):  # wakes who waits for it; closing alone does not
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(timeout=15)
