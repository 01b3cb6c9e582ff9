"""A name in an open directory that others may change: looked at, and written beside before it is replaced."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import unicodedata
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.artifacts import decode_path
from sandboxd.client.agreement import link_mark
from sandboxd.kernel import files

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["beside", "content_at", "is_git", "link_target", "own_umask", "status_of", "write_sparse"]

_BLOCK = 4096
_CHUNK = 1 << 20


@contextmanager
def beside(parent: int) -> Iterator[bytes]:
    """A name for what is renamed into place; what is left of it is removed."""
    name = b".sandboxd-pull-%s" % secrets.token_hex(8).encode()
    try:
        yield name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)


def write_sparse(fd: int, data: bytes, offset: int) -> None:
    """Write what is not all zeros at its place in a new file, whose end the caller sets."""
    view = memoryview(data)
    zeros = bytes(_BLOCK)
    at = 0
    while at < len(view):
        until = min(len(view), at + _BLOCK - (offset + at) % _BLOCK)
        if view[at:until] == zeros[: until - at]:
            at = until
            continue
        while until < len(view) and view[until : until + _BLOCK] != zeros[: len(view) - until]:
            until = min(len(view), until + _BLOCK)
        while at < until:
            at += os.pwrite(fd, view[at:until], offset + at)


def own_umask() -> int:
    """This process' own, which umask(2) tells only by changing it for all threads."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


def is_git(part: bytes) -> bool:
    """Whether a name is ``.git`` to git, or to a file system that folds case or has names of 8 and 3."""
    text = "".join(one for one in part.decode("utf-8", "ignore") if unicodedata.category(one) != "Cf")
    return text.casefold().partition(":")[0].rstrip(". ") in {".git", "git~1"}


def link_target(text: str, depth: int, *, git: bool) -> bytes:
    """Where a link may point, so many directories below the root; ``text`` is as the daemon tells it.

    Raises ValueError, which says why not, for one that may lead out, or without ``git`` to a ``.git``.
    """
    try:
        target = decode_path(text)
    except ValueError as error:
        raise ValueError("the daemon told a target that no link here can have") from error
    parts = target.split(b"/")
    up = next((at for at, part in enumerate(parts) if part != b".."), len(parts))
    # Behind a name, ".." goes up from where that name leads, and it may be a link.
    if not target or target.startswith(b"/") or up > depth or b".." in parts[up:]:
        raise ValueError("it is a link that leads out of the directory, or may by way of another")
    if any(is_git(part) for part in parts) and not git:
        raise ValueError("it is a link into .git; ask for it with --git")
    return target


def status_of(parent: int, name: bytes) -> os.stat_result | None:
    """What is at a name, not followed; None where nothing is."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def content_at(parent: int, name: bytes, here: os.stat_result) -> str | None:
    """The digest of what is here, or of where a link points; None for what has none."""
    if stat.S_ISLNK(here.st_mode):
        return link_mark(os.readlink(name, dir_fd=parent))
    if not stat.S_ISREG(here.st_mode):
        return None
    digest = hashlib.sha256()
    fd, _ = files.open_regular(parent, name)
    try:
        while chunk := os.read(fd, _CHUNK):
            digest.update(chunk)
    finally:
        os.close(fd)
    return f"sha256:{digest.hexdigest()}"
