"""Whether a state directory whose journal is empty, or missing, may begin a new one.

Theory of operation: what names nothing is removed as soon as a daemon starts, so an empty journal beside the
files of an earlier one would cost these, and its records begin at 1 again. A call's files and a session's
layers are made after something of theirs is synced in the journal: where there are any, there was a journal
with them. Blobs, keys and the lock say nothing: a first start that lost its power may have left them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_new"]

LEFT = {
    "calls": ("calls", "*"),
    "layers of sessions": ("sessions/layers", "*"),
    "backups of the journal": ("backups", "journal-schema-*.sqlite3"),
}
"""What an earlier journal leaves: its directory, and the pattern of the names in it."""
NOTHING = {"empty"}  # the layer that every store has


def check_new(journal: Path) -> None:
    """Raise ConfigInvalid where the directory of a journal that has nothing in it has files of another one.

    Raises HostFailed.
    """
    state, found = journal.parent, []
    for what, (directory, pattern) in LEFT.items():
        try:
            count = sum(one.name not in NOTHING for one in (state / directory).glob(pattern))
        except OSError as error:
            raise errors.HostFailed(f"{state / directory} cannot be read: {error.strerror}") from error
        if count:
            found.append(f"{count} {what} in {state / directory}")
    if found:
        raise errors.ConfigInvalid(
            f"the journal {journal} is missing or empty, and beside it there are {', '.join(found)}, which "
            "only an earlier journal can name: put that back, with its -wal, or a backup of it; or, to begin "
            f"anew, move all that is in {state} away"
        )
