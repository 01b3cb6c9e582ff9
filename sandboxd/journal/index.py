"""A spool's files as they lie on disk, and how they are read.

``events`` holds records of 32 bytes: event N is at ``(N - 1) * 32``. A record of output says which bytes of
``stdout`` or ``stderr``, one of another kind which bytes of ``details``, where that event's JSON is. The
last record of a closed spool is its summary: sizes, digests and dropped bytes of its streams. Each record has
a checksum, over what it points to in ``details`` too: what comes after a sync may be lost by parts with the
power. Files are opened for each read, so that a reader that stalls holds nothing.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zlib
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from sandboxd import errors, models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["DETAIL", "STREAMS", "SUMMARY", "Index", "Record", "Stream", "Summary", "dump_summaries", "mapped"]

Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, ...] = get_args(Stream)
DETAIL, SUMMARY = 2, 3
"""The kinds of records beside the indices of ``STREAMS``."""
RECORD_SIZE = 32
_RECORD = struct.Struct("<QQQB3xI")
_CHECKED = struct.Struct("<QQQB")
_CHUNK = 256 * 1024
_STEP = 256  # records that are read at once
_UNSYNCED = 2  # records at the end that are written after the last sync: that it ended, and the summary


class Record(NamedTuple):
    """Where an event's bytes are: in the file of its kind."""

    at: int
    offset: int
    size: int
    kind: int
    check: int = 0
    """The checksum; 0 where an earlier version wrote none."""

    def checked(self, details: bytes = b"") -> Record:
        """With a checksum, over the bytes in ``details`` as well."""
        return self._replace(check=zlib.crc32(details, zlib.crc32(_CHECKED.pack(*self[:4]))) or 1)

    def pack(self) -> bytes:
        """The form on disk."""
        return _RECORD.pack(*self)


class Summary(models.Wire):
    """What a closed spool knows of a stream without reading it again."""

    size: int
    digest: str
    dropped: int


_SUMMARIES: TypeAdapter[dict[Stream, Summary]] = TypeAdapter(dict[Stream, Summary])


def dump_summaries(summaries: dict[Stream, Summary]) -> bytes:
    """The form on disk."""
    return _SUMMARIES.dump_json(summaries)


@contextmanager
def mapped() -> Iterator[None]:
    """The host's errors as ours."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise errors.HostFailed("no space left for output in the state directory") from error
        raise errors.HostFailed(f"output in the state directory cannot be kept: {error.strerror}") from error


class Index:
    """Reads a spool's directory. Everything here blocks on the disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def count(self) -> int:
        """How many whole records there are, the summary included. Raises NotFound."""
        with self._open("events") as fd:
            return os.fstat(fd).st_size // RECORD_SIZE

    def records(self, seq: int, count: int) -> Iterator[Record]:
        """The records after number ``seq``, up to number ``count``. Raises NotFound."""
        while seq < count:
            with self._open("events") as fd:
                data = os.pread(fd, RECORD_SIZE * min(count - seq, _STEP), seq * RECORD_SIZE)
            data = data[: len(data) - len(data) % RECORD_SIZE]
            if not data:
                return
            yield from (Record(*fields) for fields in _RECORD.iter_unpack(data))
            seq += len(data) // RECORD_SIZE

    def holds(self, record: Record) -> bool:
        """Whether a record is as it was written, and what is in ``details`` of it. Raises NotFound."""
        if not record.check:
            return record.size > 0  # by an earlier version; else nothing but zeros
        data = self.read("details", record.size, record.offset) if record.kind >= DETAIL else b""
        return record.checked(data).check == record.check

    def events(self, seq: int, count: int) -> list[models.Event]:
        """The next events after ``seq``, up to ``count``; about 256 KiB of them, at least one."""
        events: list[models.Event] = []
        total = 0
        with ExitStack() as stack:
            files: dict[str, int] = {}
            for record in self.records(seq, min(count, seq + _STEP)):
                name = "details" if record.kind >= DETAIL else STREAMS[record.kind]
                if name not in files:
                    files[name] = stack.enter_context(self._open(name))
                data = os.pread(files[name], record.size, record.offset)
                events.append(self._event(seq + len(events) + 1, record, data))
                total += record.size
                if total >= _CHUNK:
                    break
        return events

    def _event(self, seq: int, record: Record, data: bytes) -> models.Event:
        if len(data) != record.size:
            raise errors.JournalCorrupt(f"event {seq} of {self.directory.name} is cut off")
        if record.kind < DETAIL:
            stream, shown = STREAMS[record.kind], models.Bytes.of(data)
            return models.Event(
                seq=seq, at=record.at, type="output", stream=stream, offset=record.offset, data=shown
            )
        try:
            return models.Event.model_validate_json(data)
        except ValidationError as error:
            raise errors.JournalCorrupt(f"event {seq} of {self.directory.name} cannot be read") from error

    def read(self, name: str, size: int, offset: int) -> bytes:
        """Bytes of one of the files; fewer at its end. Raises NotFound."""
        with self._open(name) as fd:
            return os.pread(fd, size, offset)

    def size(self, name: str) -> int:
        """The size of one of the files. Raises NotFound."""
        with self._open(name) as fd:
            return os.fstat(fd).st_size

    def digest(self, name: str, size: int) -> hashlib._Hash:
        """The running digest of the first ``size`` bytes of one of the files."""
        digest = hashlib.sha256()
        done = 0
        with self._open(name) as fd:
            while done < size and (data := os.pread(fd, min(_CHUNK, size - done), done)):
                digest.update(data)
                done += len(data)
        return digest

    def summaries(self) -> dict[Stream, Summary] | None:
        """What the last record says; None when the spool was not closed. Raises NotFound."""
        count = self.count()
        last = list(self.records(max(0, count - _UNSYNCED), count))
        if not last or last[-1].kind != SUMMARY or not all(map(self.holds, last)):
            return None
        record = last[-1]
        try:
            return _SUMMARIES.validate_json(self.read("details", record.size, record.offset))
        except ValidationError:
            return None  # power was lost after the record and before what it points to

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        with mapped():
            try:
                fd = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if name not in STREAMS or not (self.directory / "events").exists():
                    raise errors.NotFound("the output of this call is no longer kept") from None
                fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # nothing was written to this stream
            try:
                yield fd
            finally:
                os.close(fd)
