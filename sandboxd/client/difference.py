"""What a session has that a directory has not, as the daemon tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd import errors, models
from sandboxd.client.agreement import mark_there
from sandboxd.client.pushing import files_there

if TYPE_CHECKING:
    from typing import Literal

    from sandboxd.client.agreement import Agreement
    from sandboxd.client.sync import Client

__all__ = ["since_agreed", "since_lent"]

MOST = 10_000
"""Changes that one pull brings."""


def since_lent(client: Client, info: models.SessionInfo) -> tuple[str, list[models.FileChange], int]:
    """What a session changed on the directory that it stands on, and up to which checkpoint."""
    found = client.diff_session(info.id, "root", limit=MOST)
    if found.truncated:
        raise errors.TooLarge(
            f"the session has more than {MOST} changes, or longer paths, than one answer has; export them as "
            "a layer",
            limit=MOST,
        )
    return found.to, found.changes, found.unnamed


def since_agreed(
    client: Client, info: models.SessionInfo, agreement: Agreement
) -> tuple[str, list[models.FileChange], int]:
    """What a session has that it had not when it was last brought together with this directory."""
    there, unnamed = files_there(client, info.id, info.head.id)
    changes = []
    for path, one in there.items():
        known = agreement.there(path)
        word = mark_there(one)
        if word == known:
            continue
        kind: Literal["added", "changed"] = "added" if known is None else "changed"
        changes.append(models.FileChange(path=path, change=kind, aspects=["content"], new=one))
    gone = sorted(agreement.paths() - set(there), key=lambda path: path.split("/"))
    changes += [models.FileChange(path=path, change="removed") for path in gone]
    return info.head.id, changes, unnamed
