"""``python -m sandboxd.egress FD UID``: serve what the daemon at the other end of the socket hands over."""

from __future__ import annotations

import base64
import gc
import os
import socket
import sys
import traceback
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import dns.rdata

from sandboxd.egress.budget import Budget
from sandboxd.egress.container import Container
from sandboxd.egress.injection import Secret
from sandboxd.egress.inward import Inward
from sandboxd.egress.jail import give_up
from sandboxd.egress.messages import MAX_FAULT, MAX_MESSAGE, Enter, Serve, Setup, decode, encode, rules_of
from sandboxd.egress.outside import NameServers, Outside
from sandboxd.egress.servers import Servers, host_authorities
from sandboxd.egress.upstream import Resolver, host_names
from sandboxd.kernel import descriptors
from sandboxd.reach import Reach

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anyio.abc import TaskGroup

    from sandboxd.egress.inspect import Inspection

DESCRIPTORS = 65536
DOORS = 5


class Worker:
    """Serves the containers of one caller until the daemon closes its end."""

    def __init__(
        self,
        sock: socket.socket,
        setup: Setup,
        *,
        hosts: Mapping[str, Sequence[str]],
        look: Callable[..., Inspection] | None,
    ) -> None:
        self._sock = sock
        self._outside = Outside(self._say)
        self._resolver = Resolver(setup.nameservers, hosts, setup.port, NameServers(self._outside))
        self._look = look
        self._containers: dict[str, Container] = {}
        self._inward = Inward(self._say)
        self._known: dict[str, dict[str, str]] = {}
        """Addresses of names that a container was told already, by a process that is gone."""
        self._secrets: dict[str, dict[str, Secret]] = {}
        self._rules: dict[str, tuple[Reach, dict[str, int]]] = {}

    async def run(self) -> None:
        """Until the end of the stream."""
        async with anyio.create_task_group() as tasks:
            while True:
                await anyio.wait_readable(self._sock)
                data, fds, _ = descriptors.receive(self._sock, MAX_MESSAGE, DOORS)
                if not data:
                    break
                kind, content = decode(data)
                self._take(tasks, kind, content, fds)
            tasks.cancel_scope.cancel()

    def _end(self, id_: str) -> None:
        container = self._containers.pop(id_, None)
        if container is not None:
            container.end()

    def _take(  # noqa: C901  (a line for each kind)
        self, tasks: TaskGroup, kind: str, content: dict[str, Any], fds: list[int]
    ) -> None:
        match kind:
            case "rules":
                rules = rules_of(content["rules"])
                self._rules[content["name"]] = Reach(rules), dict(rules.budget)
            case "names":
                self._known.setdefault(content["id"], {}).update(content["names"])
            case "serve" if len(fds) == DOORS:
                asked = Serve(**content)
                reach, budget = self._rules[asked.rules]
                say = partial(self._say, id=asked.id)
                container = self._containers[asked.id] = Container(
                    fds,
                    say,
                    reach=reach,
                    budget=Budget(budget, asked.left),
                    names=self._known.pop(asked.id, {}),
                    resolver=self._resolver,
                    begin=partial(self._outside.connect, asked.id),
                    look=self._look,
                )
                container.secrets.update(self._secrets.pop(asked.id, {}))
                container.begin(tasks)
            case "secrets":
                self._take_secrets(content["id"], content["values"])
            case "answer":
                self._take_answer(**content)
            case "connected":
                self._outside.connected(content["number"], content["code"], fds)
            case "reply":
                self._outside.replied(content["number"], content["data"])
            case "enter" if len(fds) == Inward.DESCRIPTORS:
                self._inward.begin(tasks, Enter(**content), fds)
            case "cut":
                self._inward.cut(content["id"])
            case "end":
                self._end(content["id"])
            case _:
                for fd in fds:
                    os.close(fd)

    def _take_secrets(self, id: str, values: dict[str, list[Any] | None]) -> None:  # noqa: A002
        container = self._containers.get(id)
        known = self._secrets.setdefault(id, {}) if container is None else container.secrets
        for name, found in values.items():
            if found is None:
                known.pop(name, None)
            else:
                known[name] = Secret(found[0], base64.b64decode(found[1]))

    def _take_answer(self, id: str, number: int, why: str, *, allowed: bool) -> None:  # noqa: A002
        if (container := self._containers.get(id)) is not None:  # else it has ended meanwhile
            container.questions.answer(number, allowed=allowed, why=why)

    def _say(self, kind: str, **content: object) -> None:
        self._sock.setblocking(True)  # the daemon reads at once; where it does not, this waits for it
        try:
            self._sock.send(encode(kind, content))
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(0)
        finally:
            self._sock.setblocking(False)


def _looking(setup: Setup) -> Callable[..., Inspection]:
    """What serves connections whose rules look into HTTP; most processes do without all that it needs."""
    from sandboxd.egress.inspect import Inspection  # noqa: PLC0415
    from sandboxd.egress.leaves import Leaves  # noqa: PLC0415

    servers = Servers(host_authorities() + setup.authorities)
    return partial(Inspection, leaves=Leaves(setup.authority, setup.authority_key), servers=servers)


async def main(fd: int, uid: int) -> None:
    """Become what serves, and serve."""
    sock = socket.socket(fileno=fd)
    try:
        sock.setblocking(False)
        # what is imported late elsewhere: no file can be opened later
        dns.rdata.load_all_types()
        await anyio.wait_readable(sock)
        _, said = decode(sock.recv(MAX_MESSAGE))
        setup = Setup(**said)
        hosts = host_names()
        look = _looking(setup) if setup.authority else None
        give_up(uid, DESCRIPTORS, base64.b64decode(setup.filter))
        gc.freeze()
        await Worker(sock, setup, hosts=hosts, look=look).run()
    except Exception:  # noqa: BLE001  (it can write no file, and has nobody else to tell)
        sock.setblocking(True)
        with suppress(OSError):
            sock.send(encode("fault", {"why": traceback.format_exc()[-MAX_FAULT:]}))
        os._exit(1)
    os._exit(0)  # the event loop's own end makes system calls that are not there any more


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]), int(sys.argv[2]))
