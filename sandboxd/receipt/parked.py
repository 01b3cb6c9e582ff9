"""The parked tool process as the daemon sees it from outside: its directory in ``/proc``."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Self

from sandboxd.kernel import files

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Parked"]

RESOLVE_IN_ROOT = 0x10  # openat2(2): links of the image lead nowhere but into the image


class Parked:
    """A process by a descriptor of its ``/proc`` directory: once it is gone, reading fails with ESRCH.

    So what is read is never that of a later process with the same number. A context manager; every
    method raises OSError.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            self._root = os.open("root", flags, dir_fd=self._directory)
        except OSError:
            os.close(self._directory)
            raise
        self._inside: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._inside.values():
            os.close(fd)
        os.close(self._root)
        os.close(self._directory)

    def open(self, name: str) -> int:
        """A descriptor of a file of the directory, for reading."""
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)

    def read(self, name: str) -> str:
        """A file of the directory."""
        fd = self.open(name)
        try:
            parts = []
            while data := os.read(fd, 65536):
                parts.append(data)
        finally:
            os.close(fd)
        return b"".join(parts).decode(errors="surrogateescape")

    def status(self) -> dict[str, str]:
        """``status`` by its keys, proc_pid_status(5)."""
        lines = (line.partition(":") for line in self.read("status").splitlines())
        return {key: value.strip() for key, _, value in lines}

    def link(self, name: str) -> str:
        """The text of a link of the directory, such as ``ns/net``."""
        return os.readlink(name, dir_fd=self._directory)

    def stat_inside(self, path: str) -> os.stat_result | None:
        """What the process has at an absolute path, no link followed at its end; None for nothing."""
        above, _, name = path.rpartition("/")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if above not in self._inside:
                self._inside[above] = self.open_inside(above or "/", os.O_PATH | os.O_DIRECTORY)
            return os.stat(name or ".", dir_fd=self._inside[above], follow_symlinks=False)
        return None

    def list_inside(self, path: str) -> list[str]:
        """The names in a directory of the process."""
        fd = self.open_inside(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sorted(os.listdir(fd))  # noqa: PTH208  (a descriptor)
        finally:
            os.close(fd)

    def read_inside(self, path: str, most: int) -> bytes | None:
        """A regular file of the process, no link followed at its end; None for what is none, or is larger."""
        try:
            handle = self.open_inside(path, os.O_PATH | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                return None
            with open(f"/proc/self/fd/{handle}", "rb") as file:  # noqa: PTH123
                return file.read(most)
        finally:
            os.close(handle)

    def open_inside(self, path: str, flags: int) -> int:
        """A descriptor of what the process has at an absolute path, links of the image followed."""
        return files.openat2(self._root, os.fsencode(path), flags, resolve=RESOLVE_IN_ROOT)
