"""The layers on disk: a directory each, by a name that nothing else says anything about.

Theory of operation.  A layer is written whole and synced before anything refers to it, and is not changed
afterwards; what refers to it is in the journal's database. (A small one is in that database itself until it
is written and synced: ``unwritten``.) So a layer that nothing refers to is one whose
transaction never was, or whose references are gone: it is removed. ``layers`` is root's alone: its files have
the container's ids, which on the host are somebody else's.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import structlog
from uuid6 import uuid7

from sandboxd import errors
from sandboxd.failpoint import failpoint
from sandboxd.workspace import layer
from sandboxd.workspace.layerfiles import LayerFiles
from sandboxd.workspace.layerpack import pack, unpack
from sandboxd.workspace.layershared import LayerShared
from sandboxd.workspace.tree import remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from sandboxd.workspace.layer import Figures

__all__ = ["LayerStore"]

_libc = ctypes.CDLL(None, use_errno=True)
log = structlog.get_logger("sandboxd.sessions")


class LayerStore:
    """The layers of one state directory. Methods block, and are safe in several threads."""

    def __init__(self, directory: Path) -> None:
        """Raises HostFailed."""
        self.layers = directory / "layers"
        self.mounts = directory / "mounts"
        """Where mounts are attached for a moment."""
        self._scratch = directory / "scratch"
        try:
            for path in (directory, self.layers, self.mounts, self._scratch):
                path.mkdir(mode=0o700, exist_ok=True)
            self.empty.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise errors.HostFailed(f"{directory} cannot be used: {error.strerror}") from error

    @property
    def empty(self) -> Path:
        """A layer without anything, since an overlay has to have one below."""
        return self.layers / "empty"

    def path(self, name: str) -> Path:
        """Where a layer is."""
        return self.layers / name

    def clean(self, referenced: Collection[str]) -> int:
        """Remove the layers that nothing refers to, and what was at work when the daemon ended; how many."""
        removed = 0
        for name in [one.name for one in self.layers.iterdir()]:
            if name != self.empty.name and name not in referenced:
                self.remove(name)
                removed += 1
        for path in (self.mounts, self._scratch):
            for name in [one.name for one in path.iterdir()]:
                self._remove(path, name)
        return removed

    def remove(self, name: str) -> None:
        """Remove a layer, or what there is of it. What cannot be removed stays until the next start."""
        self._remove(self.layers, name)

    def _remove(self, parent: Path, name: str) -> None:
        try:
            directory = os.open(parent, layer.DIRECTORY)
            try:
                remove_tree(directory, name)
            finally:
                os.close(directory)
        except OSError as error:
            log.warning("files of a session are not removed yet", layer=name, reason=error.strerror)

    def take(self, upper: int, base: int, earlier: str | None = None) -> tuple[str, Figures]:
        """Keep an upper layer (a descriptor); returns its name, and what it holds. It is on disk then.

        Files that are the same in an ``earlier`` layer, if that is there, are shared with it. Raises
        WorkspaceUnfit, HostFailed; then nothing of it is left.
        """

        def fill(into: int, scratch: int) -> Figures:
            with layer.mapped(into), self._files(into, scratch, earlier) as files:
                return layer.take(upper, files, base)

        return self.add(fill)

    def _files(self, into: int, scratch: int, earlier: str | None) -> LayerFiles:
        if earlier is not None:
            with suppress(FileNotFoundError):
                return LayerShared(into, scratch, self.path(earlier))
        return LayerFiles(into, scratch)

    @staticmethod
    def pack(upper: int, base: int) -> tuple[str, bytes, Figures] | None:
        """A name for an upper layer (a descriptor) that is small, its pack, and what it holds; else None.

        Raises WorkspaceUnfit, HostFailed.
        """
        with layer.mapped(upper):
            found = pack(upper, base)
        return None if found is None else (uuid7().hex, *found)

    def add(self, fill: Callable[[int, int], Figures]) -> tuple[str, Figures]:
        """A layer that ``fill`` makes of an empty directory, with another to work in; synced.

        Raises HostFailed, and what ``fill`` raises; then nothing of it is left.
        """
        name = uuid7().hex
        try:
            with self._made(self.layers, name) as into, self._made(self._scratch, name) as scratch:
                failpoint("layer.write")
                figures = fill(into, scratch)
                failpoint("layer.sync")
                _sync(into)
        except BaseException as error:
            self.remove(name)
            if isinstance(error, OSError):
                raise errors.HostFailed(f"a session's files cannot be kept: {error.strerror}") from error
            raise
        finally:
            self._remove(self._scratch, name)
        failpoint("layer.synced")
        return name, figures

    def write(self, name: str, data: bytes) -> None:
        """Make a layer of a pack, in the place of what there is of it; not synced.

        Raises HostFailed, WorkspaceUnfit, Corrupt; then nothing of it is left.
        """
        try:
            self.remove(name)
            with self._made(self.layers, name) as into:
                failpoint("layer.unpack")
                with layer.mapped(into), LayerFiles(into, -1) as files:
                    unpack(data, files)
        except BaseException as error:
            self.remove(name)
            if isinstance(error, OSError):
                raise errors.HostFailed(f"a session's files cannot be kept: {error.strerror}") from error
            if isinstance(error, ValueError):
                raise errors.Corrupt(f"what a session's files are made of was damaged: {error}") from error
            raise

    def watch(self) -> int:
        """A descriptor for ``sync``, to be opened before what is to be synced is written. Raises HostFailed.

        The kernel tells of each failure to write once to each descriptor: one that is opened afterwards hears
        nothing of a failure that somebody else was told of, such as another sync here.
        """
        try:
            return os.open(self.layers, layer.DIRECTORY)
        except OSError as error:
            raise errors.HostFailed(f"a session's files cannot be made: {error.strerror}") from error

    def sync(self, since: int) -> None:
        """Bring every layer to disk. Raises HostFailed, also for what failed since ``watch``."""
        try:
            failpoint("layer.settle")
            _sync(since)
        except OSError as error:
            raise errors.HostFailed(f"a session's files cannot be synced: {error.strerror}") from error

    @contextmanager
    def _made(self, parent: Path, name: str) -> Iterator[int]:
        path = parent / name
        path.mkdir(mode=0o700)
        fd = os.open(path, layer.DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)


def _sync(directory: int) -> None:
    if _libc.syncfs(directory) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
