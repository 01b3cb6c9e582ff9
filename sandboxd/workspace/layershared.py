"""A layer as files, of which those that an earlier layer has already are shared with it, by hard links.

Theory of operation.  Checkpoints of one container all stand on what it began with, so each has all that the
one before had and its tool has not changed since. Which files those are, no time tells: a tool sets mtime as
it likes, and what it writes through a mapping of a tmpfs changes neither mtime nor ctime. So what is shared
was compared: the bytes that the layer's digest is made of, as they come, with those at the same path in the
earlier layer, and so are size, mode, owner, time and attributes. Nothing is written as long as they are the
same; where they turn out not to be, what was the same is copied from there first.

An earlier file is shared with one of ours: two that have it in common would be two names of one file. And
only as long as it has few names, since a file system lets it have so many, and a tool may make more.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from sandboxd.workspace.layer import DIRECTORY, FILE, Owner, has
from sandboxd.workspace.layerfiles import LayerFiles, copy_data
from sandboxd.workspace.tree import step

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from sandboxd.workspace.layer import Attributes, Looks

__all__ = ["LayerShared"]

MOST_NAMES = 1000
"""Of a file that is shared; ext4 lets one have 65,000."""
CHUNK = 1 << 20


class LayerShared(LayerFiles):
    """Makes a layer beside an earlier one of the same file system, which nobody changes.

    What cannot be read of that is not shared.
    """

    def __init__(self, into: int, scratch: int, earlier: Path) -> None:
        """``earlier`` is where that layer is. Raises FileNotFoundError where it is gone."""
        self._earlier = os.open(earlier, DIRECTORY)
        try:
            super().__init__(into, scratch)
        except BaseException:
            os.close(self._earlier)
            raise
        self._missing = 0
        """How many directories we are in of which the earlier layer has none; it is above them all."""
        self._used: set[int] = set()
        self._name = ""
        self._same = -1
        """The earlier file that looks like the present one, and is the same up to ``until``."""
        self._until = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is open."""
        for fd in (self._earlier, self._same):
            if fd >= 0:
                os.close(fd)
        super().__exit__(kind, error, trace)

    def enter(self, name: str) -> None:
        """Make a directory and go into it."""
        super().enter(name)
        if not self._missing:
            with suppress(OSError):
                self._earlier = step(self._earlier, name)
                return
        self._missing += 1

    def leave(self, owner: Owner, attributes: Attributes, *, opaque: bool) -> Owner:
        """End the directory and go to the one above."""
        if self._missing:
            self._missing -= 1
        elif self._depth:
            self._earlier = step(self._earlier, "..")
        return super().leave(owner, attributes, opaque=opaque)

    def begin(self, name: str, looks: Looks | None = None) -> None:
        """A file, of which nothing is made yet where the earlier layer has one that looks the same."""
        if looks is not None and not self._missing:
            with suppress(OSError):
                self._same = self._open(name, looks)
        if self._same < 0:
            super().begin(name)
            return
        self._name, self._until = name, 0

    def run(self, data: bytes, offset: int) -> None:
        """Some of its bytes."""
        if self._same >= 0:
            if self._goes_on(data, offset):
                self._until = offset + len(data)
                return
            self._part()
        super().run(data, offset)

    def end(self, size: int, attributes: Attributes, owner: Owner) -> Owner:
        """End the file."""
        if self._same >= 0:
            if self._goes_on(b"", size) and self._shares():
                return owner
            self._part()
        return super().end(size, attributes, owner)

    def _open(self, name: str, looks: Looks) -> int:
        """The earlier file, if it looks the same; else -1. Raises OSError."""
        found = os.stat(name, dir_fd=self._earlier, follow_symlinks=False)
        owner = Owner(stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns)
        if (
            not stat.S_ISREG(found.st_mode)
            or (found.st_size, owner) != (looks.size, looks.owner)
            or found.st_nlink + looks.names > MOST_NAMES
            or found.st_ino in self._used
        ):
            return -1
        file = os.open(name, FILE, dir_fd=self._earlier)
        try:
            if has(file, 0) == looks.attributes:
                file, same = -1, file
                return same
        finally:
            if file >= 0:
                os.close(file)
        return -1

    def _goes_on(self, data: bytes, offset: int) -> bool:
        """Whether the earlier file has nothing but zeros up to there, and the same bytes from there on."""
        try:
            return self._is_empty(offset) and os.pread(self._same, len(data), offset) == data
        except OSError:
            return False

    def _is_empty(self, end: int) -> bool:
        at = self._until
        while at < end:
            try:
                at = os.lseek(self._same, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but a hole is left
                    raise
                return True
            if at < end:
                data = os.pread(self._same, min(CHUNK, end - at), at)
                if not data or data.count(0) != len(data):
                    return False
                at += len(data)
        return True

    def _shares(self) -> bool:
        """Whether the earlier file has the present one's name now."""
        number = os.fstat(self._same).st_ino
        try:
            os.link(
                self._name,
                self._name,
                src_dir_fd=self._earlier,
                dst_dir_fd=self._here,
                follow_symlinks=False,
            )
        except OSError:
            return False
        self._used.add(number)
        file, self._same = self._same, -1
        os.close(file)
        return True

    def _part(self) -> None:
        """The two are not the same: make a file, with what was compared."""
        super().begin(self._name)
        copy_data(self._same, self._file, self._until)
        file, self._same = self._same, -1
        os.close(file)
