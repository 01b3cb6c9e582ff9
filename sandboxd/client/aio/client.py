"""The asynchronous client, for asyncio and trio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.aio.catalogue import Catalogue
from sandboxd.client.aio.files import Files
from sandboxd.client.aio.invocations import Invocations
from sandboxd.client.aio.ports import Ports
from sandboxd.client.aio.records import Records
from sandboxd.client.aio.sessions import Sessions

if TYPE_CHECKING:
    import os
    from typing import Unpack

    from sandboxd.client.pulling import Pulled, PullFields
    from sandboxd.client.pushing import Pushed, PushFields

__all__ = ["AsyncClient"]


class AsyncClient(Invocations, Ports, Sessions, Files, Records, Catalogue):
    """What ``Client`` is, for tasks: the same methods, arguments and errors.

    Cancelling a task inside ``run`` or ``stream`` closes its connection, and the daemon then cancels the
    call unless it has a key.
    """

    async def push(
        self, session: str, directory: str | os.PathLike[str], **fields: Unpack[PushFields]
    ) -> Pushed:
        """Bring what changed in a directory into a session, in one checkpoint; see ``pushing.push``.

        Cancelled before it has ended, it has changed nothing, or all.
        """
        from sandboxd.client.aio.borrowed import in_thread  # noqa: PLC0415 - who pushes nothing need not pay
        from sandboxd.client.pushing import push  # noqa: PLC0415 - same

        return await in_thread(self, lambda client: push(client, session, directory, **fields))

    async def pull(
        self, session: str, directory: str | os.PathLike[str], **fields: Unpack[PullFields]
    ) -> Pulled:
        """Bring what changed in a session into a directory, as far as it can be; see ``pulling.pull``.

        Cancelled before it has ended, each file is as it was, or whole.
        """
        from sandboxd.client.aio.borrowed import in_thread  # noqa: PLC0415 - same
        from sandboxd.client.pulling import pull  # noqa: PLC0415 - same

        return await in_thread(self, lambda client: pull(client, session, directory, **fields))
