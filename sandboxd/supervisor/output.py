"""What a command writes: from its pipes, without the secrets in it, to the spool, up to its caps."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

from sandboxd import errors
from sandboxd.supervisor.ending import Stopped
from sandboxd.supervisor.streams import OutputPipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.journal.spool import Spool
    from sandboxd.redaction import Redactor, Stream
    from sandboxd.supervisor.kept import Kept
    from sandboxd.supervisor.watch import Watch

__all__ = ["Output"]

Name = Literal["stdout", "stderr"]
NAMES: tuple[Name, Name] = ("stdout", "stderr")
RELEASE = 0.1  # seconds without output, after which the first bytes of what may be a secret go out


class Output:
    """Of one attempt. ``close`` it; before that, ``finish`` brings what is still on its way."""

    def __init__(self, spool: Spool, watch: Watch, *, kills: bool) -> None:
        """``kills``: a stream that is over its cap ends the call."""
        self._spool = spool
        self._watch = watch
        self._kills = kills
        self._pipes: list[OutputPipe] = []
        self._filters: dict[Name, Stream] = {}
        self._releases: dict[Name, asyncio.TimerHandle] = {}
        self.written: dict[Name, int] = dict.fromkeys(NAMES, 0)
        self.dropped: dict[Name, int] = dict.fromkeys(NAMES, 0)

    def open(self, uid: int, gid: int) -> None:
        """Make the pipes, which are the tool's. Raises OSError."""
        for name in NAMES:
            self._pipes.append(OutputPipe(uid, gid, self._sink(name)))

    @property
    def inner(self) -> list[int]:
        """The tool's ends: stdout, stderr."""
        return [pipe.inner for pipe in self._pipes]

    def handed_over(self) -> None:
        """Close our copies of them, so that the tool's death ends the streams."""
        for pipe in self._pipes:
            pipe.handed_over()

    def redact(self, redactor: Redactor) -> None:
        """From now on, keep secrets out."""
        self._filters = {name: redactor.stream() for name in NAMES}

    async def finish(self, kept: Kept | None) -> None:
        """Read to the end; of a container that is ``kept``, as far as is written, and leave it the rest."""
        for pipe in self._pipes:
            if kept is None or kept.ended is not None:
                await pipe.finished()
            else:
                kept.drain(pipe.leave())
        self._release_no_more()
        for name, searched in self._filters.items():
            self._store(name, searched.finish())

    def close(self) -> None:
        """Stop reading. Safe to call twice."""
        self._release_no_more()
        for pipe in self._pipes:
            pipe.close()

    def _sink(self, name: Name) -> Callable[[memoryview], None]:
        def sink(data: memoryview) -> None:
            searched = self._filters.get(name)
            if searched is None or self.dropped[name]:  # of what is dropped nobody sees anything
                self._store(name, data)
            else:
                self._store(name, searched.feed(data))
                self._release_soon(name, searched)

        return sink

    def _release_soon(self, name: Name, searched: Stream) -> None:
        """Let go of what may be no more than the end of a prompt, once nothing has come for a while."""
        if (before := self._releases.pop(name, None)) is not None:
            before.cancel()
        if not searched.waits:
            return

        def release() -> None:
            if released := searched.release():
                self._store(name, released)

        self._releases[name] = asyncio.get_running_loop().call_later(RELEASE, release)

    def _release_no_more(self) -> None:
        for timer in self._releases.values():
            timer.cancel()

    def _store(self, name: Name, data: memoryview | bytes) -> None:
        if self._watch.fault is not None:
            return  # what is lost was lost loudly; only the end of the pipe is waited for
        try:
            stored = self._spool.append(name, data)
        except errors.AttemptFailed as error:
            self._watch.break_off(error)
            return
        self.written[name] += stored
        self.dropped[name] += len(data) - stored
        if self._kills and stored < len(data):
            self._watch.end(Stopped(name))
