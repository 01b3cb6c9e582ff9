"""Opening a file that may be compressed, told by its first bytes.

gzip and bzip2 are read by the standard library. xz and zstd are read by their own programs: they
bound the memory that a stream may ask for (an xz header can ask for 4 GiB), and Python has no zstd
before 3.14.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import subprocess
import zlib
from typing import IO, TYPE_CHECKING, cast

from sandboxd.errors import HostUnsupported, ImageInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["decompressed", "is_compressed"]

_XZ = b"\xfd7zXZ\0"
_ZSTD = b"\x28\xb5\x2f\xfd"
_PROGRAMS = {
    _XZ: (["xz", "--decompress", "--stdout", "--memlimit-decompress=256MiB"], "xz-utils"),
    _ZSTD: (["zstd", "--decompress", "--stdout", "--quiet", "--long=27", "--memory=256MB"], "zstd"),
}


def _magic(path: Path) -> bytes:
    """The first six bytes of a file, which tell how it is compressed."""
    with path.open("rb") as file:
        return file.read(6)


def is_compressed(path: Path) -> bool:
    """Whether ``decompressed`` would have work to do."""
    return _magic(path).startswith((b"\x1f\x8b", b"BZh", _XZ, _ZSTD))


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file, as a stream that holds little of them.

    Raises ImageInvalid for a damaged stream, HostUnsupported where the program for it is missing.
    """
    magic = _magic(path)
    with path.open("rb") as file:
        try:
            if magic.startswith(b"\x1f\x8b"):
                with gzip.GzipFile(fileobj=file) as stream:
                    yield cast("IO[bytes]", stream)
            elif magic.startswith(b"BZh"):
                with bz2.BZ2File(file) as stream:
                    yield cast("IO[bytes]", stream)
            elif magic.startswith((_XZ, _ZSTD)):
                command, package = _PROGRAMS[_XZ if magic.startswith(_XZ) else _ZSTD]
                with _program(command, package, file) as stream:
                    yield stream
            else:
                yield file
        except (EOFError, zlib.error) as error:
            raise ImageInvalid(f"{path.name} is damaged: {error}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            # How gzip and bz2 report a damaged stream.
            raise ImageInvalid(f"{path.name} is damaged: {error}") from None


@contextlib.contextmanager
def _program(command: list[str], package: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
    try:
        process = subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise HostUnsupported(
            f"{command[0]} is missing; install it with `apt-get install {package}`"
        ) from None
    assert process.stdout is not None  # noqa: S101  it was asked for
    with process:
        try:
            yield process.stdout
        finally:
            # A reader that is done, or refused the content, need not see the end of it. A stream
            # that broke off shows itself as an archive that ends early.
            process.kill()
