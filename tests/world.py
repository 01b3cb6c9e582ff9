"""An internet for tests: hosts in a network namespace of their own, and this host's way there.

Its addresses look public, since nothing is reached that does not; one is private. Servers run in threads of
the test's process, on sockets that were opened in that namespace.
"""

from __future__ import annotations

import fcntl
import os
import socket
import socketserver
import ssl
import subprocess
import threading
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from sandboxd.kernel.inside import in_network_namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["DNS", "FILES_NAME", "PRIVATE", "WWW", "World", "start_world"]

HERE, WWW, OTHER, FILES = "93.184.216.1", "93.184.216.34", "93.184.216.35", "93.184.216.36"
WEB, KEYED = "93.184.216.37", "93.184.216.38"
FILES_NAME = "files.example.test"
DNS = "93.184.216.53"
PRIVATE, METADATA = "10.91.7.2", "169.254.169.254"


class Page(BaseHTTPRequestHandler):
    """Answers every GET with the host that was asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.headers['Host']} {self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        while size:
            size -= len(self.rfile.read(min(size, 1 << 16)))
        self.do_GET()

    def log_message(self, *_: object) -> None: ...


class Echo(socketserver.BaseRequestHandler):
    """Sends back what comes."""

    def handle(self) -> None:
        with suppress(OSError):
            while data := self.request.recv(1 << 16):
                self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, *_: object) -> None: ...  # clients that go away are what is tested


class _Wrapped(ssl.SSLSocket):
    """Closed in the end, also where its peer was gone before it was whole: the library leaves that open."""

    def __del__(self) -> None:
        self.close()


class World:
    """The hosts. ``records`` are the names of its DNS: by name, addresses of both families."""

    def __init__(self, namespace: int, stack: ExitStack, directory: Path) -> None:
        self._namespace = namespace
        self._stack = stack
        self._directory = directory
        self.records: dict[str, list[str]] = {}
        self.asked: list[str] = []
        """The questions that its DNS got."""
        self.reached: list[tuple[str, int]] = []
        """Every connection that a server got."""

    def socket(self, address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A bound socket."""

        def bound() -> socket.socket:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, kind)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            return sock

        return in_network_namespace(self._namespace, bound)

    def serve(
        self,
        address: str,
        port: int,
        handler: Callable[..., socketserver.BaseRequestHandler] = Page,
        tls: str | None = None,
    ) -> None:
        """Start a server; with ``tls``, one that has a certificate for that name."""
        context = None if tls is None else self._context(tls)
        reached = self.reached

        class Server(_Server):
            def get_request(self) -> tuple[Any, Any]:
                sock, peer = super().get_request()
                reached.append((address, port))
                return sock, peer

            def finish_request(self, request: Any, client_address: Any) -> None:
                if context is not None:
                    try:
                        request = context.wrap_socket(request, server_side=True)
                    except OSError:
                        return
                try:
                    super().finish_request(request, client_address)
                finally:
                    request.close()

        server = Server((address, port), handler, bind_and_activate=False)
        server.socket.close()
        server.socket = self.socket(address, port)
        server.server_activate()
        self._run(server)

    def _run(self, server: socketserver.BaseServer) -> None:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stack.callback(stop)

    def certificate(self, name: str) -> Path:
        """A file with a key and a self-signed certificate for a name."""
        file = self._directory / f"{name}.pem"
        if not file.exists():
            asked = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
            names = ["-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
            files = ["-keyout", f"{file}.key", "-out", f"{file}.crt"]
            subprocess.run([*asked, *names, *files], check=True, capture_output=True)
            file.write_text(Path(f"{file}.key").read_text() + Path(f"{file}.crt").read_text())
        return file

    def _context(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sslsocket_class = _Wrapped
        context.load_cert_chain(self.certificate(name))
        return context

    def serve_dns(self) -> None:
        """Start its DNS at ``DNS``."""
        world = self

        class Answer(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, sock = self.request
                sock.sendto(world.answer(data), self.client_address)

        server = socketserver.ThreadingUDPServer((DNS, 53), Answer, bind_and_activate=False)
        server.daemon_threads = True
        server.socket.close()
        server.socket = self.socket(DNS, 53, socket.SOCK_DGRAM)
        self._run(server)

    def answer(self, question: bytes) -> bytes:
        """What its DNS says."""
        query = dns.message.from_wire(question)
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        name = query.question[0].name.to_text(omit_final_dot=True).lower()
        kind = query.question[0].rdtype
        self.asked.append(name)
        if name not in self.records:
            response.set_rcode(dns.rcode.NXDOMAIN)
            return response.to_wire()
        six = kind == dns.rdatatype.AAAA
        found = [address for address in self.records[name] if (":" in address) == six]
        if found and kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            response.answer.append(dns.rrset.from_text(f"{name}.", 0, "IN", kind, *found))
        return response.to_wire()


@contextmanager
def start_world(directory: Path) -> Iterator[World]:
    """The namespace, the way to it, its DNS; all of it is gone afterwards."""
    name = f"sandboxd-world-{os.getpid()}"
    here = f"sbxw{os.getpid() % 10**9}"[:15]

    def run(*argv: str) -> None:
        subprocess.run(argv, check=True, capture_output=True)

    with ExitStack() as stack:
        lock = stack.enter_context(Path("/run/lock/tests-world").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # its addresses are there once on a host
        for left in Path("/run/netns").glob("sandboxd-world-*"):  # of a session that was killed
            subprocess.run(["ip", "netns", "del", left.name], capture_output=True, check=False)
        run("ip", "netns", "add", name)
        stack.callback(run, "ip", "netns", "del", name)
        run("ip", "link", "add", here, "type", "veth", "peer", "name", "world", "netns", name)
        stack.callback(lambda: subprocess.run(["ip", "link", "del", here], capture_output=True, check=False))
        run("ip", "addr", "add", f"{HERE}/24", "dev", here)
        run("ip", "link", "set", here, "up")
        for address in (PRIVATE, METADATA):
            run("ip", "route", "add", f"{address}/32", "via", WWW, "dev", here, "onlink")
        inside = ("ip", "-n", name)
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "set", "world", "up")
        for address in (
            f"{WWW}/24",
            f"{OTHER}/24",
            f"{FILES}/24",
            f"{WEB}/24",
            f"{KEYED}/24",
            f"{DNS}/24",
            f"{PRIVATE}/32",
            f"{METADATA}/32",
        ):
            run(*inside, "addr", "add", address, "dev", "world")
        namespace = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, namespace)
        world = World(namespace, stack, directory)
        world.serve_dns()
        yield world
