"""Bytes of others that may be compressed: told by the first of them, and read with bounded memory.

gzip, bzip2 and xz, by the standard library. What is read has no more than was asked for, so whoever counts
that has a bound for what a few bytes may become. xz may be told to need gigabytes, which ``lzma.LZMAFile``
has no bound for.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import TYPE_CHECKING, Protocol, cast

from sandboxd import errors

if TYPE_CHECKING:
    from typing import BinaryIO

__all__ = ["Readable", "decompressed"]

_CHUNK = 256 * 1024
_XZ_MEMORY = 128 << 20  # what xz -9 needs to decompress is 65 MiB: xz(1)
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """``size`` bytes, fewer at the end alone."""
        ...


def decompressed(stream: Readable) -> Readable:
    """The bytes of a tar that may be compressed.

    Raises InvalidRequest, here and while it is read, for what is damaged or compressed in another way. What
    is damaged may show at the very end, where a checksum stands.
    """
    magic = stream.read(len(_XZ))
    whole = _Begun(magic, stream)
    if magic.startswith(_ZSTD):
        raise errors.InvalidRequest(
            "the tar is compressed with zstd; decompress it first, or use gzip, bzip2 or xz"
        )
    if magic.startswith(_GZIP):
        return _Checked(gzip.GzipFile(fileobj=cast("BinaryIO", whole), mode="rb"))
    if magic.startswith(_BZIP2):
        return _Checked(bz2.BZ2File(cast("BinaryIO", whole)))
    if magic.startswith(_XZ):
        return _Checked(io.BufferedReader(_Xz(whole), _CHUNK))
    return whole


class _Begun:
    """A stream of which the first bytes were read."""

    def __init__(self, head: bytes, rest: Readable) -> None:
        self._head = head
        self._rest = rest

    def read(self, size: int, /) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + self._rest.read(size - len(head)) if len(head) < size else head


class _Xz(io.RawIOBase):
    """Decompresses one stream of xz with bounded memory."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._decoder.eof:
            chunk = b""
            if self._decoder.needs_input:
                chunk = self._stream.read(_CHUNK)
                if not chunk:
                    raise EOFError
            out = self._decoder.decompress(chunk, len(buffer))
            if out:
                buffer[: len(out)] = out
                return len(out)
        return 0


class _Checked:
    """Maps what decompressing raises."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        try:
            return self._stream.read(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 set none for damage
                raise
            what = str(error) or "it is cut off"
            raise errors.InvalidRequest(f"the tar cannot be decompressed: {what}") from error
