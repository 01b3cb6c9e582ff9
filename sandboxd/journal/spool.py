"""A call's output and events on disk, numbered once and read again from any number.

Theory of operation: the bytes go to files as they come, and ``index`` says how they lie there. A tool
that writes one byte at a time must not make an index of a million records, and an event that was seen
must never change. So each stream's newest output is *pending*: it has no number yet, and grows with
what follows until it is sealed, which gives it the next number for ever. It is sealed when it is full
or older than ``OLD`` when more comes, when the other stream writes or another event comes, when a reader
has read all else, and at the end. After ``_FREE`` records that gets dear, and then neither a reader nor
the other stream seals what is not ``_LARGE`` or ``OLD`` yet: the index grows by the clock and by the
byte, not by the write, and the order between the two streams is kept only to that fineness.

One task writes, from the event loop; readers are tasks of the same loop and read the files (``following``),
each at its own pace, so that a stalled reader holds neither memory nor the tool. What was written long ago
is read in a thread.

Making files is what costs, so they are made for the first byte of output or the first event of the network.
Until then events are *held* in memory; what those of a call without either said is in its record
(``sandboxd.ledger``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict

from sandboxd.failpoint import failpoint
from sandboxd.journal.behind import packed as copied
from sandboxd.journal.evidence import EVENTS
from sandboxd.journal.following import NOTHING, Following
from sandboxd.journal.index import (
    DETAIL,
    RECORD_SIZE,
    STREAMS,
    SUMMARY,
    Record,
    Stream,
    dump_summaries,
    mapped,
)
from sandboxd.journal.output import Output, boundary, opened, pwrite, sync_directory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd import models

__all__ = ["Part", "Spool", "Stream"]

_MAX_EVENT = 64 * 1024
_FREE = 4096
_LARGE = 4096


def _now() -> int:
    return time.time_ns() // 1000


class Part(TypedDict):
    """The first bytes of a file: how many, and their digest."""

    digest: str
    size: int


class Spool(Following):
    """The output and events of one call; made by ``create``, ``open`` (ended calls) or ``recover``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._events = -1
        self._details = -1
        self._details_size = 0
        self._digests = {name: hashlib.sha256() for name in EVENTS}

    @classmethod
    def create(cls, directory: Path, caps: Mapping[Stream, int]) -> Self:
        """A new spool for a call. Caps are in bytes. Its directory is made for the first byte of output."""
        spool = cls(directory)
        spool._attach(caps)
        spool._held = []
        return spool

    @classmethod
    def held(cls, events: Sequence[models.Event]) -> Self:
        """The closed spool of a call without output, of which these are all events."""
        spool = cls(Path())
        spool._held, spool._count = list(events), len(events)
        spool._summaries = dict.fromkeys(STREAMS, NOTHING)
        return spool

    @classmethod
    def open(cls, directory: Path) -> Self:
        """The spool of a call that ended, for reading. Raises NotFound when it was pruned."""
        spool = cls(directory)
        spool._load()
        return spool

    @classmethod
    def recover(cls, directory: Path, caps: Mapping[Stream, int]) -> Self:
        """The spool of a call that an earlier daemon left running, for this one to end.

        Output that has no number yet gets one; a record whose bytes power took away is dropped. A spool
        that was closed is opened as by ``open``; one that is missing is made. Raises HostFailed.
        """
        if not (directory / "events").exists():
            with mapped():
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        spool = cls(directory)
        spool._resume(caps)
        return spool

    @property
    def stored(self) -> bool:
        """Whether it is open and has files, which ``sync`` brings to disk."""
        return not self._closed and self._held is None

    def _load(self) -> None:
        self._count = self._index.count()
        self._summaries = self._index.summaries()
        if self._summaries is not None:
            self._count -= 1  # the summary is no event

    def _attach(self, caps: Mapping[Stream, int]) -> None:
        for stream in STREAMS:
            self._outputs[stream] = Output(self._index.directory / stream, caps[stream])
        self._closed = False

    def _open_index(self) -> None:
        self._events = opened(self._index.directory / "events")
        self._details = opened(self._index.directory / "details")

    def _make_files(self, held: list[models.Event]) -> None:
        """Give what was held in memory its files: from now on events go there too. Raises OSError."""
        self._index.directory.mkdir(mode=0o700)
        try:
            failpoint("spool.make")
            self._open_index()
            self._count = self._details_size = 0
            self._digests = {name: hashlib.sha256() for name in EVENTS}
            for event in held:
                self._write_event(event)
        except OSError:  # the call will fail, and its events are still told from memory
            self._count = len(held)
            shutil.rmtree(self._index.directory, ignore_errors=True)
            raise
        self._held = None

    def _resume(self, caps: Mapping[Stream, int]) -> None:
        if (self._index.directory / "events").exists():
            self._load()
        if self._summaries is not None:
            return
        self._attach(caps)
        with mapped():
            self._open_index()
        sizes = {stream: self._index.size(stream) for stream in STREAMS}
        details = self._index.size("details")
        kept = 0
        for record in self._index.records(0, self._count):
            end = record.offset + record.size
            if record.kind > DETAIL or end > (
                details if record.kind == DETAIL else sizes[STREAMS[record.kind]]
            ):
                break
            if not self._index.holds(record):
                break
            if record.kind < DETAIL:
                self._outputs[STREAMS[record.kind]].sealed = end
            kept += 1
        if kept and self._index.events(kept - 1, kept)[0].type == "ended":
            kept -= 1  # whoever died between that and the summary: it is told again, at the same number
        self._count, self._details_size = kept, details
        with mapped():
            failpoint("spool.recover")
            os.ftruncate(self._events, kept * RECORD_SIZE)
        for name, size in (("events", kept * RECORD_SIZE), ("details", details)):
            self._digests[name] = self._index.digest(name, size)
        for stream, output in self._outputs.items():
            output.digest = self._index.digest(stream, sizes[stream])
            output.size, output.since = sizes[stream], _now()
            self._seal_long(stream)

    def _seal_long(self, stream: Stream) -> None:
        """Seal recovered output, which may be more than one event holds."""
        output = self._outputs[stream]
        size = output.size
        while output.sealed < size:
            output.size = min(size, output.sealed + _MAX_EVENT)
            self._seal(stream)

    def allow(self, caps: Mapping[Stream, int]) -> None:
        """Let each stream grow by so many bytes from where it is: another attempt has caps of its own."""
        for stream, output in self._outputs.items():
            output.cap = output.size + caps[stream]

    def size(self, stream: Stream) -> int:
        """Bytes of a stream so far."""
        return self._outputs[stream].size if stream in self._outputs else self._summary(stream).size

    def append(self, stream: Stream, data: bytes | memoryview) -> int:
        """Store output up to the stream's cap; returns how many bytes were stored, the rest is dropped.

        To be called from the event loop, with chunks of at most 256 KiB. Raises HostFailed.
        """
        output = self._outputs[stream]
        kept = data[: max(0, output.cap - output.size)]
        output.dropped += len(data) - len(kept)
        if not kept:
            return 0
        with mapped():
            if self._held is not None:
                self._make_files(self._held)
            failpoint("spool.write")
            output.write(kept)
            now = _now()
            for name, each in self._outputs.items():
                if each.is_old(now) or (name != stream and self._due(each, now)):
                    self._seal(name)
            self._extend(stream, memoryview(kept), now)
        self._notify()
        return len(kept)

    def _extend(self, stream: Stream, rest: memoryview, now: int) -> None:
        """Let pending output grow by what was written, sealing what is full at a character's end."""
        output = self._outputs[stream]
        while rest:
            if not output.pending:
                output.since = now
            piece = rest[: _MAX_EVENT - output.pending]
            if len(piece) < len(rest):
                piece = piece[: boundary(piece)]
            output.size += len(piece)
            rest = rest[len(piece) :]
            if rest or output.pending == _MAX_EVENT:
                self._seal(stream)

    def add(self, event: models.Event) -> models.Event:
        """Number and store an event that is not output (its ``seq`` is ignored); returns it as stored."""
        if event.type == "output":
            raise ValueError("output is added with append")
        numbered = event.model_copy(update={"seq": self._count + 1})
        if self._held is not None and event.type == "network":  # which follows from no record
            with mapped():
                self._make_files(self._held)
        if self._held is not None:
            self._held.append(numbered)
            self._count += 1
        else:
            with mapped():
                for stream in STREAMS:
                    self._seal(stream)
                numbered.seq = self._count + 1
                self._write_event(numbered)
        self._notify()
        return numbered

    def _write_event(self, event: models.Event) -> None:
        self._detail(DETAIL, event.at, event.model_dump_json(exclude_none=True).encode())

    def _detail(self, kind: int, at: int, data: bytes) -> None:
        pwrite(self._details, data, self._details_size)
        self._number(Record(at, self._details_size, len(data), kind).checked(data))
        self._details_size += len(data)
        self._digests["details"].update(data)

    def _number(self, record: Record) -> None:
        packed = record.pack()
        pwrite(self._events, packed, self._count * RECORD_SIZE)
        self._count += 1
        self._digests["events"].update(packed)

    def _due(self, output: Output, now: int) -> bool:
        """Whether pending output may get its number though it could still grow."""
        if not output.pending:
            return False
        return self._count < _FREE or output.pending >= _LARGE or output.is_old(now)

    def _seal(self, stream: Stream) -> None:
        output = self._outputs[stream]
        if output.pending:
            failpoint("spool.seal")
            record = Record(output.since, output.sealed, output.pending, STREAMS.index(stream))
            self._number(record.checked())
            output.sealed = output.size

    def _seal_due(self) -> bool:
        """Seal what a reader may have now; returns whether something is left that will be due later."""
        now = _now()
        ready = [stream for stream in STREAMS if not self._closed and self._due(self._outputs[stream], now)]
        with mapped():
            for stream in sorted(ready, key=lambda name: self._outputs[name].since):
                self._seal(stream)
        return not self._closed and any(output.pending for output in self._outputs.values())

    def close(self, *, durable: bool) -> None:
        """No more output or events; readers come to their end. ``durable`` syncs the files first.

        May be called twice. Raises HostFailed.
        """
        if self._closed:
            return
        try:
            if self._held is None:
                self._summarise()
                if durable:
                    self.sync()
        finally:
            self._close_files()

    def leave(self) -> None:
        """Let go of the files as if this daemon died: another spool goes on with them."""
        with mapped():
            for stream in STREAMS:
                if self._held is None:
                    self._seal(stream)
        self._close_files()

    def _close_files(self) -> None:
        self._closed = True
        for output in self._outputs.values():
            output.close()
        for fd in {self._events, self._details} - {-1}:
            os.close(fd)
        self._notify()

    def _summarise(self) -> None:
        with mapped():
            for stream in STREAMS:
                self._seal(stream)
            summaries = {stream: output.summary() for stream, output in self._outputs.items()}
            failpoint("spool.summary")
            self._detail(SUMMARY, _now(), dump_summaries(summaries))
            self._count -= 1  # the summary is no event

    def told(self) -> dict[str, Part] | None:
        """How far its files of events go by now, and their digests; None where it has no files.

        To be asked when all output has its number, as ``copy`` sees to: what follows is not in it.
        """
        if not self.stored:
            return None
        sizes = {"events": self._count * RECORD_SIZE, "details": self._details_size}
        return {
            name: {"digest": f"sha256:{self._digests[name].hexdigest()}", "size": sizes[name]}
            for name in EVENTS
        }

    def copy(self) -> bytes | None:
        """What its files hold so far, where that is little. Raises HostFailed."""
        with mapped():
            for stream in STREAMS:
                self._seal(stream)
            return copied(self._index.directory)

    def sync(self) -> None:
        """Bring to disk what was written so far; blocks, and may run in a thread. Raises HostFailed."""
        with mapped():
            failpoint("spool.sync")
            for output in self._outputs.values():
                output.sync()
            os.fdatasync(self._details)
            os.fdatasync(self._events)
            for directory in (self._index.directory, self._index.directory.parent):
                sync_directory(directory)
