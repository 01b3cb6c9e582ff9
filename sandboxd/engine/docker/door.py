"""The door of a slot: a directory with a socket, at which its PID 1 connects once.

Nobody but the slot's PID 1 is in the container while the directory is mounted there, and one connection is
all that is taken: the peer is compared with the process that the engine names, and the listener closed.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
from typing import TYPE_CHECKING, Self

from sandboxd import errors

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

__all__ = ["Door"]

PEER = struct.Struct("=iII")  # struct ucred, unix(7)


class Door:
    """A context manager; leaving it takes the directory away, once the container is gone."""

    def __init__(self, directory: Path, owner: int) -> None:
        """``owner`` is the container's root, as the host numbers it. Raises OSError."""
        self.directory = directory
        directory.mkdir(mode=0o700)
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._bind(directory, owner)
            except BaseException:
                self._listener.close()
                raise
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _bind(self, directory: Path, owner: int) -> None:
        at = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # by a name that tells nothing: the container's /proc/net/unix shows it
            self._listener.bind(f"/proc/self/fd/{at}/s")
        finally:
            os.close(at)
        path = directory / "s"
        path.chmod(0o600)
        os.chown(path, owner, owner)
        os.chown(directory, owner, owner)
        self._listener.listen(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def accept(self, pid: int, owner: int, timeout: float) -> socket.socket:
        """The connection of process ``pid``; nobody else gets in. Blocks. Raises EngineFailed."""
        self._listener.settimeout(timeout)
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            raise errors.EngineFailed(f"PID 1 did not connect within {timeout:g} s: {error}") from error
        finally:
            self._listener.close()
        found = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        if found[:2] != (pid, owner):
            sock.close()
            raise errors.EngineFailed(
                f"process {found[0]} of uid {found[1]} connected, and the engine names process {pid} of uid "
                f"{owner}: the engine has to be in this PID namespace"
            )
        return sock
