"""What the suite's containers may reach: a name server, a server, and one of HTTPS, on this host's loopback.

The daemon asks the one for names, and the policy allows the other by the name that it has there. Nothing
of it is an address of somebody else's, and no network of this host is changed.
"""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MOVED", "SERVED", "Outside", "open_outside"]

HERE = "127.0.0.1"
SERVED, MOVED = "served.conformance.test", "moved.conformance.test"
"""Names of the server: one that the policy lets lead to this host, one that it does not."""


class _Page(BaseHTTPRequestHandler):
    """Says what it was asked, and which header it was given."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Web

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = f"{self.path} {self.headers.get('X-Given')}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_DELETE = do_GET  # noqa: N815  (so it is called)

    def log_message(self, *_: object) -> None: ...


class _Web(ThreadingHTTPServer):
    """With a certificate of its own, a file that holds it and its key."""

    daemon_threads = True

    def __init__(self, certificate: Path) -> None:
        super().__init__((HERE, 0), _Page)
        self.certificate = certificate
        self.asked: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, *_: object) -> None: ...  # of who does not believe it


def _certificate() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVED)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVED)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return (secret + made.public_bytes(pem)).decode()


class Outside:
    """The servers' ports, and what they were asked."""

    def __init__(self, dns_socket: socket.socket, server: socket.socket, web: _Web) -> None:
        self._dns = dns_socket
        self._server = server
        self._web = web
        self.asked: list[str] = []
        """The names that were asked for."""
        self.connections = 0

    @property
    def config(self) -> str:
        """What a daemon's configuration says to ask this name server, and to allow all that policies can."""
        asked = f"nameservers: [{HERE}], port: {self._dns.getsockname()[1]}"
        return f"network: {{host: true, {asked}, authorities: [{self._web.certificate}]}}\n"

    @property
    def port(self) -> int:
        """Where the server is."""
        port: int = self._server.getsockname()[1]
        return port

    @property
    def web_port(self) -> int:
        """Where the server of HTTPS is."""
        return self._web.server_port

    @property
    def requests(self) -> list[str]:
        """What it was asked: method and path."""
        return self._web.asked

    def answer_names(self) -> None:
        """Until its socket is closed."""
        with suppress(OSError):
            while True:
                question, sender = self._dns.recvfrom(4096)
                if sender is None:  # shut down: it would come at once for ever
                    return
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
    """The servers, until the end."""
    with (
        NamedTemporaryFile("w", suffix=".pem", prefix="sandboxd-conformance-") as certificate,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns_socket,
        socket.create_server((HERE, 0), backlog=64) as server,
        ExitStack() as stack,
    ):
        dns_socket.bind((HERE, 0))
        certificate.write(_certificate())
        certificate.flush()
        web = stack.enter_context(_Web(Path(certificate.name)))
        outside = Outside(dns_socket, server, web)
        threads = [
            threading.Thread(target=work, daemon=True)
            for work in (outside.answer_names, outside.answer_connections, web.serve_forever)
        ]
        for thread in threads:
            thread.start()
        try:
            yield outside
        finally:
            web.shutdown()
            for sock in (dns_socket, server):
                with suppress(OSError):  # wakes who waits for it; closing alone does not
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(timeout=15)
