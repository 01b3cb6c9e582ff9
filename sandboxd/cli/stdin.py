"""Sends descriptor 0 to a running call, with back-pressure.

While input flows, one request carries it as a chunked body and the daemon reads only as fast as the tool
does. When input pauses the request is ended, since a daemon does not keep half-sent bodies for ever; the
next bytes go in a new one, at the offset that the last answer gave. End of file is a request of its own.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.client import transport, wire
from sandboxd.client.patience import RECONNECT, Patience

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.cli.run import Call

__all__ = ["send"]

CHUNK = 64 * 1024
KEPT = 2**20  # bytes that are kept until the daemon says that it has them
PAUSE = 0.5  # seconds without input after which a request is ended


class _Input:
    """Descriptor 0, and what was read of it since the last request that the daemon answered."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept = bytearray()
        self.offset = 0
        """Of the first byte that the daemon may not have."""
        self.ended = False

    def taken(self) -> None:
        """The daemon has all that was read."""
        self.offset += len(self._kept)
        self._kept.clear()

    def flow(self) -> Iterator[bytes]:
        """Chunks from ``offset`` to the end of the input, a pause in it, or as much as is kept."""
        if self._kept:
            yield bytes(self._kept)
        while len(self._kept) < KEPT and not self.ended:
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:  # somebody else made the descriptor non-blocking
                select.select([self._fd], [], [])
                continue
            if not data:
                self.ended = True
                return
            self._kept += data
            yield data
            if not _ready(self._fd, PAUSE):
                return


def _ready(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(None if timeout is None else int(timeout * 1000)))


def send(call: Call, id: str) -> None:  # noqa: A002 - the field's name
    """Send standard input until it ends or the call does; a failure cancels the call.

    A tool that stops reading, or ends without reading, is everyday work (``head``): the daemon's
    StateConflict ends this quietly.
    """
    source = _Input(0)
    try:
        while not source.ended:
            _ready(0, None)
            _deliver(call, id, source, eof=False)
        _deliver(call, id, source, eof=True)
    except (errors.StateConflict, errors.NotFound):
        return
    except OSError as error:
        _failed(call, errors.HostFailed(f"cannot read standard input: {error.strerror}"))
    except errors.SandboxdError as error:
        _failed(call, error)


def _deliver(call: Call, id: str, source: _Input, *, eof: bool) -> None:  # noqa: A002 - as above
    """Hand on what there is; to the next daemon, if this one goes away: it skips what was written before."""
    patience = Patience(RECONNECT)
    while True:
        try:
            _post(call, id, source.offset, () if eof else source.flow(), eof=eof)
        except (errors.Unavailable, errors.Draining) as error:
            time.sleep(patience.pause(error))
        else:
            source.taken()
            return


def _failed(call: Call, error: errors.SandboxdError) -> None:
    call.stdin_error = error
    call.cancel()


def _post(call: Call, id: str, offset: int, chunks: Iterator[bytes] | tuple[()], *, eof: bool) -> None:  # noqa: A002
    target = wire.invocation_target(id, "stdin", offset=offset, eof=int(eof))
    # No timeout: a tool may leave its input unread for as long as it runs, and its end ends this too.
    transport.exchange(
        call.paths,
        wire.Exchange("POST", target, waits=True),
        connect_timeout=5.0,
        timeout=None,
        chunks=chunks,
    ).close()
