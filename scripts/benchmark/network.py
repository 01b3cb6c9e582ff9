"""What a network under rules costs: a connection, bytes, requests, a call; beside the host's loopback.

The server is on this host's loopback, and the containers reach it by a name that a policy allows. Client and
server are the same programs in and out of a container.
"""

from __future__ import annotations

import json
import socketserver
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import sandboxes
from measure import in_turn, summary

from sandboxd import Client
from sandboxd.conformance.outside import SERVED, open_outside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["network"]

RULES = 1000
GIB = 2**30
CLIENT = """
import json, socket, sys, time
host, port, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
address = socket.gethostbyname(host)  # the names are measured by those who ask for one each time
def connections(to):
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        with socket.create_connection((to, port)) as s:
            s.sendall(b"x")
            s.recv(1)
            taken.append(time.perf_counter() - began)
    return taken
def rate():
    buffer, got = bytearray(1 << 20), 0
    with socket.create_connection((address, port)) as s:
        s.sendall(b"%d\\n" % size)
        began = time.perf_counter()
        while read := s.recv_into(buffer):
            got += read
    assert got == size, got
    return got / (time.perf_counter() - began)
print(json.dumps({"by address": connections(address), "by name": connections(host), "rate": rate()}))
"""


REQUESTS = """
import json, socket, ssl, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
made = socket.create_connection((host, port))
made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
made = ssl.create_default_context().wrap_socket(made, server_hostname=host)
request = f"GET /x HTTP/1.1\\r\\nHost: {host}:{port}\\r\\nAccept: */*\\r\\n\\r\\n".encode()
began = time.perf_counter()
for _ in range(count):
    made.sendall(request)
    got = b""
    while not got.endswith(b"/x None\\n"):
        got += made.recv(65536)
print(json.dumps(time.perf_counter() - began))
"""


class _Answer(socketserver.BaseRequestHandler):
    """One byte is sent back; a number is answered with as many."""

    def handle(self) -> None:
        asked = self.request.recv(64)
        if asked == b"x":
            self.request.sendall(asked)
            self.request.recv(1)
            return
        left, piece = int(asked), bytes(1 << 20)
        while left:
            left -= self.request.send(piece[:left])


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 512


@contextmanager
def _serving() -> Iterator[int]:
    with _Server(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def _policies(port: int, web: int) -> dict[str, str]:
    allowed = [f"{{host: {SERVED}, ports: [{port}]}}", f"{{cidr: 127.0.0.0/8, ports: [{port}]}}"]
    many = [f"{{host: h{number}.test, ports: [{number % 7 + 1}]}}" for number in range(RULES - 2)]
    inside = [f"{{host: {SERVED}, ports: [{web}], within: [127.0.0.0/8], methods: [GET], paths: [/x]}}"]
    text = "version: 1\nname: {}\nextends: plain\nnetwork:\n  allow:\n{}"
    return {
        name: text.format(name, "".join(f"    - {rule}\n" for rule in rules))
        for name, rules in {"two-rules": allowed, "many-rules": many + allowed, "https": inside}.items()
    }


def network(images: Path, quick: bool, until: float, tell: Callable[[str], None]) -> dict[str, Any]:  # noqa: FBT001
    """Connections and bytes, direct and through rules; calls of ``true`` without and with a network."""
    count, size, rounds = (50, GIB // 4, 10) if quick else (500, 2 * GIB, 100)
    found: dict[str, Any] = {"rules": RULES, "bytes": size, "connections": {}, "mb_per_s": {}}
    with open_outside() as outside, _serving() as port, tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        (directory / "policies").mkdir()
        for policy, text in _policies(port, outside.web_port).items():
            (directory / "policies" / f"{policy}.yaml").write_text(text)
        arguments = [str(port), str(count), str(size)]
        with sandboxes.start(images, outside.config + sandboxes.WARM, directory=directory) as daemon:
            client = Client(daemon.socket, timeout=300.0)

            def inside(policy: str, *argv: str) -> str:
                argv = argv or ("python3", "-c", CLIENT, SERVED, *arguments)
                call = client.run(list(argv), policy=policy)
                if call.outcome is None or call.outcome.exit_code != 0 or call.stdout is None:
                    raise RuntimeError(f"{policy}: {call.outcome} {call.stderr}")
                return call.stdout.text or ""

            def direct() -> str:
                argv = [sys.executable, "-c", CLIENT, "127.0.0.1", *arguments]
                return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

            for who, ask in (
                ("the host's loopback", direct),
                ("two rules", lambda: inside("two-rules")),
                (f"{RULES:,} rules", lambda: inside("many-rules")),
            ):
                said = json.loads(ask())
                for how in ("by address", "by name"):
                    found["connections"][f"{who}, {how}"] = summary(said[how])
                found["mb_per_s"][who] = round(said["rate"] / 1e6)
                tell(f"{who}: {found['mb_per_s'][who]} MB/s\n")
            asked = ["python3", "-c", REQUESTS, SERVED, str(outside.web_port)]
            inside("https", *asked, "10")  # its process has started, and its certificate is made
            worked, requests = _work(daemon.pid), 4 * count
            seconds = json.loads(inside("https", *asked, str(requests)))
            worked = _work(daemon.pid) - worked
            found["https"] = {
                "requests": requests,
                "per_second": round(requests / seconds),
                "per_core": round(requests / worked),
            }
            tell(f"HTTPS that rules look into: {found['https']}\n")
            found["calls"] = _calls(client, rounds, until)
    return found


def _work(daemon: int) -> float:
    """Seconds of CPU of the processes that serve connections."""
    children = psutil.Process(daemon).children()
    serving = [child for child in children if "sandboxd.egress" in child.cmdline()]
    return sum(sum(child.cpu_times()[:2]) for child in serving)


def _calls(client: Client, rounds: int, until: float) -> dict[str, Any]:
    steps = {
        policy: lambda policy=policy: client.run(["true"], policy=policy)
        for policy in ("plain", "two-rules", "many-rules")
    }
    in_turn(steps, 3, until)  # what is made once is made now
    return in_turn(steps, rounds, until)
