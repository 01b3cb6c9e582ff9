"""The files of sessions for who is outside of them: listed, compared, read, written, exported, imported.

Theory of operation.  What is read is a ``View`` of the layers of a checkpoint, in a thread; a session is
not removed while somebody reads. A change waits for its turn as a call does, and is a layer and a
checkpoint as a call's are, so that it can be rolled back, and no running call sees half of it.

What a tool made may be deep, wide and large, so no answer costs what there is: each operation has its time
and bytes (``Effort``), runs in few threads for each caller (``Lanes``), and stops when nobody waits for it.
Bodies are counted, as long as they wait on the disk, for each caller and in all.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from types import GeneratorType
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio
import anyio.to_thread
import pydantic_core

from sandboxd import errors, models, units
from sandboxd.artifacts import decode_path, encode_path
from sandboxd.images.tarstream import ImportLimits
from sandboxd.kernel.files import MAX_PATH
from sandboxd.session import OWNER, lowest
from sandboxd.workspace import edit
from sandboxd.workspace.diff import compare
from sandboxd.workspace.effort import Effort
from sandboxd.workspace.layerimport import import_layer
from sandboxd.workspace.layertar import export_diff, export_stack
from sandboxd.workspace.textdiff import MAX_TEXT, TextDiff, text_diff
from sandboxd.workspace.view import Lent, View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from sandboxd.api.identity import Caller
    from sandboxd.room import Held, Room
    from sandboxd.sessions import Sessions, Standing
    from sandboxd.workspace.diff import Change
    from sandboxd.workspace.layertar import Export
    from sandboxd.workspace.view import Entry

__all__ = ["SessionFiles"]

MAX_FILE = 1 << 30
MAX_IMPORT = ImportLimits(total=4 << 30, entries=200_000)
MAX_ANSWER = 8 << 20
"""Bytes of one list or diff; what does not fit is left out, and the answer says so."""
MAX_DIFFS = 4 << 20
"""Bytes of text diffs in one answer; later files have none."""
_CHUNK = 1 << 18

BEYOND = 1 << 20
"""Bytes that a body may be larger than what is left for files: an archive has more than their content."""

T = TypeVar("T")
Shown = TypeVar("Shown", models.FileInfo, models.FileChange)


class SessionFiles:
    """Raises NotFound for a session that is not the caller's, as do all its methods."""

    def __init__(self, sessions: Sessions, scratch: Path, *, room: Room, body_time: int) -> None:
        """``scratch`` is where bodies are kept while they come, in ``room``, for ``body_time`` µs at most."""
        self._sessions = sessions
        self._scratch = scratch
        self._room = room
        self._body_time = body_time

    async def diff(
        self,
        caller: Caller,
        named: str,
        *,
        since: str,
        to: str | None,
        text: bool,
        limit: int,
        sound: bool = False,
    ) -> models.SessionDiff:
        """What differs between two checkpoints; with ``text``, how.

        ``sound``: the layers that make it so are compared with their digests first. Raises Corrupt.
        """

        def compared(old: Standing, new: Standing) -> models.SessionDiff:
            if sound:
                new.check(effort, old.layers)
            page = _Page[models.FileChange](limit)
            with _views(effort, old, new) as (before, after):
                left = MAX_DIFFS if text else 0
                for change in compare(before, after, into=page.into):
                    if not change.path or page.is_unnamed(change.path):  # the directory itself, or too deep
                        continue
                    if page.is_full or not page.add(
                        one := _change(before, after, change, left if text else None)
                    ):
                        page.truncated = True
                        break
                    left -= len(one.diff or "")
            return models.SessionDiff(
                since=old.checkpoint,
                to=new.checkpoint,
                changes=page.found,
                truncated=page.truncated,
                unnamed=page.unnamed,
            )

        effort = Effort()
        async with self._sessions.standing(caller, named, since, to) as (old, new):
            return await self._threaded(caller, effort, lambda: compared(old, new))

    async def list(
        self,
        caller: Caller,
        named: str,
        path: str,
        *,
        checkpoint: str | None,
        recursive: bool,
        digest: bool = False,
        after: str | None = None,
        limit: int,
    ) -> models.FileList:
        """What a directory has, or all beneath it, behind the path ``after``; the path of the root is empty.

        With ``digest`` a page ends where no more may be digested. Raises StateConflict.
        """
        place = _path(path) if path else b""
        passed = _order(_path(after)) if after is not None else []

        def into(directory: Entry) -> bool:
            """Whether anything in it can be behind ``after``."""
            parts = _order(directory.path)
            return page.into(directory) and (parts > passed or parts == passed[: len(parts)])

        def listed(one: Standing) -> models.FileList:
            with _views(effort, one) as (view,):
                entry = _found(view, place)
                if not entry.is_directory:
                    raise errors.StateConflict(f"{path!r} is a {entry.kind}, and no directory")
                for each in view.walk(entry, into=into) if recursive else view.children(entry):
                    if _order(each.path) <= passed or page.is_unnamed(each.path):
                        continue
                    asked = digest and _is_digested(each)
                    late = asked and bool(page.found) and not view.effort.may_digest(each.size)
                    if late or page.is_full or not page.add(_info(view, each, digest=asked)):
                        page.truncated = True
                        break
            return models.FileList(
                files=page.found,
                truncated=page.truncated,
                next=page.found[-1].path if page.truncated and page.found else None,
                unnamed=page.unnamed,
            )

        page = _Page[models.FileInfo](limit)

        effort = Effort()
        async with self._sessions.standing(caller, named, checkpoint) as (one,):
            return await self._threaded(caller, effort, lambda: listed(one))

    @asynccontextmanager
    async def read(
        self, caller: Caller, named: str, path: str, *, checkpoint: str | None
    ) -> AsyncIterator[tuple[models.FileInfo, AsyncIterator[bytes]]]:
        """A regular file: what it is, with its digest, and its bytes. Raises StateConflict."""
        place, effort = _path(path), Effort()
        async with AsyncExitStack() as inside:
            (one,) = await inside.enter_async_context(self._sessions.standing(caller, named, checkpoint))
            stack = await inside.enter_async_context(self._held(caller))

            def opened() -> tuple[models.FileInfo, Iterator[bytes]]:
                stack.is_used = True
                (view,) = stack.enter_context(_views(effort, one))
                entry = _found(view, place)
                info, chunks = _info(view, entry, digest=True), view.content(entry)
                stack.callback(_close, chunks)
                return info, chunks

            info, chunks = await self._threaded(caller, effort, opened)
            yield info, await self._streamed(caller, effort, chunks, inside)

    async def write(
        self,
        caller: Caller,
        named: str,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        condition: edit.Condition,
        mode: int | None,
    ) -> models.FileWritten:
        """Write a file. Raises PreconditionFailed, StateConflict, TooLarge, QuotaExceeded."""
        place = _path(path)
        async with self._spooled(caller, named, chunks, MAX_FILE) as body:

            def fill(view: View, into: int) -> edit.Written:
                content = iter(lambda: _Body(body, view.effort).read(_CHUNK), b"")
                owner = _owner(view)
                return edit.put(
                    view, into, place, content, owner=owner, most=MAX_FILE, mode=mode, condition=condition
                )

            written, made = await self._changed(caller, named, fill)
        return models.FileWritten(
            path=path, size=written.size, digest=written.digest, created=written.created, checkpoint=made.id
        )

    async def make_directory(self, caller: Caller, named: str, path: str) -> models.FileWritten:
        """Make a directory, and those above it. Raises StateConflict where something is already."""
        place = _path(path)
        _, made = await self._changed(
            caller, named, lambda view, into: edit.make_directory(view, into, place, owner=_owner(view))
        )
        return models.FileWritten(path=path, created=True, checkpoint=made.id)

    async def remove(
        self, caller: Caller, named: str, path: str, *, condition: edit.Condition, recursive: bool
    ) -> models.FileWritten:
        """Remove what is at a path. Raises PreconditionFailed, StateConflict for a directory with files."""
        place = _path(path)
        _, made = await self._changed(
            caller,
            named,
            lambda view, into: edit.remove(view, into, place, recursive=recursive, condition=condition),
        )
        return models.FileWritten(path=path, checkpoint=made.id)

    @asynccontextmanager
    async def export(
        self, caller: Caller, named: str, *, since: str | None, to: str | None, times: bool
    ) -> AsyncIterator[tuple[Export, AsyncIterator[bytes]]]:
        """A layer of a checkpoint's files, or of what makes it of an earlier one.

        Raises StateConflict, Corrupt.
        """
        wanted, effort = (to,) if since is None else (since, to), Effort()
        async with AsyncExitStack() as inside:
            stands = await inside.enter_async_context(self._sessions.standing(caller, named, *wanted))
            stack = await inside.enter_async_context(self._held(caller))

            def made() -> Export:
                stack.is_used = True
                for one in stands:  # nothing leaves as the session's that is not
                    one.check(effort)
                views = stack.enter_context(_views(effort, *stands))
                if len(views) == 1:
                    export = export_stack(views[0], times=times)
                else:
                    export = export_diff(views[0], views[1], times=times)
                stack.callback(_close, export.chunks)
                return export

            export = await self._threaded(caller, effort, made)
            yield export, await self._streamed(caller, effort, export.chunks, inside)

    async def bring(
        self,
        caller: Caller,
        named: str,
        chunks: AsyncIterator[bytes],
        *,
        match: str | None = None,
        own: bool = False,
    ) -> models.CheckpointInfo:
        """Put a layer's tar over what the session has, if it stands on the checkpoint of a digest.

        ``own``: what comes is the owner's of the session's files, whatever the archive says. Raises
        InvalidRequest, PreconditionFailed, TooLarge, QuotaExceeded.
        """
        async with self._spooled(caller, named, chunks, MAX_IMPORT.total) as body:
            _, made = await self._changed(
                caller,
                named,
                lambda view, into: import_layer(
                    _Body(body, view.effort), into, view, owner=_owner(view), own=own, limits=MAX_IMPORT
                ),
                match=match,
            )
        return made

    async def _changed(
        self, caller: Caller, named: str, fill: Callable[[View, int], T], *, match: str | None = None
    ) -> tuple[T, models.CheckpointInfo]:
        results: list[T] = []

        def filled(below: Sequence[Path | Lent], into: int) -> None:
            with View(below, effort) as view:
                results.append(fill(view, into))

        effort = Effort()
        made = await self._sessions.change(caller, named, filled, effort=effort, match=match)
        return results[0], made

    @asynccontextmanager
    async def _spooled(
        self, caller: Caller, named: str, chunks: AsyncIterator[bytes], most: int
    ) -> AsyncIterator[BinaryIO]:
        """A body on disk, where it takes no memory while the change waits for its turn.

        Nothing of it is read where the session is not the caller's. It counts in the room until it is gone.
        """
        async with self._sessions.standing(caller, named):
            with self._room.held(caller.uid) as held, tempfile.TemporaryFile(dir=self._scratch) as file:
                with anyio.move_on_after(self._body_time / 1e6) as late:
                    await self._spool(caller, chunks, file, held, most)
                if late.cancelled_caught:
                    raise errors.RequestTimeout(
                        f"the body did not arrive within {units.format_duration(self._body_time)}"
                    )
                file.seek(0)
                yield file

    async def _spool(
        self, caller: Caller, chunks: AsyncIterator[bytes], file: BinaryIO, held: Held, most: int
    ) -> None:
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > most:
                raise errors.TooLarge(f"the body is over {units.format_size(most)}", limit=most)
            if size > (left := self._sessions.left(caller)) + BEYOND:
                raise errors.QuotaExceeded(
                    f"the body is over the {units.format_size(left)} that are left to all your sessions",
                    quota="sessions.size",
                    asked=caller.sessions.size - left + size,
                    allowed=caller.sessions.size,
                )
            held.grow(len(chunk))
            try:
                await anyio.to_thread.run_sync(file.write, chunk)
            except OSError as error:
                raise errors.HostFailed(f"the body cannot be kept: {error.strerror}") from error

    async def _threaded(
        self, caller: Caller, effort: Effort, work: Callable[[], T], *, always: bool = False
    ) -> T:
        """What it returns; it is stopped, and waited for, where nobody waits for it any more."""
        return await self._sessions.work.run(
            caller.uid, lambda: effort.within(work), stop=effort.stop, always=always
        )

    @asynccontextmanager
    async def _held(self, caller: Caller) -> AsyncIterator[_Held]:
        """What is closed in a thread at the end of the block: a mount of what is lent may take its time."""
        stack = _Held()
        try:
            yield stack
        finally:
            if stack.is_used:
                with anyio.CancelScope(shield=True):
                    await self._threaded(caller, Effort(), stack.close, always=True)

    async def _streamed(
        self, caller: Caller, effort: Effort, chunks: Iterator[bytes], inside: AsyncExitStack
    ) -> AsyncIterator[bytes]:
        """Chunks that are read from the disk, each in a thread, and with a time of its own.

        The session is left before the last of them is told: whoever has read it all may remove the session.
        """

        async def following() -> bytes | None:
            chunk = await self._threaded(caller, effort, lambda: next(chunks, None), always=True)
            if chunk is None:
                await inside.aclose()
            return chunk

        async def told(chunk: bytes | None) -> AsyncIterator[bytes]:
            while chunk is not None:
                last, chunk = chunk, await following()
                yield last

        return told(await following())


def _close(chunks: Iterator[bytes]) -> None:
    if isinstance(chunks, GeneratorType):
        chunks.close()


class _Page(Generic[Shown]):
    """What one answer shows: at most ``limit``, in ``MAX_ANSWER`` bytes, with paths that can be asked for."""

    def __init__(self, limit: int) -> None:
        self.found: list[Shown] = []
        self.truncated = False
        self.unnamed = 0
        self._limit = limit
        self._size = 0

    @property
    def is_full(self) -> bool:
        """Whether no more is shown."""
        return len(self.found) >= self._limit

    def add(self, one: Shown) -> bool:
        """Show one more, if there is room for it."""
        self._size += len(pydantic_core.to_json(one, exclude_none=True)) + 1
        if self._size > MAX_ANSWER:
            return False
        self.found.append(one)
        return True

    def is_unnamed(self, path: bytes) -> bool:
        """Whether no request can name it, nor a program open it by its path; then it is counted alone."""
        if len(path) <= MAX_PATH:
            return False
        self.unnamed += 1
        return True

    @staticmethod
    def into(directory: Entry) -> bool:
        """Whether to look into it."""
        return len(directory.path) <= MAX_PATH


class _Held(ExitStack):
    """What a read holds; nothing until its turn has come."""

    is_used = False


class _Body:
    """A body that is read as long as somebody waits for what becomes of it."""

    def __init__(self, file: BinaryIO, effort: Effort) -> None:
        self._file = file
        self._effort = effort

    def read(self, size: int, /) -> bytes:
        """As a file's."""
        self._effort.step()
        return self._file.read(size)


@contextmanager
def _views(effort: Effort, *stands: Standing) -> Iterator[list[View]]:
    """Views of checkpoints of one session; what its caller has lent is the same layer in all."""
    with ExitStack() as stack:
        bottom = stack.enter_context(lowest(stands[-1].checkout))
        yield [stack.enter_context(View((*one.layers, *bottom), effort)) for one in stands]


def _owner(view: View) -> tuple[int, int]:
    """Who has what is made: who has the workspace, unless it is a directory of a caller's."""
    root = view.root()
    lent = any(isinstance(one, Lent) for one in view.layers)
    return (root.uid, root.gid) if root.members and not lent else OWNER


def _path(text: str) -> bytes:
    try:
        return decode_path(text)
    except ValueError:
        raise errors.InvalidRequest("the path is no valid Unicode", field="path") from None


def _found(view: View, path: bytes) -> Entry:
    entry = view.find(path)
    if entry is None:
        raise errors.NotFound(f"the session has no {os.fsdecode(path[:200])!a}")
    return entry


def _info(view: View, entry: Entry, *, digest: bool = False) -> models.FileInfo:
    return models.FileInfo(
        path=encode_path(entry.path),
        kind=entry.kind,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        size=entry.size,
        mtime=entry.mtime_ns // 1000,
        digest=view.digest(entry, most=MAX_FILE) if digest else None,
        target=encode_path(view.target(entry)) if entry.kind == "symlink" else None,
    )


def _change(before: View, after: View, change: Change, room: int | None) -> models.FileChange:
    differs = change.change != "changed" or bool({"content", "kind"} & set(change.aspects))
    old = None if change.old is None else _side(before, change.old, digest=differs)
    new = None if change.new is None else _side(after, change.new, digest=differs)
    diff = _text(before, after, change, room) if room is not None and differs else None
    return models.FileChange(
        path=encode_path(change.path),
        change=change.change,
        aspects=list(change.aspects),
        old=old,
        new=new,
        diff=diff.text if diff is not None else None,
        omitted=diff.omitted if diff is not None else None,
    )


def _side(view: View, entry: Entry, *, digest: bool) -> models.FileInfo:
    return _info(view, entry, digest=_may_digest(view, entry) if digest else False)


def _is_digested(entry: Entry) -> bool:
    return entry.kind == "file" and entry.size <= MAX_FILE


def _may_digest(view: View, entry: Entry) -> bool:
    return _is_digested(entry) and view.effort.may_digest(entry.size)


def _order(path: bytes) -> list[bytes]:
    """What paths are sorted by where a directory comes before what it has."""
    return path.split(b"/")


def _text(before: View, after: View, change: Change, room: int) -> TextDiff | None:
    sides: list[bytes | None] = []
    for view, entry in ((before, change.old), (after, change.new)):
        if entry is None or entry.kind != "file":
            sides.append(None)
            continue
        if entry.size > MAX_TEXT or room <= 0:
            return TextDiff("", "too_large" if room > 0 else "truncated")
        sides.append(b"".join(view.content(entry)))
    if sides == [None, None]:
        return None
    return text_diff(change.path, *sides, most=min(room, 64 << 10))
