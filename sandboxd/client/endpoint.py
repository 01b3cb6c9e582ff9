"""Where the daemon is, and how long a client waits for it."""

from __future__ import annotations

import os

from sandboxd.client import location
from sandboxd.client.patience import RECONNECT

__all__ = ["Endpoint"]


class Endpoint:
    """What a client is made of; ``Client`` says what each is."""

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        connect_timeout: float = 5.0,
        timeout: float | None = 60.0,
        reconnect: float = RECONNECT,
    ) -> None:
        self._reconnect = reconnect
        self._paths = location.candidates(socket, os.environ)
        self._connect_timeout = connect_timeout
        self._timeout = timeout
