"""One process of ``sandboxd.egress``, as the daemon has it: the socket to it, and what it serves."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread

from sandboxd.egress.messages import MAX_MESSAGE
from sandboxd.kernel import descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sandboxd.network.outward import Outward
    from sandboxd.network.served import Served

__all__ = ["Server", "Worker"]


class Server(Protocol):
    """A process that serves connections, to those who have some there."""

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Tell it something. Raises OSError when it is gone."""

    def kill(self) -> None:
        """End it, and all that it serves."""


class Worker:
    """One process, and the socket to it."""

    def __init__(self, caller: int, uid: int, *, looks: bool) -> None:
        self.caller = caller
        self.looks = looks
        """Whether it has what rules need that look into HTTP: the authority's key, and programs for TLS."""
        self.uid = uid
        self.containers: dict[str, Served] = {}
        self.inward: dict[int, Callable[[dict[str, object] | None], None]] = {}
        """Who is told of the end of a connection into a container, or that nobody will say how it ended."""
        self.name = f"egress-{uid}"
        self.ready = anyio.Event()
        """Set when it takes containers, or never will."""
        self.faults = 0
        self.outward: Outward
        self.rules: set[str] = set()
        """The names of those that it has."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            descriptors.let_wait(sock, 4 * MAX_MESSAGE)
        ours.setblocking(False)
        self.sock = ours
        self.sender = descriptors.Sender(ours)
        self.send = self.sender.send
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-m", "sandboxd.egress", str(theirs.fileno()), str(uid)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"LANG": "C.UTF-8"},
            )

    def hear(self, kind: str, content: dict[str, Any]) -> None:
        """What it says that is of no container. Raises ValueError and the like for what it may not say."""
        match kind:
            case "inward":
                self.inward.pop(content["number"])(content)
            case "connect":
                self.outward.connect(content, None)
            case "query":
                self.outward.query(content)
            case "enough":
                self.outward.enough(int(content["number"]))
            case _:
                raise ValueError(f"unknown: {kind[:32]!r}")

    def kill(self) -> None:
        """End the process; its end is heard like any other."""
        self.process.kill()

    async def stop(self) -> None:
        """End the process and reap it."""
        self.process.kill()
        await anyio.to_thread.run_sync(self.process.wait)
        self.sock.close()  # not before: who waits until it can be written would never wake
