"""What a directory of the caller's has, for sending it: named, digested, and through no link.

Everything is reached from one descriptor, beneath it and on its own file system (``kernel.files``), as if a
stranger had the directory. What cannot be sent is left out with a reason: nothing is taken for removed
because it cannot be read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sandboxd import errors, units
from sandboxd.artifacts import encode_path
from sandboxd.client import ignore
from sandboxd.client.agreement import link_mark, mark
from sandboxd.kernel import files

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_ENTRIES", "MAX_FILE", "Found", "Tree", "chunks_of", "look", "scan"]

MAX_ENTRIES = 200_000
"""Files that a directory may have, those that are ignored not counted: what one import takes."""
MAX_FILE = 1 << 30
"""Bytes of one file: the daemon gives none back that is larger."""
_CHUNK = 1 << 20
_WHITEOUT = b".wh."
_WHY = {
    errno.EACCES: "you may not read it",
    errno.EPERM: "you may not read it",
    errno.EXDEV: "another file system is mounted there",
    errno.ENAMETOOLONG: "its path is over 4,095 bytes",
}


@dataclass(frozen=True, slots=True)
class Found:
    """One file. ``mark`` is as of an agreement; ``target`` is that of a link."""

    path: bytes
    kind: Literal["file", "directory", "symlink"]
    mode: int
    size: int
    status: os.stat_result
    mark: str
    target: bytes = b""


@dataclass
class Tree:
    """What was found, by the text of its path, a directory first; and what was left out, and why."""

    files: dict[str, Found] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    ignored: int = 0
    rules: ignore.Ignore = field(default_factory=ignore.Ignore)
    ruled_out: set[bytes] = field(default_factory=set)
    """Directories that are ignored, but for what git tracks in them."""

    def is_ignored(self, path: bytes, *, is_directory: bool) -> bool:
        """Whether git would ignore a path, or one above it."""
        parts = path.split(b"/")
        within = any(self.rules.ruled_out(parts[:depth], is_directory=True) for depth in range(1, len(parts)))
        return self.rules.has(parts, is_directory=is_directory, within=within)


def scan(root: int, directory: str | os.PathLike[str], *, git: bool) -> Tree:
    """Everything in an open directory that git would not ignore; with ``git`` also ``.git``.

    ``directory`` is its path, above which rules are looked for. Raises TooLarge, OSError.
    """
    tree = Tree(rules=ignore.Ignore.above(Path(directory)))
    waiting: list[bytes] = [b""]
    while waiting:
        waiting += reversed(_listed(root, waiting.pop(), tree, git=git))
    tree.files = dict(sorted(tree.files.items(), key=lambda one: one[1].path.split(b"/")))
    return tree


def _listed(root: int, above: bytes, tree: Tree, *, git: bool) -> list[bytes]:
    """Take what a directory has; the directories among it, which are to be looked into."""
    try:
        here = files.open_directory(root, above or b".")
    except OSError as error:
        _leave(tree, above, error)
        return []
    deeper = []
    try:
        with os.scandir(here) as entries:
            names = sorted(os.fsencode(one.name) for one in entries)
        if ignore.NAME in names:
            tree.rules.add(above.split(b"/") if above else (), _rules(here, above))
        for name in names:
            path = above + b"/" + name if above else name
            if name == b".git" and not git:
                continue
            try:
                if _take(here, name, path, tree):
                    deeper.append(path)
            except OSError as error:
                if error.errno != errno.ENOENT:  # it went meanwhile
                    _leave(tree, path, error)
    finally:
        os.close(here)
    return deeper


def _rules(directory: int, above: bytes) -> bytes:
    try:
        fd, _ = files.open_regular(directory, ignore.NAME)
    except OSError:
        return b""
    try:
        return ignore.read_fd(fd, os.fsdecode(above + b"/.gitignore"))
    finally:
        os.close(fd)


def _leave(tree: Tree, path: bytes, error: OSError) -> None:
    why = _WHY.get(error.errno or 0, error.strerror or str(error))
    tree.left[encode_path(path)] = why


def _take(parent: int, name: bytes, path: bytes, tree: Tree) -> bool:
    """Take one file; whether it is a directory to be looked into. Raises OSError, TooLarge."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    is_directory = stat.S_ISDIR(status.st_mode)
    parts = path.split(b"/")
    within = b"/".join(parts[:-1]) in tree.ruled_out
    if tree.rules.has(parts, is_directory=is_directory, within=within):
        tree.ignored += 1
        return False
    if tree.rules.tracks_in(path) and (within or tree.rules.ruled_out(parts, is_directory=True)):
        tree.ruled_out.add(path)
    text = encode_path(path)
    if (why := _unfit(path, status)) is not None:
        tree.left[text] = why
        return False
    if len(tree.files) >= MAX_ENTRIES:
        raise errors.TooLarge(
            f"the directory has more than {units.format_count(MAX_ENTRIES)} files that git does not ignore",
            limit=MAX_ENTRIES,
        )
    found = look(parent, name, path, status)
    if found is None:
        tree.left[text] = f"it is a {files.kind_of(status.st_mode)}"
        return False
    tree.files[text] = found
    return is_directory


def _unfit(path: bytes, status: os.stat_result) -> str | None:
    if len(path) > files.MAX_PATH:
        return "its path is over 4,095 bytes"
    if path.rpartition(b"/")[2].startswith(_WHITEOUT):
        return "names that begin with .wh. say what is removed"
    if stat.S_ISREG(status.st_mode) and status.st_size > MAX_FILE:
        return f"it is over {units.format_size(MAX_FILE)}"
    return None


def look(parent: int, name: bytes, path: bytes, status: os.stat_result) -> Found | None:
    """What is at a name in an open directory; None for what is no file, directory or link. Raises OSError."""
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(name, dir_fd=parent)
        return Found(path, "symlink", 0o777, 0, status, link_mark(target), target)
    if stat.S_ISDIR(status.st_mode):
        word = mark("directory", "", status.st_mode)
        return Found(path, "directory", status.st_mode & 0o777, 0, status, word)
    if not stat.S_ISREG(status.st_mode):
        return None
    fd, status = files.open_regular(parent, name)
    digest = hashlib.sha256()
    try:
        while chunk := os.read(fd, _CHUNK):
            digest.update(chunk)
    finally:
        os.close(fd)
    word = mark("file", f"sha256:{digest.hexdigest()}", status.st_mode)
    return Found(path, "file", status.st_mode & 0o777, status.st_size, status, word)


def chunks_of(root: int, found: Found) -> Iterator[bytes]:
    """The bytes of a file, as it was found. Raises StateConflict for one that has changed since."""
    above, _, name = found.path.rpartition(b"/")
    digest, left = hashlib.sha256(), found.size
    try:
        parent = files.open_directory(root, above or b".")
        try:
            fd, status = files.open_regular(parent, name)
        finally:
            os.close(parent)
        try:
            while left and (chunk := os.read(fd, min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
                yield chunk
            whole = not left and not os.read(fd, 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise _changed(found) from error
    if not whole or mark("file", f"sha256:{digest.hexdigest()}", status.st_mode) != found.mark:
        raise _changed(found)


def _changed(found: Found) -> errors.StateConflict:
    return errors.StateConflict(
        f"{os.fsdecode(found.path)!a} changed while it was sent; the session is as it was: push again"
    )
