"""How the files of a session are shown: in pages of bounded size, with the digests that were asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import pydantic_core

from sandboxd import models
from sandboxd.artifacts import encode_path
from sandboxd.kernel.files import MAX_PATH
from sandboxd.workspace.textdiff import MAX_TEXT, TextDiff, text_diff

if TYPE_CHECKING:
    from sandboxd.workspace.diff import Change
    from sandboxd.workspace.view import Entry, View

__all__ = ["MAX_DIFFS", "MAX_FILE", "Page", "change_of", "info_of", "is_digested", "order_of"]

MAX_FILE = 1 << 30
"""Bytes of one file that is digested, or written."""
MAX_ANSWER = 8 << 20
"""Bytes of one list or diff; what does not fit is left out, and the answer says so."""
MAX_DIFFS = 4 << 20
"""Bytes of text diffs in one answer; later files have none."""

Shown = TypeVar("Shown", models.FileInfo, models.FileChange)


class Page(Generic[Shown]):
    """What one answer shows: at most ``limit``, in ``MAX_ANSWER`` bytes, with paths that can be asked for."""

    def __init__(self, limit: int) -> None:
        self.found: list[Shown] = []
        self.truncated = False
        self.unnamed = 0
        self._limit = limit
        self._size = 0

    @property
    def is_full(self) -> bool:
        """Whether no more is shown."""
        return len(self.found) >= self._limit

    def add(self, one: Shown) -> bool:
        """Show one more, if there is room for it."""
        self._size += len(pydantic_core.to_json(one, exclude_none=True)) + 1
        if self._size > MAX_ANSWER:
            return False
        self.found.append(one)
        return True

    def is_unnamed(self, path: bytes) -> bool:
        """Whether no request can name it, nor a program open it by its path; then it is counted alone."""
        if len(path) <= MAX_PATH:
            return False
        self.unnamed += 1
        return True

    @staticmethod
    def into(directory: Entry) -> bool:
        """Whether to look into it."""
        return len(directory.path) <= MAX_PATH


def info_of(view: View, entry: Entry, *, digest: bool = False) -> models.FileInfo:
    """What a file of a checkpoint is."""
    return models.FileInfo(
        path=encode_path(entry.path),
        kind=entry.kind,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        size=entry.size,
        mtime=entry.mtime_ns // 1000,
        digest=view.digest(entry, most=MAX_FILE) if digest else None,
        target=encode_path(view.target(entry)) if entry.kind == "symlink" else None,
    )


def change_of(before: View, after: View, change: Change, room: int | None) -> models.FileChange:
    """What differs of a file; with a diff of its text in so many bytes, if there is ``room`` for one."""
    differs = change.change != "changed" or bool({"content", "kind"} & set(change.aspects))
    old = None if change.old is None else _side(before, change.old, digest=differs)
    new = None if change.new is None else _side(after, change.new, digest=differs)
    diff = _text(before, after, change, room) if room is not None and differs else None
    return models.FileChange(
        path=encode_path(change.path),
        change=change.change,
        aspects=list(change.aspects),
        old=old,
        new=new,
        diff=diff.text if diff is not None else None,
        omitted=diff.omitted if diff is not None else None,
    )


def _side(view: View, entry: Entry, *, digest: bool) -> models.FileInfo:
    return info_of(view, entry, digest=_may_digest(view, entry) if digest else False)


def is_digested(entry: Entry) -> bool:
    """Whether it has a digest."""
    return entry.kind == "file" and entry.size <= MAX_FILE


def _may_digest(view: View, entry: Entry) -> bool:
    return is_digested(entry) and view.effort.may_digest(entry.size)


def order_of(path: bytes) -> list[bytes]:
    """What paths are sorted by where a directory comes before what it has."""
    return path.split(b"/")


def _text(before: View, after: View, change: Change, room: int) -> TextDiff | None:
    sides: list[bytes | None] = []
    for view, entry in ((before, change.old), (after, change.new)):
        if entry is None or entry.kind != "file":
            sides.append(None)
            continue
        if entry.size > MAX_TEXT or room <= 0:
            return TextDiff("", "too_large" if room > 0 else "truncated")
        sides.append(b"".join(view.content(entry)))
    if sides == [None, None]:
        return None
    return text_diff(change.path, *sides, most=min(room, 64 << 10))
