"""The blocking client."""

from __future__ import annotations

from sandboxd.client.sync.catalogue import Catalogue
from sandboxd.client.sync.files import Files
from sandboxd.client.sync.invocations import Invocations
from sandboxd.client.sync.ports import Ports
from sandboxd.client.sync.records import Records
from sandboxd.client.sync.sessions import Sessions

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
