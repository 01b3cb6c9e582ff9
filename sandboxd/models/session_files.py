"""The files of a session, and what differs between two of its checkpoints.

Names that are not UTF-8 are percent-encoded, as those of artifacts are.
"""

from __future__ import annotations

from typing import Literal

from sandboxd.models.wire import Wire

__all__ = ["FileChange", "FileInfo", "FileList", "FileWritten", "LayerImported", "SessionDiff"]


class FileInfo(Wire):
    """One file of a session. ``size`` is None for what has none."""

    path: str
    kind: Literal["file", "directory", "symlink", "fifo", "socket", "device"]
    mode: int
    uid: int
    gid: int
    size: int | None = None
    modified: int
    target: str | None = None
    """Of a symbolic link."""


class FileList(Wire):
    """What a directory has, in the order of names; ``next`` is the ``after`` of the following page."""

    files: list[FileInfo]
    next: str | None = None


class FileWritten(Wire):
    """What became of a file, and the digest of the checkpoint that the session stands on now."""

    path: str
    digest: str | None = None
    """Of the file; None where it was removed."""
    size: int | None = None
    checkpoint: str


class LayerImported(Wire):
    """What an archive brought."""

    entries: int
    checkpoint: str


class FileChange(Wire):
    """One path that differs. ``aspects`` say in what, where it is on both sides."""

    path: str
    change: Literal["added", "changed", "removed"]
    kind: str
    """Of the new one, else of the one that was removed."""
    aspects: list[str]
    old_size: int | None = None
    new_size: int | None = None
    diff: str | None = None
    """As ``diff -u`` writes it, of a text that differs, where it was asked for."""
    omitted: str | None = None
    """Why there is none, or not all of it: ``binary``, ``too_large``, ``truncated``."""


class SessionDiff(Wire):
    """What differs, a directory before what is in it. ``complete``: it is all that does."""

    old: str
    """The digest of the checkpoint that is compared with, and of the other."""
    new: str
    changes: list[FileChange]
    complete: bool
