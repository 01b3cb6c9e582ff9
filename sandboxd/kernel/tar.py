"""A caller's tar, unpacked into a workspace that no tool has seen yet.

Theory of operation: the archive is hostile, so it is read here block by block (POSIX.1-2017 pax and
ustar, with the GNU long names) instead of by ``tarfile``, which would hold a whole extended header in
memory, however large a compressed one claims to be. Only files, directories, symbolic links and hard
links exist; everything else is refused by name. Writing goes through ``files.Writer``, which cannot
leave the workspace; how much may be written is bounded by ``Limits`` and by the workspace itself.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd import errors, units
from sandboxd.kernel import files
from sandboxd.kernel.compressed import decompressed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Limits", "check_tar", "unpack_tar"]

_BLOCK = 512
_CHUNK = 256 * 1024
_MAX_EXTENDED = 1 << 20  # pax and GNU long-name headers, each; a path has at most 4 KiB
_OVERHEAD = 4 * _BLOCK  # of an entry: its header, its padding, and its share of the extended headers
_MAX_RUN = 16  # extended headers before one member; GNU tar writes two
_MAX_MTIME = 2**33
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True)
class Limits:
    """The most that one tar may hold: bytes of content, after decompression, and entries."""

    size: int
    entries: int = 100_000


class _Archive:
    """Reads headers and content in order; every read is bounded, and so is all that is read.

    Without the latter a few MiB that decompress to hours of extended headers hold a slot for hours.
    """

    def __init__(self, data: bytes, most: int) -> None:
        self._stream = decompressed(io.BytesIO(data))
        self._most = self._left = most
        self._global: dict[str, bytes] = {}

    def _read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            most = units.format_size(self._most)
            raise errors.TooLarge(f"the tar unpacks to more than {most}, headers included", limit=self._most)
        data = self._stream.read(size)
        if len(data) != size:
            raise errors.InvalidRequest("the tar is cut off")
        return data

    def content(self, size: int) -> Iterator[bytes]:
        """The bytes of a member, in chunks, and past its padding."""
        left = size
        while left:
            chunk = self._read(min(left, _CHUNK))
            left -= len(chunk)
            yield chunk
        self._read(-size % _BLOCK)

    def members(self) -> Iterator[tuple[tarfile.TarInfo, bytes, bytes]]:
        """Each member with its name and link name; its content must be taken before the next."""
        own: dict[str, bytes] = {}
        extended = 0
        while (member := self._header()) is not None:
            if member.type in _EXTENDED:
                extended += 1
                if extended > _MAX_RUN:
                    raise errors.InvalidRequest("the tar has a run of extended headers with no member")
                self._extend(member, own)
                continue
            pax = self._global | own
            if "size" in pax:
                member.size = _number(pax["size"])
            if any(name.startswith("GNU.sparse.") for name in pax):
                raise errors.InvalidRequest("the tar has a sparse file; make it without --sparse")
            name = pax.get("path", member.name.encode("utf-8", "surrogateescape"))
            link = pax.get("linkpath", member.linkname.encode("utf-8", "surrogateescape"))
            yield member, name, link
            own, extended = {}, 0

    def _header(self) -> tarfile.TarInfo | None:
        block = self._read(_BLOCK)
        if not any(block):  # a block of zeros is the end
            return None
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise errors.InvalidRequest(f"this is no tar, or it is damaged: {error}") from error
        if member.size < 0:
            raise errors.InvalidRequest("the tar has a member of negative size")
        return member

    def _extend(self, member: tarfile.TarInfo, own: dict[str, bytes]) -> None:
        if member.size > _MAX_EXTENDED:
            most = units.format_size(_MAX_EXTENDED)
            raise errors.TooLarge(f"a header of the tar is over {most}", limit=_MAX_EXTENDED)
        data = b"".join(self.content(member.size))
        if member.type == tarfile.XHDTYPE:
            own.update(_pax(data))
        elif member.type == tarfile.XGLTYPE:
            self._global.update(_pax(data))
        else:
            own["path" if member.type == tarfile.GNUTYPE_LONGNAME else "linkpath"] = data.rstrip(b"\0")


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise errors.InvalidRequest("the tar has an extended header with a bad number")
    return int(text)


def _pax(data: bytes) -> dict[str, bytes]:
    """The records (``<length> <key>=<value>`` and a newline) of a pax extended header (POSIX.1-2017, pax)."""
    found: dict[str, bytes] = {}
    while data:
        digits, _, _ = data[:20].partition(b" ")
        length = _number(digits)
        record = data[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if length > len(data) or not equals or not value.endswith(b"\n"):
            raise errors.InvalidRequest("the tar has a damaged extended header")
        name = key.decode("utf-8", "replace")
        if name in {"path", "linkpath", "size"} or name.startswith("GNU.sparse."):
            found[name] = value[:-1]
        data = data[length:]
    return found


def _parts(name: bytes) -> list[bytes]:
    """The components of a member's name; the ``./`` and the trailing ``/`` that tar writes are dropped."""
    if name.startswith(b"/"):
        raise errors.InvalidRequest(f"the tar has an absolute name: {ascii(name)[:200]}")
    kept = b"/".join(part for part in name.split(b"/") if part != b".").rstrip(b"/")
    return files.split_path(kept) if kept else []


def unpack_tar(root: int, data: bytes, uid: int, gid: int, limits: Limits) -> int:
    """Unpack a tar (plain, gzip, bzip2 or xz) into a workspace, owned by these host ids.

    Names are relative; a later member replaces an earlier one that is no directory; set-id bits, owners
    and extended attributes are dropped. Blocks; call it in a thread. Returns the number of members.
    Raises InvalidRequest for what is damaged, hostile or of another kind, TooLarge over ``limits`` or
    when the workspace is full, HostFailed.
    """
    count = 0
    with files.Writer(root, uid, gid, replace=True) as writer:
        for member, parts, link, content in _members(data, limits):
            count += 1
            if not parts:
                continue  # "./": the workspace itself, whose mode is not the tar's to say
            if member.type in _REGULAR:
                mtime = int(member.mtime) if 0 <= member.mtime < _MAX_MTIME else None
                writer.file(parts, content, member.mode, mtime)
            elif member.isdir():
                writer.directory(parts, member.mode)
            elif member.issym():
                writer.symlink(parts, link)
            else:
                writer.hard_link(parts, _parts(link))
    return count


def check_tar(data: bytes, limits: Limits) -> None:
    """Read a tar to its end and write nothing. Blocks. Raises what ``unpack_tar`` does for the tar alone."""
    for _, _, _, content in _members(data, limits):
        for _ in content:
            pass


_Member = tuple[tarfile.TarInfo, list[bytes], bytes, "Iterator[bytes]"]
"""A member, the parts of its name, its link name, and its content, which must be taken before the next."""


def _members(data: bytes, limits: Limits) -> Iterator[_Member]:
    """Every member that is to be written, judged as far as it can be before it is."""
    archive = _Archive(data, limits.size + limits.entries * _OVERHEAD)
    total = 0
    for count, (member, name, link) in enumerate(archive.members(), 1):
        total += member.size
        if count > limits.entries:
            most = units.format_count(limits.entries)
            raise errors.TooLarge(f"the tar has more than {most} members", limit=limits.entries)
        if total > limits.size:
            most = units.format_size(limits.size)
            raise errors.TooLarge(f"the tar unpacks to more than {most}", limit=limits.size)
        parts = _parts(name)
        if not parts and not (member.isdir() and not member.size):
            raise errors.InvalidRequest("the tar has a member with an empty name")
        shown = ascii(b"/".join(parts))[:200]
        if member.type not in _REGULAR:
            if member.size:
                raise errors.InvalidRequest(f"the tar has content where none belongs: {shown}")
            if not (member.isdir() or member.issym() or member.islnk()):
                raise errors.InvalidRequest(
                    f"the tar has a member that is no file, directory or link: {shown}"
                )
            if member.islnk() and not _parts(link):
                raise errors.InvalidRequest(f"the tar has a hard link to nothing: {shown}")
        yield member, parts, link, archive.content(member.size)
