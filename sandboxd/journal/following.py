"""What a spool has, for those who read it: each at its own pace, from any number or byte, while it grows.

Theory of operation: see ``spool``. Readers are tasks of the loop on which one task writes. Whoever has read
all that there is has the pending output numbered, if it is time, and then waits until more comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from sandboxd import errors, models
from sandboxd.journal.index import Index, Stream, Summary
from sandboxd.journal.output import OLD, Output, boundary

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

__all__ = ["HEAD", "NOTHING", "Following"]

_PIECE = 1 << 18
_RECENT = 8 << 20  # bytes at the end that are in the page cache
_NEAR = 64  # events at the end that are in the page cache, and read without a thread
HEAD = 1 << 20
"""Bytes of a stream that its call is told with."""


NOTHING = Output(Path(), 0).summary()
SILENCE = models.Content(text="", size=0, digest=NOTHING.digest)  # most calls write nothing to stderr


class Following(ABC):
    """The reading half of a spool."""

    def __init__(self, directory: Path) -> None:
        self._index = Index(directory)
        self._outputs: dict[Stream, Output] = {}
        self._summaries: dict[Stream, Summary] | None = None
        self._count = 0
        self._held: list[models.Event] | None = None
        self._closed = True
        self._wake: anyio.Event | None = None
        self._notice: models.Event | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._closed

    @property
    def complete(self) -> bool:
        """Whether it was closed, and not just left by a daemon that died."""
        return self._summaries is not None

    def content(self, stream: Stream, head: int = HEAD) -> models.Content:
        """A stream's head, and size, digest and dropped bytes of all of it.

        The head is cut back to a whole UTF-8 character. Blocks on the disk. Raises NotFound.
        """
        summary = self._summary(stream)
        if summary == NOTHING:
            return SILENCE
        data = self._index.read(stream, min(head, summary.size), 0) if summary.size else b""
        if len(data) < summary.size:
            data = data[: boundary(data)]
        return models.Content(
            **dict(models.Bytes.of(data)),
            size=summary.size,
            digest=summary.digest,
            complete=len(data) == summary.size,
            truncated=summary.dropped > 0,
            dropped=summary.dropped,
        )

    def _summary(self, stream: Stream) -> Summary:
        if stream in self._outputs:
            return self._outputs[stream].summary()
        if self._summaries is not None:
            return self._summaries[stream]
        size = self._index.size(stream)  # an earlier daemon died before it closed this
        digest = self._index.digest(stream, size)
        return Summary(size=size, digest="sha256:" + digest.hexdigest(), dropped=0)

    @abstractmethod
    def _seal_due(self) -> bool:
        """Seal what a reader may have now; returns whether something is left that will be due later."""

    async def follow(self, after: int = 0, *, wait: bool = True) -> AsyncIterator[models.Event]:
        """The events after number ``after``, ``wait``: those to come included, up to ``ended`` or ``close``.

        Several readers may follow, each at its own pace. Output comes with its data, at most 64 KiB in
        an event. Raises NotFound when the call is pruned meanwhile.
        """
        seq, noticed = max(0, after), False
        while True:
            if seq < self._count:
                for event in await self._batch(seq):
                    seq = event.seq
                    yield event
                    if event.type == "ended":
                        return
                continue
            later = self._seal_due()
            if seq < self._count:
                continue
            if self._notice is not None and not noticed:
                noticed = True
                yield self._notice.model_copy(update={"seq": seq})
                continue
            if self._closed or not wait:
                return
            with anyio.move_on_after(OLD / 1_000_000 if later else None):
                await self._changed()

    async def follow_bytes(
        self, stream: Stream, offset: int = 0, *, wait: bool = True
    ) -> AsyncGenerator[bytes]:
        """A stream's bytes from ``offset``, ``wait``: those to come included, in chunks of at most 1 MiB.

        Ends when the spool is closed. Raises InvalidRequest for a negative offset, NotFound.
        """
        if offset < 0:
            raise errors.InvalidRequest("an offset is not negative", field="offset")
        while True:
            closed = self._closed  # before the read: what is written after it is not lost
            known = self._outputs[stream].size if stream in self._outputs else None
            if self._held is None and (known is None or offset < known):
                if known is not None and not closed and known - offset <= _RECENT:
                    data = self._index.read(stream, _PIECE, offset)
                else:
                    data = await anyio.to_thread.run_sync(self._index.read, stream, _PIECE, offset)
                if data:
                    offset += len(data)
                    yield data
                    continue
            if closed or not wait:
                return
            await self._changed()

    async def _batch(self, seq: int) -> list[models.Event]:
        if self._held is not None:
            return self._held[seq:]
        if not self._closed and self._count - seq <= _NEAR:
            return self._index.events(seq, self._count)
        return await anyio.to_thread.run_sync(self._index.events, seq, self._count)

    def announce(self, notice: models.Event | None) -> None:
        """Tell every reader, once he has all events, what is so for now and is none itself; None: no more."""
        self._notice = notice
        self._notify()

    async def _changed(self) -> None:
        self._wake = self._wake or anyio.Event()
        await self._wake.wait()

    def _notify(self) -> None:
        if self._wake is not None:
            self._wake.set()
            self._wake = None
