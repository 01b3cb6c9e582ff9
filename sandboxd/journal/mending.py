"""What is done when SQLite says that the journal's database is damaged while a daemon uses it.

Theory of operation.  To look for damage takes as long as to read the database, so nobody looks before
something fails. Then one thread looks for what cannot be read, makes indexes again (``btrees``) and saves
what it can of the queue (``salvage``); those who write wait, and what failed is done once more. What could
not be mended is named in every error from then on, and nobody looks again.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import structlog

from sandboxd import errors
from sandboxd.journal import btrees, salvage, schema

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Mending"]

log = structlog.get_logger(__name__)


class Mending:
    """For one event loop; ``look`` blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._going: asyncio.Task[bool] | None = None
        self._left: list[btrees.Damaged] | None = None
        """What is damaged and stays so, if somebody looked."""
        self.times = 0
        """How often something was mended."""

    @property
    def going(self) -> bool:
        """Whether the database is being mended."""
        return self._going is not None

    async def ended(self) -> None:
        """Wait until nothing is being mended."""
        while self._going is not None:
            await asyncio.wait({self._going})

    async def mended(self, error: BaseException, times: int) -> bool:
        """After an error: mend what can be; whether to try again. ``times``: as it was before."""
        if not btrees.is_damage(error.__cause__):
            return False
        if times != self.times:  # somebody else met it too
            return True
        if self._going is None:
            if self._left is not None:
                return False
            self._going = asyncio.create_task(self._mend())
        return await asyncio.shield(self._going)

    async def _mend(self) -> bool:
        try:
            return await asyncio.to_thread(self.look)
        finally:
            self._going = None

    def look(self) -> bool:
        """Mend what can be, and note what else is damaged; whether anything was mended."""
        try:
            with closing(schema.connect_reader(self._path)) as reader:
                found = btrees.unreadable(reader, tables=False) or btrees.unreadable(reader)
                made = btrees.remake(self._path, found)
            queue = [one for one in found if one.name == salvage.QUEUE]
            lost = salvage.save_queue(self._path) if queue else []
        except (sqlite3.Error, errors.SandboxdError) as error:
            log.warning("the journal's database could not be mended", reason=str(error))
            if btrees.is_damage(error):  # all else may pass
                self._left = []
            return False
        for one in made:  # indexes
            log.error("a damaged index of the journal was made again", index=one.name, table=one.table)
        for one in queue:
            log.error(
                "calls that waited end as interrupted: the queue was damaged", calls=lost, reason=one.why
            )
        made += queue
        left = [one for one in found if one not in made]
        for one in left:
            log.error("the journal's database is damaged", part=str(one), reason=one.why)
        if left or not made:
            self._left = left
        self.times += bool(made)
        return bool(made)

    def named(self, error: errors.SandboxdError) -> errors.SandboxdError:
        """The same error, with the names of what is damaged where they are known."""
        if not self._left or not btrees.is_damage(error.__cause__):
            return error
        return errors.JournalCorrupt(schema.damage_told(self._left), damaged=[one.name for one in self._left])
