"""The bytes of SQLite's write-ahead log: written once more, and proved to be those that SQLite wrote.

Each frame has a checksum of all frames before it, and the last one's is in the shared memory that SQLite
keeps beside the log (https://www.sqlite.org/fileformat2.html#walformat; walformat.html, "WAL-Index Header").
So one comparison shows that every byte of a log is what was written, also after the kernel forgot some.
"""

from __future__ import annotations

import os
import struct

__all__ = ["write_again"]

CHUNK = 1 << 20
HEADER, FRAME = 32, 24  # bytes of the log's header, and of a frame's before its page
MAGIC_BIG = 0x377F0683  # checksums of big-endian words; of little-endian ones with the lowest bit clear
WORDS = 0xFFFFFFFF


def write_again(fd: int, shared: int) -> bool:
    """Write a database's log over itself and sync it; whether all that was committed is in it.

    ``shared`` is the file of SQLite's shared memory. Nobody may write to the log meanwhile. Blocks. Raises
    OSError.
    """
    size, offset = os.fstat(fd).st_size, 0
    while offset < size and (data := os.pread(fd, CHUNK, offset)):
        offset += os.pwrite(fd, data, offset)
    os.fdatasync(fd)
    return _whole(fd, os.pread(shared, 48, 0))


def _whole(fd: int, index: bytes) -> bool:
    """Whether the frames up to the one that the index names last have its checksum."""
    (last,) = struct.unpack_from("=I", index, 16)
    if last == 0:
        return True
    header = os.pread(fd, HEADER, 0)
    if len(header) < HEADER:
        return False
    magic, _, page = struct.unpack_from(">III", header)
    order = ">" if magic == MAGIC_BIG else "<"
    sums = _checksum(header[:24], order, (0, 0))
    for number in range(last):
        frame = os.pread(fd, FRAME + page, HEADER + number * (FRAME + page))
        if len(frame) < FRAME + page or frame[8:16] != header[16:24]:  # of an earlier use of the file
            return False
        sums = _checksum(frame[FRAME:], order, _checksum(frame[:8], order, sums))
        if sums != struct.unpack_from(">II", frame, 16):
            return False
    return sums == struct.unpack_from("=II", index, 24)


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    for one, other in struct.iter_unpack(f"{order}II", data):
        first = (first + one + second) & WORDS
        second = (second + other + first) & WORDS
    return first, second
