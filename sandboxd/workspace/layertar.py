"""A session's files as a layer of the OCI image specification (layer.md): a tar that other programs read.

A whole stack becomes a layer of its files; what differs between two becomes one that makes the newer of
the older, with a whiteout (``.wh.NAME``) for what was removed. The same files give the same bytes,
whatever layers they are in: names are sorted, and every time is 0 unless times are asked for. What is one
inode is written once, with hard links to it.

A file that a tool named ``.wh.…`` would be a whiteout to whoever reads the tar, and the whiteout of one
would be the mark of an opaque directory, or nothing. Both are refused, by name, before the first byte is
written. Sockets and devices have no place in such a layer: they are left out, and counted.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.workspace.diff import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.workspace.view import Entry, View

__all__ = ["OPAQUE_MARK", "WHITEOUT", "Export", "export_diff", "export_stack", "header"]

WHITEOUT = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
_BLOCK = 512
_LISTED = 100
_TYPES = {
    "file": tarfile.REGTYPE,
    "directory": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "fifo": tarfile.FIFOTYPE,
}

_Member = tuple[bytes, "Entry | None"]
"""A path, and the file that is there; None: a whiteout for it."""


@dataclass
class Export:
    """A tar that is to be written: what it will have, and its bytes, as they are read.

    ``size`` is of the files' content. ``unfit`` files are left out; ``omitted`` are the first of their paths.
    """

    chunks: Iterator[bytes]
    members: int = 0
    size: int = 0
    unfit: int = 0
    omitted: list[bytes] = field(default_factory=list)


def export_stack(view: View, *, times: bool = False) -> Export:
    """All files of a stack as one layer; the view has to stay open until the last chunk is read.

    Blocks, as does reading the chunks. Raises StateConflict for a name that is reserved for whiteouts,
    HostFailed.
    """

    def members() -> Iterator[_Member]:
        return ((entry.path, entry) for entry in view.walk())

    return _export(view, members, times=times)


def export_diff(old: View, new: View, *, times: bool = False) -> Export:
    """What makes the newer stack of the older; as ``export_stack`` in all else."""

    def members() -> Iterator[_Member]:
        gone: bytes | None = None
        for change in compare(old, new):
            beneath = gone is not None and change.path.startswith(gone + b"/")
            if change.new is not None:
                if change.path:  # the root is the reader's own
                    yield change.path, change.new
            elif not beneath:
                yield change.path, None
            was_directory = change.old is not None and change.old.is_directory
            if not beneath and was_directory and (change.new is None or not change.new.is_directory):
                gone = change.path

    return _export(new, members, times=times)


def _export(view: View, members: Callable[[], Iterator[_Member]], *, times: bool) -> Export:
    export = Export(_written(view, members, times=times))
    for path, entry in members():
        name = path.rpartition(b"/")[2]
        if name.startswith(WHITEOUT):
            shown = ascii(os.fsdecode(path))
            what, way = (f"{shown} cannot be exported", "rename the file")
            if entry is None:
                what = f"that {shown} was removed cannot be exported"
                way = "export all files, or what differs from a later checkpoint"
            raise errors.StateConflict(
                f"{what}: names that begin with .wh. say in a layer what was removed; {way}", path=shown
            )
        if entry is not None and entry.kind not in _TYPES:
            export.unfit += 1
            if len(export.omitted) < _LISTED:
                export.omitted.append(path)
            continue
        export.members += 1
        export.size += entry.size if entry is not None else 0
    return export


def _written(view: View, members: Callable[[], Iterator[_Member]], *, times: bool) -> Iterator[bytes]:
    known: dict[tuple[int, int], bytes] = {}
    for path, entry in members():
        if entry is None:
            above, _, name = path.rpartition(b"/")
            hidden = above + b"/" + WHITEOUT + name if above else WHITEOUT + name
            yield header(hidden, tarfile.REGTYPE)
            continue
        if entry.kind not in _TYPES:
            continue
        mtime = max(0, entry.mtime_ns // 10**9) if times else 0
        ids = (entry.mode, entry.uid, entry.gid, mtime)
        if entry.links > 1 and not entry.is_directory:
            first = known.setdefault(entry.inode, path)
            if first != path:
                yield header(path, tarfile.LNKTYPE, target=first, ids=ids)
                continue
        if entry.kind == "symlink":
            yield header(path, tarfile.SYMTYPE, target=view.target(entry), ids=ids)
        elif entry.kind == "file":
            yield header(path, tarfile.REGTYPE, size=entry.size, ids=ids)
            yield from view.content(entry)
            if entry.size % _BLOCK:
                yield bytes(-entry.size % _BLOCK)
        else:
            yield header(path, _TYPES[entry.kind], ids=ids)
    yield bytes(2 * _BLOCK)


def header(
    path: bytes,
    kind: bytes,
    *,
    target: bytes = b"",
    size: int = 0,
    ids: tuple[int, int, int, int] = (0o600, 0, 0, 0),
) -> bytes:
    """What stands before a file in a tar; ``ids`` are its mode, uid, gid and time."""
    info = tarfile.TarInfo(path.decode("utf-8", "surrogateescape"))
    info.type, info.size = kind, size
    info.mode, info.uid, info.gid, info.mtime = ids
    info.linkname = target.decode("utf-8", "surrogateescape")
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
