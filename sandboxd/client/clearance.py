"""A directory that is to make way for a file: all of it is looked at before any of it goes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.client.place import status_of
from sandboxd.kernel import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Clearance", "change_mode"]

_HANDLE = os.O_PATH | os.O_NOFOLLOW


def change_mode(parent: int, name: bytes, mode: int) -> None:
    """Of a directory, also one that its owner cannot open. Raises OSError."""
    fd = files.openat2(parent, name, _HANDLE | os.O_DIRECTORY)
    try:
        Path(f"/proc/self/fd/{fd}").chmod(mode)
    finally:
        os.close(fd)


class Clearance:
    """What is in a directory, which others may change meanwhile: what is not as it was found stays."""

    def __init__(
        self, parent: int, name: bytes, check: Callable[[bytes, int, bytes, os.stat_result], None]
    ) -> None:
        """Look at everything in it, through no link and onto no other mount.

        ``check`` is given a path below it, the open directory of that, its name there and its status, and
        raises for what has to stay. Raises OSError for what cannot be looked at.
        """
        self._parent = parent
        self._name = name
        self._found: list[tuple[bytes, os.stat_result]] = []
        """Paths from ``parent``; a directory is before what is in it."""
        waiting = [name]
        while waiting:
            at = waiting.pop()
            directory = files.open_directory(parent, at)
            try:
                for entry in os.listdir(directory):  # noqa: PTH208 - of a descriptor
                    one = os.fsencode(entry)
                    here = _status(directory, one)
                    check((at + b"/" + one)[len(name) + 1 :], directory, one, here)
                    self._found.append((at + b"/" + one, here))
                    if stat.S_ISDIR(here.st_mode):
                        waiting.append(at + b"/" + one)
            finally:
                os.close(directory)

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing in it."""
        return not self._found

    def remove(self) -> Iterator[bytes]:
        """Remove all of it, from the leaves up, and the directory last; paths below it, each as it has gone.

        Raises OSError where something is not as it was found.
        """
        top = (self._name, _status(self._parent, self._name))
        for path, here in (top, *self._found):
            if stat.S_ISDIR(here.st_mode) and ~here.st_mode & stat.S_IRWXU:
                change_mode(self._parent, path, stat.S_IMODE(here.st_mode) | stat.S_IRWXU)
        for path, here in self._found[::-1]:
            above, _, name = path.rpartition(b"/")
            directory = files.open_directory(self._parent, above)
            try:
                now = status_of(directory, name)
                if now is not None and stat.S_ISDIR(now.st_mode):
                    os.rmdir(name, dir_fd=directory)  # which fails where something came into it
                elif now is None or (now.st_ino, now.st_ctime_ns) == (here.st_ino, here.st_ctime_ns):
                    os.unlink(name, dir_fd=directory)
                else:
                    raise OSError(errno.EBUSY, f"{os.fsdecode(path)} was changed here just now")
            except FileNotFoundError:
                pass
            finally:
                os.close(directory)
            yield path[len(self._name) + 1 :]
        os.rmdir(self._name, dir_fd=self._parent)


def _status(directory: int, name: bytes) -> os.stat_result:
    """What is at a name, not followed. Raises OSError, EXDEV where something is mounted there."""
    handle = files.openat2(directory, name, _HANDLE)
    try:
        return os.fstat(handle)
    finally:
        os.close(handle)
