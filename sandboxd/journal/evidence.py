"""The files that a record names by digest: where they are, and whether they still are what it says."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from sandboxd.journal import ending

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["EMPTY", "EVENTS", "Evidence", "opened"]

EVENTS = ("events", "details")
"""The files of a call's events, of which a header vouches for the beginning: all up to its outcome."""
EMPTY = "sha256:" + hashlib.sha256().hexdigest()
_CHUNK = 1 << 20


class Evidence:
    """Streams and artifacts below a state directory. Everything here blocks on the disk."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def stream(self, id_: str, name: str) -> Path:
        """Where a call's ``stdout`` or ``stderr`` is; there is none where nothing was written."""
        return self._state / "calls" / id_ / name

    def blob(self, digest: str) -> Path:
        """Where an artifact's content is."""
        bare = digest.removeprefix("sha256:")
        return self._state / "blobs" / "sha256" / bare[:2] / bare

    def named(self, header: dict[str, Any]) -> Iterator[tuple[str, Path, str]]:
        """What a header names: what to call it, its file, its digest. Streams without a byte have no file."""
        for name in ("stdout", "stderr"):
            stream = header.get(name)
            if isinstance(stream, dict) and stream["digest"] != EMPTY:
                yield name, self.stream(header["id"], name), stream["digest"]
        for digest in dict.fromkeys(header.get("artifacts") or ()):
            yield f"artifact {digest}", self.blob(digest), digest

    def events(self, header: dict[str, Any]) -> Iterator[tuple[str, Path, int, str]]:
        """The same of a call's events: name, file, how many bytes of it, and their digest.

        A call without output has no such files, and earlier versions named none.
        """
        said = header.get("events")
        if isinstance(said, dict):
            for name in EVENTS:
                yield name, self.stream(header["id"], name), said[name]["size"], said[name]["digest"]

    def problems(self, header: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Each of them, and what is wrong with it; an empty text where nothing is."""
        whole = [(what, path, None, digest) for what, path, digest in self.named(header)]
        for what, path, size, digest in (*whole, *self.events(header)):
            try:
                found = digest_of(path, size)
            except FileNotFoundError:
                yield what, "is gone"
            except OSError as error:
                yield what, f"cannot be read: {error.strerror}"
            else:
                yield what, "" if found == digest else f"was changed: it has the digest {found}"
        if isinstance(header.get("events"), dict):
            yield "the events", ending.problem(self._state / "calls" / header["id"], header)


def opened(path: Path) -> BinaryIO:
    """A regular file, open for reading, as a context manager. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = cast("BinaryIO", os.fdopen(fd, "rb", buffering=0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def digest_of(path: Path, size: int | None = None) -> str:
    """The digest of a regular file, or of its first ``size`` bytes. Raises OSError."""
    digest, left = hashlib.sha256(), size
    with opened(path) as file:
        while data := file.read(_CHUNK if left is None else min(_CHUNK, left)):
            digest.update(data)
            left = None if left is None else left - len(data)
    return "sha256:" + digest.hexdigest()
