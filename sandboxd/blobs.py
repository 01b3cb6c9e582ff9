"""A content-addressed store: a file's name is the SHA-256 of its content.

``<root>/sha256/ab/<64 hex digits>``; written beside, as ``<root>/tmp/…``, and linked into place whole, so
that a blob that can be seen is complete. The same content is stored once. Long runs of zeros become
holes: a sparse file does not grow by being collected.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO

from sandboxd import errors
from sandboxd.failpoint import failpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

__all__ = ["BlobStore", "BlobWriter"]

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise errors.HostFailed("no space left for artifacts in the state directory") from error
        raise errors.HostFailed(f"cannot write to the artifact store: {error.strerror}") from error


class BlobWriter:
    """One blob that is being written; leaving it without ``commit`` discards it."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._hash = hashlib.sha256()
        self._tmp = store.root / "tmp" / secrets.token_hex(16)
        self._fd = -1
        self.size = 0

    def __enter__(self) -> BlobWriter:  # noqa: PYI034 - no subclass is meant
        with _mapped():
            self._fd = os.open(self._tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._tmp.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Add bytes. Raises HostFailed."""
        self._hash.update(data)
        self.size += len(data)
        with _mapped():
            failpoint("blob.write")
            if data.count(0) == len(data):
                os.lseek(self._fd, len(data), os.SEEK_CUR)
                return
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]

    def commit(self, *, durable: bool = False) -> str:
        """Put the blob in its place and return its digest; ``durable`` syncs the file and its name."""
        digest = "sha256:" + self._hash.hexdigest()
        path = self._store.path(digest)
        with _mapped():
            os.ftruncate(self._fd, self.size)
            if durable:
                failpoint("blob.sync")
                os.fdatasync(self._fd)
            failpoint("blob.place")
            try:
                os.link(self._tmp, path)
            except FileNotFoundError:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._tmp.replace(path)
            except FileExistsError:
                # What is there may have lost its bytes with the power: this copy has them for sure. It is new
                # again, so that it is not taken for one that nobody wants.
                with self._store.changing:
                    self._tmp.replace(path)
            failpoint("blob.placed")
            if durable:
                _sync_directories(path.parent, self._store.root)
        return digest


def _sync_directories(path: Path, top: Path) -> None:
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        if path == top:
            return
        path = path.parent


class BlobStore:
    """Blobs in a directory of the state directory. Its methods block on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.changing = threading.Lock()  # between a blob that comes again and one that is removed
        with _mapped():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            (root / "tmp").mkdir(mode=0o700, exist_ok=True)
            (root / "sha256").mkdir(mode=0o700, exist_ok=True)
            _sync_directories(root, root.parent)  # once: a blob syncs what is below

    def path(self, digest: str) -> Path:
        """Where the blob of this digest is, or would be. Raises InvalidRequest for another form."""
        found = _DIGEST.fullmatch(digest)
        if found is None:
            raise errors.InvalidRequest("a digest is sha256: and 64 hex digits", field="digest")
        return self.root / "sha256" / found[1][:2] / found[1]

    def writer(self) -> BlobWriter:
        """A blob to write, as a context manager."""
        return BlobWriter(self)

    def add(self, data: bytes, *, durable: bool = False) -> str:
        """Store bytes and return their digest. Raises HostFailed."""
        with self.writer() as blob:
            blob.write(data)
            return blob.commit(durable=durable)

    def has(self, digest: str) -> bool:
        """Whether the blob is stored."""
        return self.path(digest).exists()

    def open(self, digest: str) -> BinaryIO:
        """Open a blob for reading. Raises NotFound."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise errors.NotFound(f"no blob {digest} is stored") from None

    def directories(self) -> list[Path]:
        """Where blobs are, some in each."""
        return sorted((self.root / "sha256").iterdir())

    def unused_since(self, directory: Path, when: float) -> list[str]:
        """Digests of blobs in one of the directories that were last written before a time."""
        found = []
        for path in directory.iterdir():
            if not _DIGEST.fullmatch(f"sha256:{path.name}"):
                continue
            with suppress(FileNotFoundError):  # it was discarded meanwhile
                if path.stat().st_mtime < when:
                    found.append(f"sha256:{path.name}")
        return found

    def discard(self, digests: Sequence[str], when: float) -> int:
        """Remove blobs, unless one was written again since a time; returns how many."""
        removed = 0
        for digest in digests:
            path = self.path(digest)
            with self.changing:
                try:
                    if path.stat().st_mtime < when:
                        path.unlink()
                        removed += 1
                except FileNotFoundError:
                    continue
        return removed

    def clean(self) -> int:
        """Remove what an earlier process left half-written, before the first writer; returns how many."""
        left = list((self.root / "tmp").iterdir())
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)
