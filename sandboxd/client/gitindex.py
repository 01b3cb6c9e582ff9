"""The paths that git tracks, read from a repository's index (gitformat-index(5), versions 2 to 4).

A file that is tracked is never ignored, whatever the rules say. git itself is not asked: what a repository
configures is run by what would say it. What is no index, or is damaged, tracks nothing.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["tracked"]

MAX_FILE = 512 << 20
_HEADER = struct.Struct(">4sLL")
_STAT = 40
"""Bytes of an entry before its digest: what lstat(2) said."""
_SHA1, _SHA256 = 20, 32
_EXTENDED = 0x4000


def tracked(git: Path) -> set[bytes]:
    """The paths that a repository's index has, from the top of its work tree on; ``git`` is its directory."""
    try:
        fd = os.open(git / "index", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return set()
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            return set()
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(MAX_FILE)
    finally:
        os.close(fd)
    try:
        return set(_paths(data))
    except (struct.error, ValueError, IndexError):
        return set()


def _paths(data: bytes) -> Iterator[bytes]:
    """Raises struct.error, ValueError, IndexError for what is damaged."""
    magic, version, count = _HEADER.unpack_from(data)
    if magic != b"DIRC" or version not in {2, 3, 4} or count > len(data) // _STAT:
        return
    long = hashlib.sha256(data[:-_SHA256]).digest() == data[-_SHA256:]
    at, before = _HEADER.size, b""
    for _ in range(count):
        start = at
        at += _STAT + (_SHA256 if long else _SHA1)
        (flags,) = struct.unpack_from(">H", data, at)
        at += 4 if version > 2 and flags & _EXTENDED else 2
        if version == 4:
            cut, at = _number(data, at)
            end = data.index(b"\0", at)
            before = before[: len(before) - cut] + data[at:end]
            at = end + 1
        else:
            end = data.index(b"\0", at)
            before = data[at:end]
            at = start + (end - start + 8) // 8 * 8
        yield before


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, as in packs: each byte but the last has its high bit set."""
    value = data[at] & 0x7F
    while data[at] & 0x80:
        at += 1
        value = ((value + 1) << 7) | (data[at] & 0x7F)
    return value, at + 1
