"""The blocking client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.sync.catalogue import Catalogue
from sandboxd.client.sync.files import Files
from sandboxd.client.sync.invocations import Invocations
from sandboxd.client.sync.ports import Ports
from sandboxd.client.sync.records import Records
from sandboxd.client.sync.sessions import Sessions

if TYPE_CHECKING:
    import os
    from typing import Unpack

    from sandboxd.client.pulling import Pulled, PullFields
    from sandboxd.client.pushing import Pushed, PushFields

__all__ = ["Client"]


class Client(Invocations, Ports, Sessions, Files, Records, Catalogue):
    """A client of the daemon for threads.

    ``socket``: else ``SANDBOXD_SOCKET``, else ``/run/sandboxd/sandboxd.sock``, else
    ``$XDG_RUNTIME_DIR/sandboxd/sandboxd.sock``. ``connect_timeout`` and ``timeout`` are seconds; the
    latter bounds each read and write, except while waiting for a call to end, which takes as long as
    the policy and the request allow.

    Every method raises ``errors.Unavailable`` when no daemon answers or the connection is lost
    (``details["reason"]`` says which), and the class of ``errors`` that the daemon's answer names. How a
    tool ended is data in ``Invocation.outcome``, never an exception.

    When the daemon goes away while a call is waited for or its events are read, the client looks for it for
    ``reconnect`` seconds and goes on where it was: ``run``, ``stream``, ``wait`` and ``events`` lose nothing.
    A call without a key that the dead daemon ran then has the outcome that the next one gave it; one with a
    key is asked for again. 0: raise Unavailable at once.
    """

    def push(self, session: str, directory: str | os.PathLike[str], **fields: Unpack[PushFields]) -> Pushed:
        """Bring what changed in a directory into a session, in one checkpoint; see ``pushing.push``."""
        from sandboxd.client.pushing import push  # noqa: PLC0415 - who pushes nothing need not pay for it

        return push(self, session, directory, **fields)

    def pull(self, session: str, directory: str | os.PathLike[str], **fields: Unpack[PullFields]) -> Pulled:
        """Bring what changed in a session into a directory, as far as it can be; see ``pulling.pull``."""
        from sandboxd.client.pulling import pull  # noqa: PLC0415 - same

        return pull(self, session, directory, **fields)
