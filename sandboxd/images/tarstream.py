"""A reader of tar streams that nobody vouches for.

Reads POSIX ustar, pax (POSIX.1-2001) and the long names of GNU tar, one entry after the other, with
names as bytes. It is strict where being lenient has hurt other readers: a header without a right
checksum, a negative or endless size, an extended header over 1 MiB, sparse files and a stream that
ends early are ImageInvalid, and bytes and entries are counted before anything is kept of them. The
standard library's reader was not used since it reads an extended header of any size into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sandboxd.errors import ImageInvalid
from sandboxd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Budget", "ByteStream", "Entry", "ImportLimits", "TarStream"]

BLOCK = 512
MAX_EXTENDED = 1 << 20
_CHUNK = 1 << 18
_TYPES = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "fifo",
}


class ByteStream(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        ...


@dataclass(frozen=True)
class ImportLimits:
    """What an archive may unpack to: bytes of all streams after decompression, and files."""

    total: int = 16 << 30
    entries: int = 1_000_000


class Budget:
    """What is left of ``ImportLimits`` over all layers of one import."""

    def __init__(self, limits: ImportLimits) -> None:
        self.limits = limits
        self.total = 0
        self.entries = 0

    def spend(self, size: int) -> None:
        """Count bytes. Raises ImageInvalid over the limit."""
        self.total += size
        if self.total > self.limits.total:
            raise ImageInvalid(
                f"the archive unpacks to more than {format_size(self.limits.total)}", limit=self.limits.total
            )

    def entry(self) -> None:
        """Count a header. Raises ImageInvalid over the limit."""
        self.entries += 1
        if self.entries > self.limits.entries:
            raise ImageInvalid(
                f"the archive has more than {self.limits.entries} entries", limit=self.limits.entries
            )


@dataclass
class Entry:
    """One file of a tar. ``path`` and ``target`` are as written: not checked."""

    path: bytes
    type: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    target: bytes


class TarStream:
    """Iterates over the entries of a stream; ``content`` reads that of the entry at hand.

    ``marked``: it has to have the mark of its end, two blocks of zeros, without which one that was cut
    between two entries cannot be told from a whole one.
    """

    def __init__(self, stream: ByteStream, budget: Budget, *, marked: bool = False) -> None:
        self._stream = stream
        self._budget = budget
        self._marked = marked
        self._left = 0
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        extended: dict[bytes, bytes] = {}
        while (header := self._header()) is not None:
            self._budget.entry()
            kind = header[156:157]
            size = _number(header[124:136], "size")
            if kind in {b"x", b"g", b"L", b"K"}:
                text = self._extended(size)
                if kind == b"x":
                    extended.update(_pax(text))
                elif kind == b"L":
                    extended[b"path"] = text.split(b"\0", 1)[0]
                elif kind == b"K":
                    extended[b"linkpath"] = text.split(b"\0", 1)[0]
                continue
            entry = _entry(header, kind, size, extended)
            extended = {}
            if entry.size > self._budget.limits.total - self._budget.total:
                self._budget.spend(entry.size)
            self._left, self._padding = entry.size, -entry.size % BLOCK
            yield entry
            for _ in self.content():
                pass
            if not self._pad():
                return

    def content(self) -> Iterator[bytes]:
        """The content of the entry that the iteration stands at."""
        while self._left:
            chunk = self._exactly(min(self._left, _CHUNK))
            self._left -= len(chunk)
            yield chunk

    def _exactly(self, size: int) -> bytes:
        self._budget.spend(size)
        parts = []
        while size:
            part = self._stream.read(size)
            if not part:
                raise ImageInvalid("the archive ends in the middle of an entry")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _pad(self) -> bool:
        """Skip to the next block. False at the end: umoci's last entry has no padding."""
        left = self._padding
        while left:
            part = self._stream.read(left)
            if not part:
                self._check_mark()
                return False
            self._budget.spend(len(part))
            left -= len(part)
        return True

    def _header(self) -> bytes | None:
        first = self._stream.read(1)
        if not first:
            self._check_mark()
            return None  # no end mark; common in images, whose digests say that they are whole
        header = first + self._exactly(BLOCK - 1)
        if header == bytes(BLOCK):
            self._check_mark()
            return None
        expected = _number(header[148:156], "checksum")
        blank = header[:148] + b" " * 8 + header[156:]
        signed = sum(byte - 256 if byte > 127 else byte for byte in blank)
        if expected not in {sum(blank), signed}:
            raise ImageInvalid("this is no tar archive, or it is damaged: a header has the wrong checksum")
        return header

    def _check_mark(self) -> None:
        """What follows the last entry, or a first block of zeros, has to be one if it has to be marked."""
        last = b""
        while self._marked and last != bytes(BLOCK):
            part = self._stream.read(BLOCK - len(last))
            last += part
            if not part or any(part):
                raise ImageInvalid(
                    "the archive has no mark of its end, two blocks of zeros: it was cut off, or is empty"
                )
        self._budget.spend(len(last))

    def _extended(self, size: int) -> bytes:
        if size > MAX_EXTENDED:
            raise ImageInvalid(f"the archive has an extended header of {size} bytes", limit=MAX_EXTENDED)
        return self._exactly(size + -size % BLOCK)[:size]


def _number(field: bytes, name: str) -> int:
    """A number in octal, or in GNU's base 256."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    elif field[0] & 0x80:
        raise ImageInvalid(f"the archive has a negative {name}")
    else:
        text = field.split(b"\0", 1)[0].strip()
        if text and not all(48 <= byte <= 55 for byte in text):
            raise ImageInvalid(f"the archive has a {name} that is no octal number")
        value = int(text, 8) if text else 0
    return _bounded(value, name)


def _bounded(value: int, name: str) -> int:
    if not 0 <= value < 2**53:
        raise ImageInvalid(f"the archive has a {name} out of range")
    return value


def _pax(text: bytes) -> dict[bytes, bytes]:
    """The records of an extended header, ``LENGTH KEY=VALUE`` and a newline; LENGTH counts all of it."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(text):
        space = text.find(b" ", at, at + 9)
        digits = text[at:space] if space > at else b""
        end = at + int(digits) if digits.isdigit() else 0
        equals = text.find(b"=", space, end)
        if not space < equals < end <= len(text) or text[end - 1 : end] != b"\n":
            raise ImageInvalid("the archive has a malformed extended header")
        key, value = text[space + 1 : equals], text[equals + 1 : end - 1]
        if key.startswith(b"GNU.sparse."):
            raise ImageInvalid("the archive has sparse entries; write it again without --sparse")
        records[key] = value
        at = end
    return records


def _entry(header: bytes, kind: bytes, size: int, extended: dict[bytes, bytes]) -> Entry:
    if kind == b"S":
        raise ImageInvalid("the archive has sparse entries; write it again without --sparse")
    if kind not in _TYPES:
        raise ImageInvalid(f"the archive has an entry of the unknown type {kind!r}")
    path = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        path = prefix + b"/" + path
    path = extended.get(b"path", path)
    type_ = _TYPES[kind]
    if type_ == "file" and path.endswith(b"/"):
        type_ = "directory"  # how tar before POSIX wrote one
    numbers = {
        "size": size,
        "uid": _number(header[108:116], "uid"),
        "gid": _number(header[116:124], "gid"),
    }
    for name in numbers:
        if (value := extended.get(name.encode())) is not None:
            if not value.isdigit() or len(value) > 16:
                raise ImageInvalid(f"the archive has a {name} that is no number")
            numbers[name] = _bounded(int(value), name)
    mtime = header[136:148]
    return Entry(
        path=path,
        type=type_,
        mode=_number(header[100:108], "mode") & 0o7777,
        uid=numbers["uid"],
        gid=numbers["gid"],
        size=numbers["size"] if type_ == "file" else 0,
        mtime=_seconds(extended.get(b"mtime"), mtime),
        target=extended.get(b"linkpath", header[157:257].split(b"\0", 1)[0]),
    )


def _seconds(pax: bytes | None, field: bytes) -> int:
    """The time of a file in seconds; 0 for one before 1970 or written wrong, which harms nobody."""
    if pax is not None:
        whole = pax.split(b".", 1)[0]
        return int(whole) if whole.isdigit() and len(whole) < 12 else 0
    try:
        return min(_number(field, "mtime"), 2**34)
    except ImageInvalid:
        return 0
