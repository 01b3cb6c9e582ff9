"""The part of ``Client`` that is about the ports of containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.calls import invocations
from sandboxd.client.sync.exchanges import Exchanges

if TYPE_CHECKING:
    import socket as sockets
    from collections.abc import Sequence


__all__ = ["Ports"]


class Ports(Exchanges):
    """Servers inside containers."""

    def ports(self, id: str) -> Sequence[int]:  # noqa: A002
        """The ports of a running call's container that this caller may reach, by its policy."""
        return self._do(invocations.ports(id))

    def connect(self, id: str, port: int) -> sockets.socket:  # noqa: A002
        """A connected socket to a server inside a running call's container; the caller's to close.

        Raises NotFound, CallNotStarted, CallEnded, PortNotExposed, and PortNotAnswering while nobody
        listens there. It blocks without a timeout, and ends with the call.
        """
        return self._switch(invocations.connect(id, port))

    def session_ports(self, session: str) -> Sequence[int]:
        """The same of the container of what runs in a session now. Raises NotFound, SessionIdle."""
        return self._do(invocations.session_ports(session))

    def connect_session(self, session: str, port: int) -> sockets.socket:
        """The same as ``connect`` for what runs in a session now. Raises SessionIdle where nothing does."""
        return self._switch(invocations.connect_session(session, port))
