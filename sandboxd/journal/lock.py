"""The state directory's lock: one daemon at a time."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Lock"]


class Lock:
    """Held from the moment that it is made. The kernel lets go of it when the holder dies.

    Raises ConfigInvalid when another daemon holds it, OSError.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            named = f" (pid {holder})" if holder.isdigit() else ""
            raise errors.ConfigInvalid(
                f"another sandboxd{named} uses the state directory {path.parent}; stop it, "
                "or give this one a state directory of its own"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another daemon have it."""
        os.close(self._fd)
