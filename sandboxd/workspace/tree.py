"""Directories that tools made: opened at any depth, and removed without recursion.

A tool can nest directories far deeper than ``PATH_MAX`` allows a path to say, so a path is opened piece
by piece, each piece beneath the directory of the one before and through no link
(``kernel.files.openat2``).
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.kernel import files

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["join", "open_at", "remove_tree", "shown", "typed"]

_PIECE = 3000
"""Bytes of a path that are opened at once; PATH_MAX is 4,096."""
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


def join(parent: bytes, name: bytes) -> bytes:
    """The path of a name in a directory; the root's path is empty."""
    return parent + b"/" + name if parent else name


def shown(path: bytes) -> str:
    """A path that a tool chose, in a message."""
    return ascii(os.fsdecode(path[:200]))


@contextmanager
def typed(path: bytes, failed: str) -> Iterator[None]:
    """OSError as HostFailed, which says that the path ``failed``, such as "cannot be made"."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise errors.HostFailed("no space left for a session's files in the state directory") from error
        raise errors.HostFailed(f"{shown(path)} {failed}: {error.strerror}") from error


def open_at(root: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open a path of any length beneath ``root``, as ``files.openat2`` does; an empty one is the root itself.

    The caller closes what is returned. Raises OSError.
    """
    if len(path) <= _PIECE:
        return files.openat2(root, path or b".", flags, mode)
    here = files.openat2(root, b".", _DIRECTORY)
    try:
        while len(path) > _PIECE:
            # A name has at most 255 bytes, so there is a slash to be found.
            cut = path.rfind(b"/", 0, _PIECE)
            if cut < 0:
                raise OSError(36, os.strerror(36), path[:_PIECE])  # ENAMETOOLONG
            deeper = files.openat2(here, path[:cut], _DIRECTORY)
            os.close(here)
            here = deeper
            path = path[cut + 1 :]
        return files.openat2(here, path, flags, mode)
    finally:
        os.close(here)


def remove_tree(parent: int, name: bytes) -> None:
    """Remove a file or a directory with all in it, if it is there; nobody else may be at work in it.

    Directories are first moved up beside the topmost, so that depth needs neither descriptors nor a stack.
    Raises OSError.
    """
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    top = files.openat2(parent, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        pending = _empty(top, top, 0)
        count = len(pending)
        while pending:
            one = pending.pop()
            here = files.openat2(top, one, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                moved = _empty(here, top, count)
            finally:
                os.close(here)
            count += len(moved)
            pending += moved
            os.rmdir(one, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def _empty(directory: int, top: int, count: int) -> list[bytes]:
    """Unlink the files of a directory and move its directories to ``top``; returns their names there."""
    moved: list[bytes] = []
    for text in os.listdir(directory):
        name = os.fsencode(text)
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            there = b".sandboxd-removed-%d" % (count + len(moved))
            os.rename(name, there, src_dir_fd=directory, dst_dir_fd=top)
            moved.append(there)
        else:
            os.unlink(name, dir_fd=directory)
    return moved
