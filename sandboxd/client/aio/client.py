"""The asynchronous client, for asyncio and trio."""

from __future__ import annotations

from sandboxd.client.aio.catalogue import Catalogue
from sandboxd.client.aio.files import Files
from sandboxd.client.aio.invocations import Invocations
from sandboxd.client.aio.ports import Ports
from sandboxd.client.aio.records import Records
from sandboxd.client.aio.sessions import Sessions

__all__ = ["AsyncClient"]


class AsyncClient(Invocations, Ports, Sessions, Files, Records, Catalogue):
    """What ``Client`` is, for tasks: the same methods, arguments and errors.

    Cancelling a task inside ``run`` or ``stream`` closes its connection, and the daemon then cancels the
    call unless it has a key.
    """
