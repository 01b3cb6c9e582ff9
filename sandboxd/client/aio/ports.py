"""The part of ``AsyncClient`` that is about the ports of containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.aio.exchanges import Exchanges
from sandboxd.client.calls import invocations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import SocketStream

__all__ = ["Ports"]


class Ports(Exchanges):
    """Servers inside containers."""

    async def ports(self, id: str) -> Sequence[int]:  # noqa: A002
        """The ports of a running call's container that this caller may reach, by its policy."""
        return await self._do(invocations.ports(id))

    async def connect(self, id: str, port: int) -> SocketStream:  # noqa: A002
        """A stream to a server inside a running call's container (see ``Client.connect``), to be closed."""
        return await self._switch(invocations.connect(id, port))

    async def session_ports(self, session: str) -> Sequence[int]:
        """The same of the container of what runs in a session now. Raises NotFound, SessionIdle."""
        return await self._do(invocations.session_ports(session))

    async def connect_session(self, session: str, port: int) -> SocketStream:
        """The same as ``connect`` for what runs in a session now. Raises SessionIdle where nothing does."""
        return await self._switch(invocations.connect_session(session, port))
