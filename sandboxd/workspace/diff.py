"""What differs between two stacks of layers.

Theory of operation.  Both are walked together, from the root. Where a directory is made by the same layers on
both sides it is the same, with all beneath, and is not looked into; where only some layers are shared, only
names that the others have can differ. So a diff costs what was changed, not what there is. Files that are one
inode are the same (layers do not change; what was flattened is linked); others are compared by their bytes,
holes skipped. Times are no difference.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sandboxd import errors
from sandboxd.workspace.view import check_pending

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.workspace.effort import Effort
    from sandboxd.workspace.view import Entry, View

__all__ = ["Aspect", "Change", "compare"]

_CHUNK = 1 << 20

Aspect = Literal["kind", "content", "target", "mode", "owner"]


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs: ``old`` is None if it was added, ``new`` if it was removed.

    ``aspects`` say what of a file that is on both sides is not the same; where its kind is not, they are
    ``kind`` alone.
    """

    path: bytes
    old: Entry | None
    new: Entry | None
    aspects: tuple[Aspect, ...] = ()

    @property
    def change(self) -> Literal["added", "changed", "removed"]:
        """What happened to the path."""
        if self.old is None:
            return "added"
        return "changed" if self.new is not None else "removed"


_Pair = tuple["Entry | None", "Entry | None"]


def compare(old: View, new: View, *, into: Callable[[Entry], bool] | None = None) -> Iterator[Change]:
    """What differs, a directory before what is in it, names in the order of their bytes.

    Of a directory that was added or removed, all beneath is told too; directories that ``into``
    says no to are not looked into. Raises HostFailed, TooLarge.
    """
    pending: list[_Pair] = [(old.root(), new.root())]
    while pending:
        before, after = pending.pop()
        if change := _change(old, before, new, after):
            yield change
        one = after or before
        if one is None or into is None or into(one):
            pending.extend(_beneath(old, before, new, after))
            check_pending(len(pending))


def _beneath(old: View, before: Entry | None, new: View, after: Entry | None) -> list[_Pair]:
    """What may differ in a pair of which one at least is a directory, in reverse order."""
    in_old = before is not None and before.is_directory
    in_new = after is not None and after.is_directory
    if before is not None and in_old and after is not None and in_new:
        olds, news = _unshared(old, before, new, after)
        names = old.names(before, olds) | new.names(after, news)
        return [(old.child(before, name), new.child(after, name)) for name in sorted(names, reverse=True)]
    if before is not None and in_old:
        return [(one, None) for one in reversed(old.children(before))]
    if after is not None and in_new:
        return [(None, one) for one in reversed(new.children(after))]
    return []


def _unshared(old: View, before: Entry, new: View, after: Entry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The members of two directories less the lowest, as far as these are the same layers."""
    olds, news = before.members, after.members
    while olds and news and old.layers[olds[-1]] == new.layers[news[-1]]:
        olds, news = olds[:-1], news[:-1]
    return olds, news


def _change(old: View, before: Entry | None, new: View, after: Entry | None) -> Change | None:
    if before is None or after is None:
        one = before or after
        return Change(one.path, before, after) if one is not None else None
    aspects = tuple(_aspects(old, before, new, after))
    return Change(after.path, before, after, aspects) if aspects else None


def _aspects(old: View, before: Entry, new: View, after: Entry) -> Iterator[Aspect]:
    if before.inode == after.inode:
        return
    if before.kind != after.kind:
        yield "kind"
        return
    if before.kind == "file" and not _same_content(old, before, new, after):
        yield "content"
    if before.kind == "symlink":
        if old.target(before) != new.target(after):
            yield "target"
    elif before.mode != after.mode:
        yield "mode"
    if (before.uid, before.gid) != (after.uid, after.gid):
        yield "owner"


def _same_content(old: View, before: Entry, new: View, after: Entry) -> bool:
    if before.size != after.size:
        return False
    with old.opened(before) as left, new.opened(after) as right:
        try:
            return _same_bytes(left, right, before.size, new.effort)
        except OSError as error:
            raise errors.HostFailed(f"a file of a session cannot be read: {error.strerror}") from error


def _same_bytes(left: int, right: int, size: int, effort: Effort) -> bool:
    at = 0
    while (at := min(_data_from(left, at, size), _data_from(right, at, size))) < size:
        effort.step()
        chunk = os.pread(left, _CHUNK, at)
        if chunk != os.pread(right, _CHUNK, at):
            return False
        if not chunk:
            break
        at += len(chunk)
    return True


def _data_from(fd: int, at: int, size: int) -> int:
    """Where the next bytes are that are no hole, or the end."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise
