"""What the daemon and a process of ``sandboxd.egress`` say to each other: JSON, each a datagram.

The daemon reads what a process says as it reads any stranger's: its types are checked, its size is bounded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sandboxd.httprule import HttpRule, Injection
from sandboxd.reach import Allow, Deny, NetworkRules

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_FAULT", "MAX_MESSAGE", "MAX_NAMES", "Enter", "Serve", "Setup", "decode", "encode", "rules_of"]

MAX_MESSAGE = 1 << 20
MAX_NAMES = 10_000  # of a container
MAX_FAULT = 8192  # characters told of one


@dataclass(frozen=True)
class Setup:
    """What a process is started with."""

    nameservers: tuple[str, ...]
    port: int
    filter: str
    """Of system calls, as base64."""
    authorities: str
    """Certificates of those that it believes beside the host's, as PEM."""
    authority: str
    """The certificate that containers trust, and below its key, as PEM; none: no rule looks into HTTP."""
    authority_key: str = field(repr=False)


@dataclass(frozen=True)
class Serve:
    """A container that a call has now; its sockets come with the message."""

    id: str
    rules: str
    """The name of rules that came before, in a message of their own."""
    left: Mapping[str, int] = field(default_factory=dict)
    """What its session has left of the budget of all its calls, by the names of ``network.budget``."""


@dataclass(frozen=True)
class Enter:
    """A connection of a caller to a port of its call's container.

    With it come the caller's connection, one into the container, and a file of what the caller sent already.
    """

    id: str
    """The call's."""
    number: int
    port: int
    prefix: str
    """What the caller's paths begin with, and the server's do not; without it nothing is taken for HTTP."""


def rules_of(content: Mapping[str, Any]) -> NetworkRules:
    """Rules from what was decoded."""
    return NetworkRules(
        tuple(
            Allow(*_rule(each), within=tuple(each["within"]), ask=each["ask"]) for each in content["allow"]
        ),
        tuple(Deny(*_rule(each)) for each in content["deny"]),
        tuple((name, limit) for name, limit in content["budget"]),
    )


def _rule(content: Mapping[str, Any]) -> tuple[str, tuple[int, ...], str, HttpRule | None]:
    return content["target"], tuple(content["ports"]), content["where"], _http(content["http"])


def _http(content: Mapping[str, Any] | None) -> HttpRule | None:
    if content is None:
        return None
    inject = content["inject"]
    return HttpRule(
        tuple(content["methods"]),
        tuple(content["paths"]),
        tuple((name, glob) for name, glob in content["headers"]),
        content["websocket"],
        None if inject is None else Injection(**inject),
    )


def encode(kind: str, content: object) -> bytes:
    """A message."""
    data = content if isinstance(content, dict) else asdict(content)  # type: ignore[call-overload]
    return json.dumps([kind, data], separators=(",", ":")).encode()


def decode(message: bytes) -> tuple[str, dict[str, Any]]:
    """Kind and content. Raises ValueError for what is no message."""
    found = json.loads(message)
    if not (isinstance(found, list) and len(found) == 2 and isinstance(found[0], str)):
        raise ValueError("no message")
    kind, content = found
    if not isinstance(content, dict):
        raise ValueError("no message")  # noqa: TRY004
    return kind, content
