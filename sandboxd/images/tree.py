"""The digest of a tree of files: ``sandboxd-tree-v1``.

The document is text of one canonical JSON object per line. The first line is
``{"format":"sandboxd-tree-v1"}``; then comes each file, depth first, the names of a directory in the
order of their bytes, the root as ``/``. A line has ``path`` (bytes outside unreserved ASCII
percent-encoded, so that any name has one form), ``type``, ``mode`` (permission, set-id and sticky
bits), ``uid``, ``gid``, and by type ``size``, ``sha256``, ``capability`` (the hex of
``security.capability``, if set), ``target``, or ``major`` and ``minor``. Times, link counts and other
extended attributes are not part of it. The digest is SHA-256 of the document.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes

from sandboxd.canonical import canonical
from sandboxd.errors import ImageInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["MAX_ID", "differences", "tree_document"]

FORMAT = "sandboxd-tree-v1"
MAX_ID = 65535
"""The highest uid and gid that an image may hold: a slot's range of ids has 65,536."""
_SAFE = "/-_.~+:@,="
_CHUNK = 1 << 20


def tree_document(root: Path) -> tuple[bytes, int]:
    """The document of the tree under ``root``, and the bytes of its regular files.

    Raises ImageInvalid for an id over 65535 or a file of a type that no image holds.
    """
    lines = [canonical({"format": FORMAT})]
    sizes: dict[tuple[int, int], tuple[int, str]] = {}
    for path, entry in _walk(os.fsencode(root)):
        lines.append(canonical(_describe(path, entry, sizes)))
    return b"\n".join(lines) + b"\n", sum(size for size, _ in sizes.values())


def differences(root: Path, document: bytes) -> list[str]:
    """The paths whose description is not the one in ``document``, sorted; empty if all are the same."""
    recorded = _by_path(document)
    found: dict[str, bytes] = {}
    try:
        found = _by_path(tree_document(root)[0])
    except ImageInvalid as error:
        return [str(error.details.get("path", "/"))]
    except FileNotFoundError:
        return ["/"]
    return sorted(path for path in recorded.keys() | found.keys() if recorded.get(path) != found.get(path))


def _by_path(document: bytes) -> dict[str, bytes]:
    entries: dict[str, bytes] = {}
    for line in document.splitlines()[1:]:
        # Keys are sorted and a path holds no quote, so the text after "path":" up to a quote is it.
        path = line.partition(b'"path":"')[2].partition(b'"')[0]
        entries[path.decode("ascii", "replace")] = line
    return entries


def _walk(root: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Pairs of the path inside the tree and on this host; an own stack, since depth is the image's."""
    pending = [b""]
    while pending:
        path = pending.pop()
        here = root + path
        yield path or b"/", here
        if stat.S_ISDIR(os.lstat(here).st_mode):
            names = sorted(os.listdir(here), reverse=True)  # noqa: PTH208  a Path cannot hold these bytes
            pending.extend(path + b"/" + name for name in names)


def _describe(path: bytes, here: bytes, sizes: dict[tuple[int, int], tuple[int, str]]) -> dict[str, Any]:
    status = os.lstat(here)
    quoted = quote_from_bytes(path, safe=_SAFE)
    if status.st_uid > MAX_ID or status.st_gid > MAX_ID:
        raise ImageInvalid(
            f"{quoted} belongs to {status.st_uid}:{status.st_gid}; the ids of an image end at {MAX_ID}",
            path=quoted,
        )
    entry: dict[str, Any] = {
        "path": quoted,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
    }
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        key = (status.st_dev, status.st_ino)
        if key not in sizes:
            sizes[key] = _content(here)
        entry["type"] = "file"
        entry["size"], entry["sha256"] = sizes[key]
        if capability := _capability(here):
            entry["capability"] = capability.hex()
    elif kind == stat.S_IFDIR:
        entry["type"] = "directory"
    elif kind == stat.S_IFLNK:
        entry["type"] = "symlink"
        entry["target"] = quote_from_bytes(os.readlink(here), safe=_SAFE)  # noqa: PTH115  as above
    elif kind == stat.S_IFIFO:
        entry["type"] = "fifo"
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        entry["type"] = "character-device" if kind == stat.S_IFCHR else "block-device"
        entry["major"], entry["minor"] = os.major(status.st_rdev), os.minor(status.st_rdev)
    else:
        raise ImageInvalid(f"{quoted} is a socket; an image holds none", path=quoted)
    return entry


def _content(here: bytes) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(here, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        while chunk := os.read(descriptor, _CHUNK):
            digest.update(chunk)
            size += len(chunk)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def _capability(here: bytes) -> bytes:
    try:
        return os.getxattr(here, "security.capability", follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
            return b""
        raise
