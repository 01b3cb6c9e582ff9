"""Turns ``--input SRC[:DST]`` into the inputs of a request. Standard library only.

A file becomes an input of its own; all directories together become one tar. Nothing outside a named
directory is read: the walk uses directory descriptors and never follows a symbolic link; a link whose
target stays inside is packed as a link, any other is left out and named in ``Packed.left_out``, as are
FIFOs, sockets and devices.
"""

from __future__ import annotations

import base64
import io
import os
import posixpath
import stat
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Iterable
    from typing import Any

__all__ = ["Packed", "encode", "pack", "split"]

MAX_BYTES = 512 * 2**20
"""What one command will hold in memory; the daemon's own limit on a body is lower and is its to state."""
MAX_ENTRIES = 200_000
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Packed:
    """The inputs as the wire has them, and what was left out and why."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.tar: dict[str, str] | None = None
        self.left_out: list[str] = []
        self.size = 0

    def count(self, size: int) -> None:
        """Account for bytes that were read. Raises TooLarge."""
        self.check(size)
        self.size += size

    def check(self, size: int) -> None:
        """Raise TooLarge if so many more bytes are too many; called before they are read."""
        if self.size + size > MAX_BYTES:
            raise errors.TooLarge(f"the inputs are larger than {MAX_BYTES} bytes", limit=MAX_BYTES)


def encode(data: bytes) -> dict[str, str]:
    """Bytes as the wire has them: text when they are valid UTF-8, else base64."""
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def split(argument: str) -> tuple[str, str]:
    """``SRC[:DST]``: cut at the last colon, unless all of it names something that exists."""
    source, colon, target = argument.rpartition(":")
    if not colon or not source or os.path.lexists(argument):
        source, target = argument, ""
    if not target:
        # `.` and `dir/.` mean the content of the directory, put into the workspace itself.
        last = posixpath.basename(source.rstrip("/"))
        target = "." if last == "." or not last else last
        if last == "..":
            target = os.path.basename(os.path.realpath(source))  # noqa: PTH119 - pathlib costs start-up
    return source, _relative(target)


def _relative(target: str) -> str:
    clean = posixpath.normpath(target)
    if target.startswith("/workspace/") or target.rstrip("/") == "/workspace":
        clean = posixpath.relpath(clean, "/workspace")
    if clean.startswith(("/", "../")) or clean == "..":
        raise errors.InvalidRequest(f"--input: {target!r} is not below the workspace", field="inputs")
    try:
        clean.encode()
    except UnicodeEncodeError:
        raise errors.InvalidRequest(f"--input: {target!r} is not UTF-8", field="inputs") from None
    return clean


def pack(arguments: Iterable[str]) -> Packed:
    """The inputs that the arguments name. Raises InvalidRequest and TooLarge."""
    packed = Packed()
    archive: tarfile.TarFile | None = None
    buffer = io.BytesIO()
    for argument in arguments:
        source, target = split(argument)
        try:
            # The caller named SRC itself, so a symbolic link there is followed; none below it is.
            found = os.stat(source)  # noqa: PTH116 - pathlib costs start-up
            if stat.S_ISDIR(found.st_mode):
                if archive is None:
                    import tarfile  # noqa: PLC0415 - costs 10 ms of start-up

                    archive = tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed below
                root = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                _Walk(archive, packed, target).add(root)
            elif stat.S_ISREG(found.st_mode):
                _file(packed, source, target)
            else:
                raise errors.InvalidRequest(
                    f"--input: {source!r} is neither a file nor a directory", field="inputs"
                )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise errors.InvalidRequest(
                f"--input: cannot read {source!r}: {reason}", field="inputs"
            ) from None
    if archive is not None:
        archive.close()
        packed.tar = {"base64": base64.b64encode(buffer.getbuffer()).decode()}
    return packed


def _file(packed: Packed, source: str, target: str) -> None:
    if target == ".":
        target = posixpath.basename(source)
    with open(source, "rb") as file:  # noqa: PTH123 - pathlib costs start-up
        found = os.fstat(file.fileno())
        packed.check(found.st_size)
        data = file.read(MAX_BYTES + 1)
    packed.count(len(data))
    packed.inputs.append(
        {"path": target, "content": encode(data), "mode": stat.S_IMODE(found.st_mode) & 0o777}
    )


class _Walk:
    """Adds one directory to a tar, without recursion and without following a link."""

    def __init__(self, archive: tarfile.TarFile, packed: Packed, target: str) -> None:
        self._archive = archive
        self._packed = packed
        self._target = "" if target == "." else target
        self._entries = 0

    def add(self, root: int) -> None:
        """Add everything below the descriptor ``root``, which is closed."""
        try:
            if self._target:
                self._entry(self._target, os.fstat(root))
            waiting = [""]
            while waiting:
                below = waiting.pop()
                directory = self._open(root, below)
                try:
                    for name in sorted(os.listdir(directory)):  # noqa: PTH208 - of a descriptor
                        waiting.extend(self._one(directory, posixpath.join(below, name), name))
                finally:
                    os.close(directory)
        finally:
            os.close(root)

    @staticmethod
    def _open(root: int, below: str) -> int:
        current = os.dup(root)
        try:
            for part in below.split("/") if below else ():
                following = os.open(part, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = following
        except BaseException:
            os.close(current)
            raise
        return current

    def _one(self, directory: int, below: str, name: str) -> list[str]:
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise errors.TooLarge(f"--input: more than {MAX_ENTRIES} files", limit=MAX_ENTRIES)
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        path = posixpath.join(self._target, below)
        if stat.S_ISDIR(found.st_mode):
            self._entry(path, found)
            return [below]
        if stat.S_ISLNK(found.st_mode):
            link = os.readlink(name, dir_fd=directory)
            inside = posixpath.normpath(posixpath.join(posixpath.dirname(below), link))
            if link.startswith("/") or inside == ".." or inside.startswith("../"):
                self._packed.left_out.append(f"{path} (a link that leads out of the directory)")
            else:
                self._entry(path, found, link=link)
        elif stat.S_ISREG(found.st_mode):
            self._regular(directory, name, path)
        else:
            self._packed.left_out.append(f"{path} (not a file, a directory or a link)")
        return []

    def _regular(self, directory: int, name: str, path: str) -> None:
        fd = os.open(name, _FILE, dir_fd=directory)
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):  # swapped since it was looked at
                self._packed.left_out.append(f"{path} (changed while it was read)")
                return
            self._packed.check(found.st_size)
            data = file.read(MAX_BYTES + 1)
        self._packed.count(len(data))
        self._entry(path, found, data=data)

    def _entry(self, path: str, found: os.stat_result, *, link: str = "", data: bytes = b"") -> None:
        import tarfile  # noqa: PLC0415 - loaded already, by `pack`

        entry = tarfile.TarInfo(path)
        entry.mode = stat.S_IMODE(found.st_mode) & 0o777
        entry.mtime = int(found.st_mtime)
        if stat.S_ISDIR(found.st_mode):
            entry.type = tarfile.DIRTYPE
        elif link:
            entry.type, entry.linkname = tarfile.SYMTYPE, link
        entry.size = len(data)
        self._archive.addfile(entry, io.BytesIO(data))
