"""What a network under rules costs: a connection, bytes, a call that has one; beside the host's loopback.

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
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sandboxes
from measure import summary

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


def _policies(port: int) -> dict[str, str]:
    allowed = [f"{{host: {SERVED}, ports: [{port}]}}", f"{{cidr: 127.0.0.0/8, ports: [{port}]}}"]
    many = [f"{{host: h{number}.test, ports: [{number % 7 + 1}]}}" for number in range(RULES - 2)]
    text = "version: 1\nname: {}\nextends: plain\nnetwork:\n  allow:\n{}"
    return {
        name: text.format(name, "".join(f"    - {rule}\n" for rule in rules))
        for name, rules in {"two-rules": allowed, "many-rules": many + allowed}.items()
    }


def network(images: Path, quick: bool, until: float, tell: Callable[[str], None]) -> dict[str, Any]:  # noqa: FBT001
    """Connections and bytes, direct and through rules; calls of ``true`` without and with a network."""
    count, size, rounds = (50, GIB // 4, 10) if quick else (500, 2 * GIB, 100)
    found: dict[str, Any] = {"rules": RULES, "bytes": size, "connections": {}, "mb_per_s": {}}
    with open_outside() as outside, _serving() as port, tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        (directory / "policies").mkdir()
        for policy, text in _policies(port).items():
            (directory / "policies" / f"{policy}.yaml").write_text(text)
        arguments = [str(port), str(count), str(size)]
        with sandboxes.start(images, outside.config + sandboxes.WARM, directory=directory) as daemon:
            client = Client(daemon.socket, timeout=300.0)

            def inside(policy: str) -> str:
                argv = ["python3", "-c", CLIENT, SERVED, *arguments]
                call = client.run(argv, policy=policy)
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
            found["calls"] = _calls(client, rounds, until)
    return found


def _calls(client: Client, rounds: int, until: float) -> dict[str, Any]:
    taken: dict[str, list[float]] = {"plain": [], "two-rules": [], "many-rules": []}
    for number in range(-3, rounds):
        if time.monotonic() > until:
            break
        for policy, times in taken.items():
            time.sleep(0.03)
            began = time.perf_counter()
            client.run(["true"], policy=policy)
            if number >= 0:
                times.append(time.perf_counter() - began)
    return {policy: summary(times) for policy, times in taken.items() if times}
