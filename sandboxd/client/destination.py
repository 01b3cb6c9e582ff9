"""A directory that released artifacts are saved below. Standard library only.

The names of artifacts were chosen by a tool and are hostile. Each name is walked component by component
with directory descriptors and ``O_NOFOLLOW``, so that neither a name nor a symbolic link that lies in
the directory (or is put there meanwhile) leads outside. A file appears under its name complete, with
the size and the digest that the invocation gives for it, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from typing import TYPE_CHECKING, Self

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Destination", "Incoming", "components"]

MAX_NAME = 255  # bytes, NAME_MAX
MAX_DEPTH = 256
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def components(path: str) -> list[str]:
    """The components of a relative path. Raises InvalidRequest for one that could lead elsewhere."""
    parts = path.split("/")
    bad = (
        len(parts) > MAX_DEPTH
        or "\0" in path
        or any(part in {"", ".", ".."} or len(os.fsencode(part)) > MAX_NAME for part in parts)
    )
    if bad:
        raise errors.InvalidRequest(
            f"artifact name {path[:200]!r} is not a plain relative path", field="path"
        )
    return parts


class Incoming:
    """A file on its way to its name: written to a temporary name beside it, renamed when verified."""

    def __init__(
        self, directory: int, name: str, *, path: str, size: int, digest: str, executable: bool
    ) -> None:
        self._directory = directory
        self._name = name
        self._path = path
        self._expected = (size, digest)
        self._temporary = f".sandboxd-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._temporary, flags, 0o777 if executable else 0o666, dir_fd=directory)
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._done = False

    def write(self, data: bytes) -> None:
        """Append bytes. Raises Unavailable as soon as there are more than were announced."""
        self._sha256.update(data)
        self._size += len(data)
        if self._size > self._expected[0]:
            raise self._wrong()
        view = memoryview(data)
        with _named(self._path):
            while view:
                view = view[os.write(self._fd, view) :]

    def commit(self) -> None:
        """Give the file its name. Raises Unavailable if it is not what the invocation says it is."""
        if (self._size, "sha256:" + self._sha256.hexdigest()) != self._expected:
            raise self._wrong()
        with _named(self._path):
            os.replace(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._done = True

    def _wrong(self) -> errors.Unavailable:
        return errors.Unavailable(
            f"artifact {self._path!r} did not arrive with the {self._expected[0]} bytes and the digest "
            "that its invocation gives",
            reason="lost",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if not self._done:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._directory)
        os.close(self._directory)


class Destination:
    """A directory, made if it is missing, that artifacts are saved below. A context manager."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._path = os.fspath(directory)
        with _named(self._path):
            os.makedirs(self._path, exist_ok=True)  # noqa: PTH103 - pathlib costs 5 ms of start-up
            # The caller chose this name: a symbolic link to a directory is theirs to use.
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def incoming(self, path: str, size: int, digest: str, *, executable: bool = False) -> Incoming:
        """A file of so many bytes and this digest, to be written at ``path``, whose directories are made.

        Raises InvalidRequest for a name that could lead outside, and StateConflict where something that
        is no directory, such as a symbolic link, stands in the way.
        """
        *parents, name = components(path)
        current = os.dup(self._fd)
        try:
            for part in parents:
                with _named(path):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=current)
                    following = os.open(part, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = following
            with _named(path):
                return Incoming(current, name, path=path, size=size, digest=digest, executable=executable)
        except BaseException:
            os.close(current)
            raise

    def close(self) -> None:
        """Close the directory."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Map OSError to a typed error that names the file."""
    try:
        yield
    except (NotADirectoryError, IsADirectoryError) as error:
        raise errors.StateConflict(f"cannot save {path!r}: {error.strerror}", path=path) from None
    except OSError as error:
        raise errors.HostFailed(f"cannot save {path!r}: {error.strerror}", path=path) from None
