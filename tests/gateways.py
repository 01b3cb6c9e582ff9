"""The daemon's side of the network without a daemon: namespaces to serve, and processes that pretend to."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sandboxd.kernel.inside import in_new_network_namespace
from sandboxd.network.chain import write_chain
from sandboxd.network.namespace import open_doors
from sandboxd.reach import Reach

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

    from sandboxd.kernel.cgroup import CgroupLimits
    from sandboxd.reach import NetworkRules

PRETENDER = """\
#!{python}
import json, socket, sys
sock = socket.socket(fileno=int(sys.argv[4]))
held = []
while True:
    data, fds, _, _ = socket.recv_fds(sock, 1 << 20, 5)
    if not data: break
    kind, content = json.loads(data)
    held += fds
    if kind == {kind!r}:
        for message in open({said!r}).read().split("\\n"):
            if message:
                message = message.replace("NUMBER", str(content.get("number")))
                sock.send(message.replace("ID", content["id"]).encode())
"""


class Unconfined:
    """No cgroups."""

    async def confine(self, name: str, pid: int, limits: CgroupLimits) -> None: ...

    async def release(self, name: str) -> None: ...


class Part:
    """What of a slot concerns its network."""

    def __init__(self, doors: Any, rules: NetworkRules) -> None:
        self.doors, self.shape = doors, self
        self.network, self.digest, self.expose = rules, "shape", ()


@contextmanager
def served(rules: NetworkRules) -> Iterator[tuple[int, Any]]:
    """A network namespace of its own with these rules, and what of a slot concerns it."""
    namespace = in_new_network_namespace(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY))
    try:
        doors = open_doors(namespace, write_chain(Reach(rules)))
        try:
            yield namespace, Part(doors, rules)
        finally:
            doors.close()
    finally:
        os.close(namespace)


def pretend(monkeypatch: pytest.MonkeyPatch, place: Path, kind: str, *messages: str) -> None:
    """Have every process that serves be one that says these messages when it is told something of a kind."""
    said, program = place / "said", place / "program"
    said.write_text("\n".join(messages))
    program.write_text(PRETENDER.format(python=sys.executable, said=str(said), kind=kind))
    program.chmod(0o700)
    monkeypatch.setattr("sandboxd.network.gateway.sys.executable", str(program))
