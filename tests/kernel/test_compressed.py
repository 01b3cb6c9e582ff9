"""Bytes that may be compressed: what comes out, how much at once, and what is said of damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.kernel.compressed import decompressed

if TYPE_CHECKING:
    from collections.abc import Callable

PACKED = pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])


def whole(data: bytes, step: int = 1000) -> bytes:
    stream, parts = decompressed(io.BytesIO(data)), []
    while part := stream.read(step):
        assert len(part) <= step
        parts.append(part)
    assert stream.read(step) == b""
    return b"".join(parts)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_what_went_in_comes_out(pack: Callable[[bytes], bytes]) -> None:
    for data in (b"x", b"text" * 1000, os.urandom(600_000), bytes(3 << 20)):
        for step in (1, 1000) if len(data) < 5000 else (1 << 18,):
            assert whole(pack(data), step) == data
    assert whole(pack(b"") if pack is not bytes else b"") == b""


def test_two_files_of_gzip_are_one() -> None:
    assert whole(gzip.compress(b"one") + gzip.compress(b"two")) == b"onetwo"


@PACKED
def test_a_cut_anywhere_is_told(pack: Callable[[bytes], bytes]) -> None:
    data = pack(b"some text" * 50)
    for size in range(6, len(data)):
        with pytest.raises(errors.InvalidRequest, match="cannot be decompressed"):
            whole(data[:size])


@PACKED
def test_a_checksum_that_is_wrong_is_told(pack: Callable[[bytes], bytes]) -> None:
    data = bytearray(pack(b"some text" * 50))
    data[-7] ^= 1
    with pytest.raises(errors.InvalidRequest, match="cannot be decompressed"):
        whole(bytes(data))


def test_zstd_is_named() -> None:
    with pytest.raises(errors.InvalidRequest, match="zstd; decompress it first"):
        decompressed(io.BytesIO(b"\x28\xb5\x2f\xfd" + bytes(20)))


@PACKED
def test_what_the_source_raises_stays_as_it_is(pack: Callable[[bytes], bytes]) -> None:
    class Source(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 6:
                raise errors.RequestTimeout("its time is over")
            return super().read(6 if size is None else min(size, 7))

    with pytest.raises(errors.RequestTimeout):
        decompressed(Source(pack(os.urandom(5000)))).read(4000)
