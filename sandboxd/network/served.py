"""A container that is served, for the call that it belongs to, and what its process may say of it."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import select
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import anyio

from sandboxd import units
from sandboxd.egress.messages import MAX_NAMES
from sandboxd.models import NetworkEvent, NetworkRefusal, NetworkUse
from sandboxd.reach import Reach

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.network.namespace import Doors
    from sandboxd.network.process import Worker
    from sandboxd.network.questions import Questions
    from sandboxd.reach import NetworkRules

__all__ = ["MAX_EVENTS", "Secrets", "Served", "told_secrets"]

MAX_EVENTS = 2000  # of a call, by one process
MAX_KINDS = 256  # of refusals that are told apart
MAX_REFUSALS = 1000  # in the sum of a call's
MAX_LIMITS = 16  # names of those that were reached
MAX_NAME = 255

Secrets = Mapping[str, tuple[int, bytes] | None]
"""Version and value, by name; None: it may be given to no request any more."""


@dataclass
class Served:
    """One container, and the call that it belongs to."""

    id: str
    uid: int
    doors: Doors
    shape: str
    rules: NetworkRules
    on_event: Callable[[NetworkEvent], None]
    secrets: Secrets
    questions: Questions
    worker: Worker | None = None
    """Its process, once it has one."""
    _watched: select.epoll | None = None
    left: Mapping[str, int] = field(default_factory=dict)
    """Of its session's budget, by the names of that."""
    names: dict[str, str] = field(default_factory=dict)
    crashes: int = 0
    events: int = 0
    ending: bool = False
    inhabited: bool = False
    """Whether somebody lives in the container when it has ended."""
    awake: bool = False
    """Whether anybody in the container has connected to anything, asked for it, or was refused it."""
    handing: anyio.Lock = field(default_factory=anyio.Lock)
    """Held while its process is given it, or told something of it that takes the place of that."""
    ended: anyio.Event = field(default_factory=anyio.Event)
    use: NetworkUse = field(default_factory=NetworkUse)
    """In sum, by processes that are gone or have said their last word."""
    told: NetworkUse = field(default_factory=NetworkUse)
    """What its process has said so far that was used."""
    refused: dict[tuple[str, str, int | None, str], NetworkRefusal] = field(default_factory=dict)
    """The same of refusals, as events told of them."""

    @property
    def counts(self) -> bool:
        """Whether it may use no more than was counted, so that no other process can go on without that."""
        return bool(self.rules.budget or self.left)

    @cached_property
    def reach(self) -> Reach:
        """Its rules, by which each connection is checked again that its process asks for."""
        return Reach(self.rules)

    def hear(self, kind: str, content: dict[str, Any]) -> None:
        """What its process says of it. Raises ValueError and the like for what it may not say."""
        if self.ended.is_set():
            raise ValueError("it speaks of what has ended")
        assert self.worker is not None  # noqa: S101  (who speaks of it)
        match kind:
            case "event" if self.events < MAX_EVENTS:
                event = NetworkEvent.model_validate(content)
                self.events += 1
                self._note(event)
                self.on_event(event)
            case "used":
                self.told = NetworkUse.model_validate(content)
            case "name" if len(self.names) < MAX_NAMES:
                name, address = content["name"], ipaddress.IPv4Address(content["address"])
                self.names[str(name)[:MAX_NAME]] = str(address)
            case "ask" if any(rule.ask for rule in self.rules.allow):
                if not self.ending:  # else it has not heard yet that the call is over
                    self.questions.ask(content, self.worker.send)
            case "connect":
                self.worker.outward.connect(content, self.reach.leads)
            case "withdraw":
                self.questions.withdraw(int(content["number"]))
            case "ended":
                self._add(NetworkUse.model_validate(content))
                self.ended.set()
            case _:
                raise ValueError(f"unknown, or too often: {kind[:32]!r}")

    def watch(self, knocked: Callable[[], object]) -> None:
        """Call ``knocked`` once, when anything waits at one of the doors."""
        self._watched = watched = select.epoll()
        for fd in self.doors.descriptors:
            watched.register(fd, select.EPOLLIN)

        def knock() -> None:
            self.unwatch()
            self.awake = True
            knocked()

        asyncio.get_running_loop().add_reader(watched, knock)

    def unwatch(self) -> None:
        """Look no more. Safe to call twice."""
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched.close()
            self._watched = None

    def _note(self, event: NetworkEvent) -> None:
        """Keep what an event says of a refusal, should its process not live to say the sum of them."""
        if event.verdict != "denied":
            return
        key = event.protocol, event.name or event.address, event.port or None, event.why
        found = self.refused.get(key)
        if found is None and len(self.refused) >= MAX_KINDS:
            return
        count = 1 if found is None else found.count + 1
        self.refused[key] = NetworkRefusal(
            protocol=key[0], target=key[1], port=key[2], why=key[3], rule=event.rule, count=count
        )

    def _add(self, use: NetworkUse) -> None:
        before = self.use
        counts = {
            name: min(
                units.MAX, getattr(before, name) + getattr(use, name)
            )  # each process says what it likes
            for name in ("connections", "requests", "bytes_in", "bytes_out")
        }
        self.use = NetworkUse(
            refusals=[*before.refusals, *use.refusals][:MAX_REFUSALS],
            limits=sorted({*before.limits, *use.limits})[:MAX_LIMITS],
            whole=before.whole,
            **counts,
        )
        self.told, self.refused = NetworkUse(), {}

    def lose(self) -> None:
        """Its process is gone: what it had told of counts, and what it had not is not known."""
        self._add(self.told.model_copy(update={"refusals": list(self.refused.values())}))
        self.use = self.use.model_copy(update={"whole": False})

    def give_up(self) -> None:
        """Nobody serves it any more: what connects now is refused at once, and does not wait."""
        self.unwatch()
        self.doors.close()
        self.questions.close()
        self.ended.set()


def told_secrets(served: Served, secrets: Secrets) -> dict[str, object]:
    """Secrets of a container, as its process is told them."""
    values = {
        name: None if found is None else (found[0], base64.b64encode(found[1]).decode())
        for name, found in secrets.items()
    }
    return {"id": served.id, "values": values}
