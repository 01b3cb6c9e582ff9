"""Layers that are in the journal, and not on disk as files yet.

Theory of operation.  What a call changed, if it is small, goes as a pack (``layerpack``) into the transaction
of its outcome. Its files are made some time later, and at once where somebody needs them; then many are
synced together, and the packs removed. What a daemon had no time for, the next one makes of the packs.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.failpoint import failpoint
from sandboxd.workspace import tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sandboxd.journal import Journal
    from sandboxd.workspace.store import LayerStore

__all__ = ["Unwritten"]

SOON = 0.02  # seconds, until files are made that nobody needs: who waits for the outcome has it before
PAUSE = 1.0  # seconds in which layers are written that are synced together
STEP = 64

log = structlog.get_logger("sandboxd.sessions")


class Unwritten:
    """For one event loop; ``run`` is to be a task of it."""

    def __init__(self, journal: Journal, store: LayerStore) -> None:
        self._journal = journal
        self._store = store
        self._packs: dict[str, bytes] = {}
        self._writing = anyio.Lock()
        self._written: list[str] = []
        self._since = -1
        self._failures = 0
        """Of syncs: what was written before one is not known to be on disk, and stays in the journal."""
        self._wake = anyio.Event()

    def add(self, name: str, pack: bytes) -> None:
        """The transaction with this pack is on disk."""
        self._packs[name] = pack
        self._wake.set()

    def __contains__(self, name: str) -> bool:
        """Whether a layer is no file yet."""
        return name in self._packs

    async def settle(self, names: Iterable[str]) -> None:
        """Wait until these layers, if they are of ours, are files. Raises HostFailed, WorkspaceUnfit."""
        for name in names:
            if name in self._packs:
                await self._write(name)

    async def _write(self, name: str) -> None:
        async with self._writing:
            pack = self._packs.get(name)
            if pack is None:
                return
            with anyio.CancelScope(shield=True):
                if self._since < 0:
                    self._since = self._store.watch()
                failures = self._failures
                await anyio.to_thread.run_sync(self._store.write, name, pack)
            del self._packs[name]
            if failures == self._failures:
                self._written.append(name)
            self._wake.set()

    async def forget(self, names: Sequence[str]) -> None:
        """Nothing refers to these layers any more, and their packs are gone: no files are made of them."""
        async with self._writing:
            for name in names:
                self._packs.pop(name, None)

    async def restore(self) -> None:
        """Make the files that an earlier daemon had no time for; those that cannot be made wait, as before.

        Raises JournalCorrupt, HostFailed.
        """
        after = ""
        while found := await self._journal.read(partial(tables.packs, after=after, limit=STEP)):
            after = found[-1][0]
            for name, pack in found:
                failpoint("layer.restore")
                self._packs[name] = pack
                try:
                    await self._write(name)
                except errors.SandboxdError as error:
                    log.warning("files of a session cannot be made", layer=name, reason=str(error))
            await self._sync()

    async def run(self) -> None:
        """Write and sync what was added, until cancelled; what is left then is in the journal."""
        try:
            while True:
                await self._wake.wait()
                self._wake = anyio.Event()
                await anyio.sleep(SOON)
                for name in list(self._packs):
                    with suppress(errors.SandboxdError):  # whoever needs it tries again, and is told
                        await self.settle((name,))
                await anyio.sleep(PAUSE)
                await self._sync()
        finally:
            self.close()

    async def _sync(self) -> None:
        """What could not be synced may be lost, whatever a second try says: a later start makes it again.

        That is said of all that was written before, and not of some of it.
        """
        while self._written:
            names, self._written = self._written[:STEP], self._written[STEP:]
            try:
                await anyio.to_thread.run_sync(self._store.sync, self._since)
            except errors.HostFailed as error:
                log.warning("files of sessions are not synced", reason=str(error))
                self._failures += 1
                self._written.clear()
                continue
            failpoint("layer.settled")
            try:
                await self._journal.write(partial(tables.remove_packs, layers=names))
            except errors.SandboxdError as error:
                log.warning("what sessions have on disk stays in the journal", reason=str(error))
        if not self._writing.locked():
            self.close()

    def close(self) -> None:
        """Close what is open. Safe to call twice, and to be used after it."""
        since, self._since = self._since, -1
        if since >= 0:
            os.close(since)
