"""The files of a session, as they are listed, compared and changed from outside."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sandboxd.models.wire import Wire

__all__ = ["FileChange", "FileInfo", "FileList", "FileWritten", "SessionDiff"]


class FileInfo(Wire):
    """One file. ``path`` is text as an artifact's is; ids are those inside of the container."""

    path: str
    kind: Literal["file", "directory", "symlink", "fifo", "socket", "device"]
    mode: int
    uid: int
    gid: int
    size: int = 0
    mtime: int
    digest: str | None = None
    """Of a regular file, where it was asked for."""
    target: str | None = None
    """Of a symbolic link."""


class FileList(Wire):
    """What a directory has, or all beneath it; ``truncated``: there is more than was asked for."""

    files: list[FileInfo]
    truncated: bool = False
    next: str | None = None
    """The ``after`` of the following page, if there is more."""
    unnamed: int = 0
    """Files with paths over 4,095 bytes, which are left out with all that is beneath them."""


class FileWritten(Wire):
    """A file that was written or removed, and the checkpoint that came of it."""

    path: str
    size: int | None = None
    digest: str | None = None
    created: bool = False
    checkpoint: str


class FileChange(Wire):
    """One path that differs between two checkpoints."""

    path: str
    change: Literal["added", "changed", "removed"]
    aspects: list[Literal["kind", "content", "target", "mode", "owner"]] = Field(default_factory=list)
    """What of a file that is in both is not the same."""
    old: FileInfo | None = None
    new: FileInfo | None = None
    diff: str | None = None
    """A unified diff, where it was asked for and both sides are texts."""
    omitted: Literal["binary", "too_large", "truncated"] | None = None
    """Why there is no diff, or not all of it."""


class SessionDiff(Wire):
    """What differs between two checkpoints of a session, in the order of paths."""

    since: str
    to: str
    """Ids of the checkpoints."""
    changes: list[FileChange]
    truncated: bool = False
    """There is more than was asked for, or fits into an answer."""
    unnamed: int = 0
    """What differs and has a path over 4,095 bytes, which is left out with all that is beneath it."""
