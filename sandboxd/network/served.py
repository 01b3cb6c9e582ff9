"""A container that is served, for the call that it belongs to, and what its process may say of it."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import anyio

from sandboxd.egress.messages import MAX_NAMES
from sandboxd.models import NetworkEvent, NetworkUse
from sandboxd.reach import Reach

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.network.namespace import Doors
    from sandboxd.network.process import Worker
    from sandboxd.network.questions import Questions
    from sandboxd.reach import NetworkRules

__all__ = ["MAX_EVENTS", "Secrets", "Served", "told_secrets"]

MAX_EVENTS = 2000  # of a call, by one process
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
    worker: Worker
    secrets: Secrets
    questions: Questions
    names: dict[str, str] = field(default_factory=dict)
    crashes: int = 0
    events: int = 0
    ending: bool = False
    awake: bool = False
    """Whether anybody in the container has connected to anything, asked for it, or was refused it."""
    quiet: bool = False
    """It has ended and was never awake: nobody waits for its process's last word."""
    ended: anyio.Event = field(default_factory=anyio.Event)
    use: NetworkUse = field(default_factory=NetworkUse)

    @cached_property
    def reach(self) -> Reach:
        """Its rules, by which each connection is checked again that its process asks for."""
        return Reach(self.rules)

    def hear(self, kind: str, content: dict[str, Any]) -> None:  # noqa: C901  (a line for each kind)
        """What its process says of it. Raises ValueError and the like for what it may not say."""
        if self.ended.is_set():
            raise ValueError("it speaks of what has ended")
        if self.quiet and kind != "ended":
            return  # of a call that is over
        match kind:
            case "awake":
                self.awake = True
            case "event" if self.events < MAX_EVENTS:
                event = NetworkEvent.model_validate(content)
                self.events += 1
                self.on_event(event)
            case "name" if len(self.names) < MAX_NAMES:
                name, address = content["name"], ipaddress.IPv4Address(content["address"])
                self.names[str(name)[:MAX_NAME]] = str(address)
            case "ask":
                if not self.ending:  # else it has not heard yet that the call is over
                    self.questions.ask(content, self.worker.send)
            case "connect":
                self.worker.outward.connect(content, self.reach.leads)
            case "withdraw":
                self.questions.withdraw(int(content["number"]))
            case "ended":
                self.use = NetworkUse.model_validate(content)
                self.ended.set()
            case _:
                raise ValueError(f"unknown, or too often: {kind[:32]!r}")

    def give_up(self) -> None:
        """Nobody serves it any more: what connects now is refused at once, and does not wait."""
        self.doors.close()
        self.questions.close()
        self.ended.set()


def told_secrets(served: Served, secrets: Secrets) -> dict[str, object]:
    values = {
        name: None if found is None else (found[0], base64.b64encode(found[1]).decode())
        for name, found in secrets.items()
    }
    return {"id": served.id, "values": values}
