"""One call in flight, and what is made of its request."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import anyio
import anyio.to_thread

from sandboxd.models import Bytes
from sandboxd.supervisor.payload import Payload
from sandboxd.supervisor.streams import Stdin

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd import plan
    from sandboxd.api.identity import Caller
    from sandboxd.journal.spool import Spool
    from sandboxd.models import Callback, Invocation, Request
    from sandboxd.retries import Retries
    from sandboxd.room import Held
    from sandboxd.scheduler import Ticket
    from sandboxd.session import CallSession
    from sandboxd.supervisor.attempt import Attempt
    from sandboxd.supervisor.ending import Deadline
    from sandboxd.supervisor.network import CallNetwork
    from sandboxd.supervisor.secrets import CallSecrets

__all__ = ["Call", "off_the_loop", "payload_of"]

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
    ticket: Ticket
    retries: Retries
    tied: bool
    """Whether its caller waits, and its going away ends the call."""
    session: CallSession | None = None
    told: Callback | None = None
    """To whom its end is told."""
    cancelled: bool = False
    shelved: bool = False
    """Whether it was left in the queue for a later daemon; it has ended here without an outcome."""
    marked: int = 0
    """Which attempt may begin: it is on disk that it was given a container."""
    attempt: Attempt | None = None
    network: CallNetwork | None = None
    stdin: Stdin = field(default_factory=Stdin)
    turn: anyio.Event = field(default_factory=anyio.Event)
    queue_scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)
    released: frozenset[str] = frozenset()
    """Digests of its artifacts, which no record names yet."""
    answered: anyio.Event = field(default_factory=anyio.Event)
    """Set when it has ended here, or its outcome waits for the disk: whoever waits is told that."""
    unrecorded: str | None = None
    """Why its outcome is not on disk, and so not told."""
    decided: anyio.Event = field(default_factory=anyio.Event)
    """Set when the acceptance is on disk, or ``refused``: until then all is made ready, and nothing runs."""
    refused: bool = False

    def join(self, session: CallSession) -> None:
        """It is a call of this session, which was entered for it."""
        self.session = session
        self.invocation.session = session.row.id
        session.call = self.invocation.id
        if self.plan.commit is not None:
            session.policy = self.plan.commit

    def granted(self) -> None:
        """It has its turn."""
        self.turn.set()

    def refuse(self) -> None:
        """The acceptance was not written: there is no such call, and what was made ready for it goes."""
        self.refused = True
        self.cancel()
        self.decided.set()

    def shelve(self) -> None:
        """Leave it to a later daemon, where it waits in the queue."""
        self.shelved = True
        self.queue_scope.cancel()

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
    contents += [item for item in (request.tar, request.stdin, *request.argv) if isinstance(item, Bytes)]
    size = sum(len(item.text or item.base64 or "") for item in contents)
    size += sum(len(item) for item in (*request.argv, *request.env.values()) if isinstance(item, str))
    if size < LARGE:
        return function(*args, **kwargs)
    return await anyio.to_thread.run_sync(partial(function, *args, **kwargs))


def payload_of(request: Request) -> Payload:
    """The bytes of a request."""

    def data(content: Bytes | None) -> bytes | None:
        return None if content is None else content.decode()

    stdin = None if isinstance(request.stdin, str) else request.stdin.decode()
    inputs = tuple((item.path, item.content.decode(), item.mode) for item in request.inputs)
    return Payload(inputs, data(request.tar), stdin)
