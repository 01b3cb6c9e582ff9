"""The files of sessions for who is outside of them: listed, compared, read, written, exported, imported.

Theory of operation.  What is read is a ``View`` of the layers of a checkpoint, in a thread; a session is
not removed while somebody reads. A change waits for its turn as a call does, and is a layer and a
checkpoint as a call's are, so that it can be rolled back, and no running call sees half of it.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from sandboxd import errors, models, units
from sandboxd.artifacts import decode_path, encode_path
from sandboxd.images.tarstream import ImportLimits
from sandboxd.session import OWNER, lowest
from sandboxd.workspace import edit
from sandboxd.workspace.diff import compare
from sandboxd.workspace.layerimport import import_layer
from sandboxd.workspace.layertar import export_diff, export_stack
from sandboxd.workspace.textdiff import MAX_TEXT, TextDiff, text_diff
from sandboxd.workspace.view import Lent, View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from sandboxd.api.identity import Caller
    from sandboxd.sessions import Sessions, Standing
    from sandboxd.workspace.diff import Change
    from sandboxd.workspace.layertar import Export
    from sandboxd.workspace.view import Entry

__all__ = ["SessionFiles"]

MAX_FILE = 1 << 30
MAX_IMPORT = ImportLimits(total=4 << 30, entries=200_000)
MAX_DIFFS = 4 << 20
"""Bytes of text diffs in one answer; later files have none."""
_CHUNK = 1 << 18

T = TypeVar("T")


class SessionFiles:
    """Raises NotFound for a session that is not the caller's, as do all its methods."""

    def __init__(self, sessions: Sessions, scratch: Path) -> None:
        """``scratch`` is where bodies are kept while they come."""
        self._sessions = sessions
        self._scratch = scratch

    async def diff(
        self, caller: Caller, named: str, *, since: str, to: str | None, text: bool, limit: int
    ) -> models.SessionDiff:
        """What differs between two checkpoints; with ``text``, how."""

        def compared(old: Standing, new: Standing) -> models.SessionDiff:
            with _views(old, new) as (before, after):
                changes: list[models.FileChange] = []
                left = MAX_DIFFS if text else 0
                for change in compare(before, after):
                    if not change.path:
                        continue  # the directory itself
                    if len(changes) >= limit:
                        return models.SessionDiff(
                            since=old.checkpoint, to=new.checkpoint, changes=changes, truncated=True
                        )
                    changes.append(_change(before, after, change, left if text else None))
                    left -= len(changes[-1].diff or "")
                return models.SessionDiff(since=old.checkpoint, to=new.checkpoint, changes=changes)

        async with self._sessions.standing(caller, named, since, to) as (old, new):
            return await anyio.to_thread.run_sync(compared, old, new)

    async def list(
        self, caller: Caller, named: str, path: str, *, checkpoint: str | None, recursive: bool, limit: int
    ) -> models.FileList:
        """What a directory has, or all beneath it; the path of the root is empty. Raises StateConflict."""
        place = _path(path) if path else b""

        def listed(one: Standing) -> models.FileList:
            with _views(one) as (view,):
                entry = _found(view, place)
                if not entry.is_directory:
                    raise errors.StateConflict(f"{path!r} is a {entry.kind}, and no directory")
                found: list[models.FileInfo] = []
                for each in view.walk(entry) if recursive else view.children(entry):
                    if len(found) >= limit:
                        return models.FileList(files=found, truncated=True)
                    found.append(_info(view, each))
                return models.FileList(files=found)

        async with self._sessions.standing(caller, named, checkpoint) as (one,):
            return await anyio.to_thread.run_sync(listed, one)

    @asynccontextmanager
    async def read(
        self, caller: Caller, named: str, path: str, *, checkpoint: str | None
    ) -> AsyncIterator[tuple[models.FileInfo, AsyncIterator[bytes]]]:
        """A regular file: what it is, with its digest, and its bytes. Raises StateConflict."""
        place = _path(path)
        async with self._sessions.standing(caller, named, checkpoint) as (one,):
            with ExitStack() as stack:

                def opened() -> tuple[models.FileInfo, Iterator[bytes]]:
                    (view,) = stack.enter_context(_views(one))
                    entry = _found(view, place)
                    return _info(view, entry, digest=True), view.content(entry)

                info, chunks = await anyio.to_thread.run_sync(opened)
                yield info, _threaded(chunks)

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
        async with self._spooled(chunks, MAX_FILE) as body:

            def fill(view: View, into: int) -> edit.Written:
                content = iter(lambda: body.read(_CHUNK), b"")
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
        """A layer of a checkpoint's files, or of what makes it of an earlier one. Raises StateConflict."""
        wanted = (to,) if since is None else (since, to)
        async with self._sessions.standing(caller, named, *wanted) as stands:
            with ExitStack() as stack:

                def made() -> Export:
                    views = stack.enter_context(_views(*stands))
                    if len(views) == 1:
                        return export_stack(views[0], times=times)
                    return export_diff(views[0], views[1], times=times)

                export = await anyio.to_thread.run_sync(made)
                yield export, _threaded(export.chunks)

    async def bring(self, caller: Caller, named: str, chunks: AsyncIterator[bytes]) -> models.CheckpointInfo:
        """Put a layer's tar over what the session has. Raises InvalidRequest, TooLarge, QuotaExceeded."""
        async with self._spooled(chunks, MAX_IMPORT.total) as body:
            _, made = await self._changed(
                caller,
                named,
                lambda view, into: import_layer(body, into, view, owner=_owner(view), limits=MAX_IMPORT),
            )
        return made

    async def _changed(
        self, caller: Caller, named: str, fill: Callable[[View, int], T]
    ) -> tuple[T, models.CheckpointInfo]:
        results: list[T] = []

        def filled(below: Sequence[Path | Lent], into: int) -> None:
            with View(below) as view:
                results.append(fill(view, into))

        made = await self._sessions.change(caller, named, filled)
        return results[0], made

    @asynccontextmanager
    async def _spooled(self, chunks: AsyncIterator[bytes], most: int) -> AsyncIterator[BinaryIO]:
        """A body on disk, where it takes no memory while the change waits for its turn."""
        with tempfile.TemporaryFile(dir=self._scratch) as file:
            size = 0
            async for chunk in chunks:
                size += len(chunk)
                if size > most:
                    raise errors.TooLarge(f"the body is over {units.format_size(most)}", limit=most)
                try:
                    await anyio.to_thread.run_sync(file.write, chunk)
                except OSError as error:
                    raise errors.HostFailed(f"the body cannot be kept: {error.strerror}") from error
            file.seek(0)
            yield file


async def _threaded(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Chunks that are read from the disk, each in a thread."""
    while (chunk := await anyio.to_thread.run_sync(next, chunks, None)) is not None:
        yield chunk


@contextmanager
def _views(*stands: Standing) -> Iterator[list[View]]:
    """Views of checkpoints of one session; what its caller has lent is the same layer in all."""
    with ExitStack() as stack:
        bottom = stack.enter_context(lowest(stands[-1].checkout))
        yield [stack.enter_context(View((*one.layers, *bottom))) for one in stands]


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
    return _info(view, entry, digest=digest and entry.kind == "file" and entry.size <= MAX_FILE)


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
