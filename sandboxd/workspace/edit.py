"""Single changes of a session's files from outside: each is a layer that is put over those of a view.

The layer is made in a directory that the caller gives, empty, by a descriptor; making it a checkpoint is
the caller's too. Nothing of the view is changed, and nothing is followed: a link on the way or at the end
refuses the change. Directories on the way look as they do below; those that are missing are made, the
owner's.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from sandboxd import errors, units
from sandboxd.kernel import files
from sandboxd.workspace.tree import join, shown, typed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sandboxd.workspace.view import Entry, View

__all__ = ["ANYTHING", "Condition", "Tags", "Written", "make_directory", "names", "put", "remove"]

MAX_DIGESTED = 1 << 30
FAILED = "cannot be changed"
_SAID = 3  # digests that an error names
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


Tags: TypeAlias = "frozenset[str] | Literal['*']"
"""Digests, or whatever there is."""


def names(tags: Tags, digest: str | None) -> bool:
    """Whether what is there, with this digest or none, is one of them."""
    return isinstance(tags, str) or digest in tags


@dataclass(frozen=True)
class Condition:
    """What has to hold of a path for a change to be made.

    ``match``: one of these is there. ``unlike``: none of these is.
    """

    match: Tags | None = None
    unlike: Tags | None = None

    def check(self, view: View, path: bytes, entry: Entry | None) -> None:
        """Raises PreconditionFailed; TooLarge for a file over ``MAX_DIGESTED``, whose digest nobody knows."""
        if entry is None:
            if self.match is not None:
                wanted = "" if self.match == "*" else f"should be {_said(self.match)} and "
                raise errors.PreconditionFailed(f"{shown(path)} {wanted}is not there", digest=None)
            return
        if {self.match, self.unlike} <= {None, "*"}:
            if self.unlike is not None:
                small = entry.size <= MAX_DIGESTED
                digest = _digest(view, entry) if small else None
                raise errors.PreconditionFailed(f"{shown(path)} is there, as a {entry.kind}", digest=digest)
            return
        digest = _digest(view, entry)
        found = digest or f"a {entry.kind}"
        if self.match is not None and not names(self.match, digest):
            raise errors.PreconditionFailed(
                f"{shown(path)} should be {_said(self.match)} and is {found}", digest=digest
            )
        if self.unlike is not None and names(self.unlike, digest):
            raise errors.PreconditionFailed(
                f"{shown(path)} should not be {_said(self.unlike)} and is {found}", digest=digest
            )


def _digest(view: View, entry: Entry) -> str | None:
    return view.digest(entry, most=MAX_DIGESTED) if entry.kind == "file" else None


def _said(tags: Tags) -> str:
    if isinstance(tags, str):
        return "anything"
    first = [tag[:80] for tag in sorted(tags)[:_SAID]]
    more = [f"{len(tags) - _SAID} others"] if len(tags) > _SAID else []
    return " or ".join([*first, *more]) or "what a weak ETag is of"


ANYTHING = Condition()
"""No condition."""


@dataclass(frozen=True)
class Written:
    """The file as it is now."""

    digest: str
    size: int
    created: bool


def put(
    view: View,
    into: int,
    path: bytes,
    chunks: Iterable[bytes],
    *,
    owner: tuple[int, int],
    most: int,
    mode: int | None = None,
    condition: Condition = ANYTHING,
) -> Written:
    """Write a file of ``most`` bytes or less; one that is there keeps its owner, and a mode not told.

    Blocks. Raises InvalidRequest, PreconditionFailed, StateConflict for a path that leads through or to what
    is no file, TooLarge, HostFailed.
    """
    parts = files.split_path(path)
    entry = view.find(path)
    condition.check(view, path, entry)
    if entry is not None and entry.kind != "file":
        raise errors.StateConflict(f"{shown(path)} is a {entry.kind}; remove it first")
    digest, size = hashlib.sha256(), 0
    with _parent(view, into, parts, owner) as parent:
        with typed(path, FAILED):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            fd = files.openat2(parent, parts[-1], flags, 0o600)
        try:
            for chunk in chunks:
                size += len(chunk)
                if size > most:
                    raise errors.TooLarge(f"{shown(path)} is over {units.format_size(most)}", limit=most)
                digest.update(chunk)
                with typed(path, FAILED):
                    files.write_all(fd, chunk)
            with typed(path, FAILED):
                os.fchown(fd, *((entry.uid, entry.gid) if entry is not None else owner))
                os.fchmod(fd, _mode(entry, mode))
        finally:
            os.close(fd)
    return Written(f"sha256:{digest.hexdigest()}", size, entry is None)


def make_directory(
    view: View,
    into: int,
    path: bytes,
    *,
    owner: tuple[int, int],
    mode: int = 0o755,
    condition: Condition = ANYTHING,
) -> None:
    """Make a directory, and those above it. Raises as ``put``; StateConflict where something is already."""
    parts = files.split_path(path)
    entry = view.find(path)
    condition.check(view, path, entry)
    if entry is not None:
        raise errors.StateConflict(f"{shown(path)} is there already, as a {entry.kind}")
    with _parent(view, into, parts, owner) as parent, typed(path, FAILED):
        os.close(_made(parent, parts[-1], owner, mode & 0o777))


def remove(
    view: View, into: int, path: bytes, *, recursive: bool = False, condition: Condition = ANYTHING
) -> None:
    """Remove what is at a path; a directory that is not empty only with ``recursive``.

    Raises NotFound, StateConflict, and as ``put``.
    """
    parts = files.split_path(path)
    entry = view.find(path)
    condition.check(view, path, entry)
    if entry is None:
        raise errors.NotFound(f"the session has no {shown(path)}")
    if entry.is_directory and not recursive and view.children(entry):
        raise errors.StateConflict(f"{shown(path)} is a directory with files in it; remove it recursively")
    # All directories on the way are there, so none is made that would need an owner.
    with _parent(view, into, parts, (0, 0)) as parent, typed(path, FAILED):
        os.mknod(parts[-1], stat.S_IFCHR, 0, dir_fd=parent)


def _mode(entry: Entry | None, asked: int | None) -> int:
    if asked is not None:
        return asked & 0o777
    return entry.mode & 0o777 if entry is not None else 0o644


@contextmanager
def _parent(view: View, into: int, parts: list[bytes], owner: tuple[int, int]) -> Iterator[int]:
    """The directory of the new layer that the last part goes into."""
    found: Entry | None = view.root()
    with typed(b"", FAILED):
        here = files.openat2(into, b".", _LISTED)
    try:
        path = b""
        for name in [b"", *parts[:-1]]:  # the root first
            if name:
                path = join(path, name)
                found = view.child(found, name) if found is not None else None
            if found is not None and not found.is_directory:
                raise errors.StateConflict(f"{shown(path)} is a {found.kind}, and no directory")
            known = found if found is not None and found.members else None
            ids = (known.uid, known.gid) if known is not None else owner
            mode = known.mode if known is not None else 0o755
            with typed(path, FAILED):
                if name:
                    deeper = _made(here, name, ids, mode)
                    os.close(here)
                    here = deeper
                else:
                    os.fchown(here, *ids)
                    os.fchmod(here, mode)
        yield here
    finally:
        os.close(here)


def _made(parent: int, name: bytes, ids: tuple[int, int], mode: int) -> int:
    os.mkdir(name, 0o700, dir_fd=parent)
    fd = files.openat2(parent, name, _LISTED)
    try:
        os.fchown(fd, *ids)
        os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd
