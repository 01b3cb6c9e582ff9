"""One call in flight, and what is made of its request."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import anyio
import anyio.to_thread

from sandboxd import canonical
from sandboxd.models import Bytes
from sandboxd.supervisor.attempt import Payload
from sandboxd.supervisor.streams import Stdin

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd import plan
    from sandboxd.api.identity import Caller
    from sandboxd.journal.spool import Spool
    from sandboxd.models import Invocation, Request
    from sandboxd.room import Held
    from sandboxd.session import CallSession
    from sandboxd.supervisor.attempt import Attempt
    from sandboxd.supervisor.ending import Deadline
    from sandboxd.supervisor.network import CallNetwork
    from sandboxd.supervisor.secrets import CallSecrets

__all__ = ["Call", "off_the_loop", "payload_of", "request_digest"]

LARGE = 256 * 1024  # characters of inputs that are not hashed and decoded on the event loop

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False)
class Call:
    """One call in flight."""

    invocation: Invocation
    caller: Caller
    plan: plan.Plan
    payload: Payload
    spool: Spool
    deadline: Deadline | None
    held: Held
    secrets: CallSecrets
    session: CallSession | None = None
    cancelled: bool = False
    attempt: Attempt | None = None
    network: CallNetwork | None = None
    stdin: Stdin = field(default_factory=Stdin)
    queue_scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)
    decided: anyio.Event = field(default_factory=anyio.Event)
    """Set when the acceptance is on disk, or ``refused``: until then all is made ready, and nothing runs."""
    refused: bool = False

    def refuse(self) -> None:
        """The acceptance was not written: there is no such call, and what was made ready for it goes."""
        self.refused = True
        self.cancel()
        self.decided.set()

    def cancel(self) -> None:
        """Ask for the outcome ``cancelled``, in whatever state the call is."""
        self.cancelled = True
        if self.attempt is not None:
            self.attempt.cancel()
        else:
            self.queue_scope.cancel()


async def off_the_loop(request: Request, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function whose time grows with the request's bytes: in a thread where they are many."""
    contents = [item.content for item in request.inputs]
    contents += [item for item in (request.tar, request.stdin) if isinstance(item, Bytes)]
    if sum(len(item.text or item.base64 or "") for item in contents) < LARGE:
        return function(*args, **kwargs)
    return await anyio.to_thread.run_sync(partial(function, *args, **kwargs))


def payload_of(request: Request) -> Payload:
    """The bytes of a request."""

    def data(content: Bytes | None) -> bytes | None:
        return None if content is None else content.decode()

    stdin = None if isinstance(request.stdin, str) else request.stdin.decode()
    inputs = tuple((item.path, item.content.decode(), item.mode) for item in request.inputs)
    return Payload(inputs, data(request.tar), stdin)


def request_digest(request: Request) -> str:
    """The digest of all that a request asks for, its key aside."""
    asked = request.model_dump(
        mode="json",
        exclude={
            "key": True,
            "inputs": {"__all__": {"content"}},
            "tar": True,
            "stdin": isinstance(request.stdin, Bytes),
        },
        exclude_none=True,
    )
    payload = payload_of(request)  # by digest: as JSON it is tens of MiB that the event loop would wait for
    asked["contents"] = [canonical.digest_bytes(data) for _, data, _ in payload.inputs]
    asked["given"] = [None if d is None else canonical.digest_bytes(d) for d in (payload.tar, payload.stdin)]
    if "cpus" in (limits := asked.get("limits", {})):
        limits["cpus"] = str(limits["cpus"])  # canonical JSON of a float depends on how it was written
    return canonical.digest(asked)
