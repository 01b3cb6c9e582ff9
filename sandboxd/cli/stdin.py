"""Sends descriptor 0 to a running call, with back-pressure.

While input flows, one request carries it as a chunked body and the daemon reads only as fast as the tool
does. When input pauses the request is ended, since a daemon does not keep half-sent bodies for ever; the
next bytes go in a new one, at the offset that the last answer gave. End of file is a request of its own.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.client import transport, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.cli.run import Call

__all__ = ["send"]

CHUNK = 64 * 1024
PAUSE = 0.5  # seconds without input after which a request is ended


class _Input:
    """Descriptor 0, read ahead by nothing: what was read has been handed to a request."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.offset = 0
        self.ended = False

    def flow(self) -> Iterator[bytes]:
        """Chunks until the end of the input or a pause in it."""
        while True:
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:  # somebody else made the descriptor non-blocking
                select.select([self._fd], [], [])
                continue
            if not data:
                self.ended = True
                return
            self.offset += len(data)
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
            _post(call, id, source.offset, source.flow(), eof=False)
        _post(call, id, source.offset, (), eof=True)
    except (errors.StateConflict, errors.NotFound):
        return
    except OSError as error:
        _failed(call, errors.HostFailed(f"cannot read standard input: {error.strerror}"))
    except errors.SandboxdError as error:
        _failed(call, error)


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
