"""This side of a pull: what it has changed, and what its session may never have had, is not written over."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from sandboxd.client.agreement import content_of
from sandboxd.client.place import content_at

if TYPE_CHECKING:
    import os

    from sandboxd import models
    from sandboxd.client.agreement import Agreement

__all__ = ["NotBrought", "Side"]


class NotBrought(Exception):
    """Raised for a change that is not brought."""


class Side:
    """What is here, compared with what both sides had."""

    def __init__(self, lent: int | None, agreement: Agreement, *, force: bool) -> None:
        """``lent``: since when the session stands on the directory, in microseconds.

        ``force``: what changed on both sides may be written over.
        """
        self._lent = lent
        self._agreement = agreement
        self._force = force

    def _is_ours(self, change: models.FileChange, parent: int, name: bytes, here: os.stat_result) -> bool:
        """Whether what is here has not changed since the session was made, or both sides were the same."""
        if self._lent is not None and here.st_ctime_ns // 1000 < self._lent:
            return True
        known = content_of(self._agreement.here(change.path))
        is_directory = stat.S_ISDIR(here.st_mode)
        return known is not None and known == (
            "directory" if is_directory else content_at(parent, name, here)
        )

    def check(self, change: models.FileChange, parent: int, name: bytes, here: os.stat_result | None) -> None:
        """Raises NotBrought where this side has changed too."""
        if self._force:
            return
        known = self._agreement.here(change.path)
        if here is None:
            if change.old is not None or known is not None:
                raise NotBrought("it was removed here, and changed in the session")
        elif change.old is None and known is None:
            raise NotBrought("it is here already, with other content")
        elif not self._is_ours(change, parent, name, here):
            raise NotBrought("it was changed here as well since the session was made")

    def check_removal(
        self, change: models.FileChange, parent: int, name: bytes, here: os.stat_result
    ) -> None:
        """Raises NotBrought for what this side has changed, and for what the session may never have had."""
        if self._is_ours(change, parent, name, here):
            return
        if not self._force:
            raise NotBrought("it was changed here since the session was made, and removed in it")
        if self._agreement.there(change.path) is None:
            raise NotBrought(
                "it was made or changed here since the session was made, which may never have had it; remove "
                "it here"
            )
