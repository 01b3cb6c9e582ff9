"""Whether the layers of a session are those that were kept.

Theory of operation.  A layer's digest is in its checkpoint, whose own digest is of that and of its parent's;
so the digest of a checkpoint, which records name, vouches for all files of the line up to it. To digest a
layer is to read it, which no call waits for: it sees at most that a layer is gone. Whoever takes files away,
or proves something by them, has them read first.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.workspace import layer
from sandboxd.workspace.effort import ENDLESS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from sandboxd.workspace.effort import Effort
    from sandboxd.workspace.stacks import Kept

__all__ = ["check", "present", "problem", "small"]

SMALL_INODES = 32
SMALL_SIZE = 256 * 1024


def present(layers: Path, session: str, kept: Iterable[Kept]) -> None:
    """Raise Corrupt where one of these layers of a session is gone from the directory ``layers``."""
    for one in kept:
        if how := _gone(layers / one.layer):
            raise _corrupt(session, one, how)


def check(layers: Path, session: str, kept: Iterable[Kept], effort: Effort = ENDLESS) -> None:
    """Raise Corrupt where one of them is gone, or holds something else. All of them are read: blocks.

    Raises HostFailed.
    """
    for one in kept:
        if how := problem(layers / one.layer, one.content, effort):
            raise _corrupt(session, one, how)


def small(kept: Sequence[Kept]) -> list[Kept]:
    """The newest of them, as many as cost next to nothing to read."""
    chosen: list[Kept] = []
    inodes = size = 0
    for one in kept:
        inodes, size = inodes + one.inodes + 1, size + one.size
        if inodes > SMALL_INODES or size > SMALL_SIZE:
            break
        chosen.append(one)
    return chosen


def problem(path: Path, content: str | None, effort: Effort = ENDLESS) -> str:
    """What is wrong with a layer of this digest, as the end of a sentence about it; empty: nothing.

    Raises HostFailed, and what ``effort`` does.
    """
    try:
        fd = os.open(path, layer.DIRECTORY)
    except OSError as error:
        return _gone(path) or f"cannot be read: {error.strerror}"
    try:
        if content is None:
            return ""
        found = layer.measure(fd, effort.step).digest
    except errors.WorkspaceUnfit as error:  # no layer has what is there
        return f"was changed: {error}"
    finally:
        os.close(fd)
    return "" if found == content else f"was changed: it has the digest {found}, and was kept as {content}"


def _gone(path: Path) -> str:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return "is gone"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if stat.S_ISDIR(status.st_mode) else "is no directory any more"


def _corrupt(session: str, one: Kept, how: str) -> errors.Corrupt:
    return errors.Corrupt(
        f"files of session {session} are damaged: the layer of its checkpoint {one.checkpoint}, "
        f"{one.digest}, {how}",
        session=session,
        checkpoint=one.checkpoint,
        digest=one.digest,
    )
