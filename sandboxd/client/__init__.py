"""Clients of the daemon: ``Client`` for threads, ``AsyncClient`` for asyncio and trio.

Theory of operation. Each exchange with the daemon is first pure data (``calls``: method, target, body, and
the function that decodes the answer) and is then performed by one of two small interpreters: ``sync`` over
``http1``, ``aio`` over anyio and h11, which have a file for each subject of their methods. Framing, problem
documents and event lines are parsed by the same code for both (``wire``). Every exchange has a connection of
its own, so that a client holds no state, may be used from several threads or tasks, and a caller that goes
away is seen by the daemon as a closed connection, which cancels a call that was not made with a key.

``location``, ``transport``, ``wire``, ``packing`` and ``destination`` import nothing but the standard
library and ``errors``: ``run-in-sandbox`` uses them without paying for pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd.client.aio import AsyncClient
    from sandboxd.client.sync import Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> object:
    """Import a client when it is first asked for (PEP 562)."""
    if name == "Client":
        from sandboxd.client.sync import Client  # noqa: PLC0415 - run-in-sandbox must not pay for it

        return Client
    if name == "AsyncClient":
        from sandboxd.client.aio import AsyncClient  # noqa: PLC0415 - same

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
