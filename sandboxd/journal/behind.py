"""Output that is on disk with its outcome before its own files are.

Theory of operation.  What an outcome names must be on disk before it is, and to sync the small files of every
call takes longer than all else that is durable about it. So a copy of a small spool goes into the transaction
of the outcome, which is synced anyway, and the files are synced some time later, many calls at once, and the
copies removed. Where power was lost in between, a start finds the copy and makes the files again. What is
longer than ``MOST`` is synced at once.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.failpoint import failpoint
from sandboxd.journal.index import mapped
from sandboxd.journal.output import opened, pwrite, sync_directory

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sandboxd.journal.store import Journal

__all__ = ["FILES", "MOST", "Behind", "packed"]

FILES = ("events", "details", "stdout", "stderr")
MOST = 64 * 1024
"""Bytes of a spool that are copied."""
PAUSE = 1.0  # seconds in which calls end that are synced together
STEP = 256

_SIZE = struct.Struct("<q")
log = structlog.get_logger("sandboxd.journal")


def packed(directory: Path) -> bytes | None:
    """The files of a spool in one; None where they are long. Raises OSError."""
    parts, size = [], 0
    for name in FILES:
        try:
            data = (directory / name).read_bytes() if size <= MOST else b""
        except FileNotFoundError:  # nothing was written to this stream
            parts.append(_SIZE.pack(-1))
            continue
        size += len(data)
        parts += [_SIZE.pack(len(data)), data]
    return None if size > MOST else b"".join(parts)


def _unpacked(data: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    for name in FILES:
        (size,) = _SIZE.unpack_from(data, at)
        at += _SIZE.size
        if size >= 0:
            yield name, data[at : at + size]
            at += size


def _synced(directory: Path) -> None:
    for name in FILES:
        with suppress(FileNotFoundError):
            fd = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
    with suppress(FileNotFoundError):
        sync_directory(directory)


def _restored(directory: Path, data: bytes) -> None:
    """Make files begin with what was copied: what came after it is made again where it is missing."""
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    for name, content in _unpacked(data):
        fd = opened(directory / name)
        try:
            if os.pread(fd, len(content), 0) != content:
                os.ftruncate(fd, 0)
                pwrite(fd, content, 0)
        finally:
            os.close(fd)
    _synced(directory)


class Behind:
    """Brings the files of spools to disk. ``run`` is to be a task of the daemon."""

    def __init__(self, journal: Journal, spools: Path) -> None:
        self._journal = journal
        self._spools = spools
        self._ended: list[str] = []
        self._wake = anyio.Event()

    def add(self, id_: str) -> None:
        """A call has its outcome, with a copy of its output, and its spool is closed."""
        self._ended.append(id_)
        self._wake.set()

    async def restore(self) -> None:
        """Make the files that an earlier daemon had no time to bring to disk. Raises HostFailed."""
        while found := await self._journal.read(_copies):
            await anyio.to_thread.run_sync(self._restore, found)
            await self._forget([id_ for id_, _ in found])

    def _restore(self, found: Sequence[tuple[str, bytes]]) -> None:
        with mapped():
            for id_, data in found:
                failpoint("spool.restore")
                _restored(self._spools / id_, data)
            sync_directory(self._spools)

    async def run(self) -> None:
        """Sync what was added, until cancelled; what is left then has its copy."""
        while True:
            await self._wake.wait()
            await anyio.sleep(PAUSE)
            self._wake = anyio.Event()
            ended, self._ended = self._ended, []
            try:
                for at in range(0, len(ended), STEP):
                    step = ended[at : at + STEP]
                    await anyio.to_thread.run_sync(self._sync, step)
                    await self._forget(step)
            except errors.SandboxdError as error:  # they have their copies, and a later start comes to them
                log.warning("output is not synced yet", calls=len(ended), reason=str(error))

    def _sync(self, ids: Sequence[str]) -> None:
        with mapped():
            for id_ in ids:
                failpoint("spool.settle")
                _synced(self._spools / id_)
            sync_directory(self._spools)

    async def _forget(self, ids: Sequence[str]) -> None:
        failpoint("spool.settled")

        def forget(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM unsynced WHERE id = ?", [(id_,) for id_ in ids])

        await self._journal.write(forget)


def _copies(connection: sqlite3.Connection) -> list[tuple[str, bytes]]:
    rows = connection.execute("SELECT id, files FROM unsynced ORDER BY id LIMIT ?", (STEP,))
    return [(id_, files) for id_, files in rows]
