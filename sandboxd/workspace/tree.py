"""Directories that tools made: opened at any depth, and removed without recursion.

A tool can nest directories far deeper than ``PATH_MAX`` allows a path to say, so a path is opened piece
by piece, each piece beneath the directory of the one before and through no link
(``kernel.files.openat2``).
"""

# ruff: noqa: PTH208  -- directories are descriptors here

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.kernel import files

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DIRECTORY", "join", "open_at", "remove_tree", "shown", "step", "typed"]

_PIECE = 3000
"""Bytes of a path that are opened at once; PATH_MAX is 4,096."""
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
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


def remove_tree(parent: int, name: str | bytes) -> None:
    """Remove a file or a directory with all in it, if it is there; nobody else may be at work in it.

    Goes down and up again with one descriptor, whatever the depth. Raises OSError.
    """
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        at = os.open(name, DIRECTORY, dir_fd=parent)
    else:
        return
    way: list[tuple[str | bytes, list[str]]] = [(name, os.listdir(at))]
    try:
        while True:
            current, left = way[-1]
            if left:
                one = left.pop()
                try:
                    os.unlink(one, dir_fd=at)
                except IsADirectoryError:
                    at = step(at, one)
                    way.append((one, os.listdir(at)))
                continue
            way.pop()
            if not way:
                break
            at = step(at, "..")
            os.rmdir(current, dir_fd=at)
    finally:
        os.close(at)
    os.rmdir(name, dir_fd=parent)


def step(at: int, name: str) -> int:
    """Go from a directory to one in it, or above it; closes ``at``. Raises OSError, ``at`` open."""
    moved = os.open(name, DIRECTORY, dir_fd=at)
    os.close(at)
    return moved
