"""The directory of a store: scratch entries, publishing by rename, locks, and the table of names."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import shutil
from typing import TYPE_CHECKING

from sandboxd.errors import HostFailed, ImageInvalid, NotFound
from sandboxd.images.image import DIGEST
from sandboxd.images.remembered import Remembered

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Shelf"]

_libc = ctypes.CDLL(None, use_errno=True)


class Shelf:
    """Owns ``root``, makes it 0700, and removes what dead processes left half-made in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for directory in (root, root / "tmp", root / "host"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        self._names = Remembered(_read_names)
        self._sweep()

    def _sweep(self) -> None:
        with _waited(self.root / "tmp.lock"):
            for entry in (self.root / "tmp").iterdir():
                with contextlib.suppress(FileNotFoundError, BlockingIOError), locked(entry, fcntl.LOCK_EX):
                    shutil.rmtree(entry)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory to make an image in; gone afterwards, however that ends.

        A full disk is HostFailed; so is any other error of the host's file system.
        """
        work = self.root / "tmp" / secrets.token_hex(8)
        try:
            with contextlib.ExitStack() as stack:
                with _waited(self.root / "tmp.lock"):  # no sweep between the two
                    work.mkdir(mode=0o700)
                    stack.enter_context(locked(work, fcntl.LOCK_EX))
                stack.callback(shutil.rmtree, work)
                yield work
        except OSError as error:
            raise HostFailed(f"the image store failed: {error}", errno=error.errno) from error

    def publish(self, work: Path, target: Path, name: str | None = None) -> None:
        """Move ``work/image`` to ``target`` once it is on disk, and point ``name`` at it.

        One that is there already is kept: it has the same digest.
        """
        with self.table():
            if not (target / "image.json").exists():
                self._settle(work / "image", target)
            if name is not None:
                self.write_names({**self.names(), name: target.name.replace("-", ":")})

    @staticmethod
    def _settle(image: Path, target: Path) -> None:
        descriptor = os.open(image, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(descriptor) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(descriptor)
        image.rename(target)
        _sync_directory(target.parent)

    def discard(self, directory: Path) -> None:
        """Remove an image's directory: out of sight by one rename, then its files."""
        with self.scratch() as work:
            directory.rename(work / "image")

    @contextlib.contextmanager
    def table(self) -> Iterator[None]:
        """The exclusive lock of names and of what is published."""
        with _waited(self.root / "names.lock"):
            yield

    def names(self) -> dict[str, str]:
        """Names and digests. Raises ImageInvalid where the file was damaged."""
        try:
            return dict(self._names.get(self.root / "names.json"))
        except FileNotFoundError:
            return {}

    def digest_of(self, name: str) -> str | None:
        """The digest that a name stands for, if any. Raises ImageInvalid as ``names`` does."""
        try:
            return self._names.get(self.root / "names.json").get(name)
        except FileNotFoundError:
            return None

    def write_names(self, names: dict[str, str]) -> None:
        """Replace the table; the caller holds its lock."""
        path = self.root / "names.json.new"
        with path.open("w") as file:
            json.dump(names, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        path.rename(self.root / "names.json")
        _sync_directory(self.root)


def _read_names(path: Path) -> dict[str, str]:
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ImageInvalid(f"{path} is damaged: {error}") from None
    if not isinstance(document, dict) or not all(
        isinstance(value, str) and DIGEST.fullmatch(value) for value in document.values()
    ):
        raise ImageInvalid(f"{path} is damaged: a name without a digest")
    return document


@contextlib.contextmanager
def _waited(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Hold a flock of ``path`` without waiting for it.

    Raises BlockingIOError where it is taken, FileNotFoundError where the path was removed meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise FileNotFoundError(path)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(directory: Path, digest: str) -> Iterator[None]:
    """Hold an image for as long as containers of it exist. Raises NotFound if it is gone."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(directory / "image.json", fcntl.LOCK_SH))
        except (FileNotFoundError, BlockingIOError):
            raise NotFound(f"the image {digest} is not in the store, or is being removed") from None
        yield


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
